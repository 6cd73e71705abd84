"""Tools that a model may call: how its family writes calls, as a grammar, and read out of its text."""
