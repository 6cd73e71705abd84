"""What a text has to follow (a JSON schema, a regular expression, a grammar) as the tokens that may come next."""
