"""The page at /, for trying the model in a browser: text of no framework, served as it lies here."""
