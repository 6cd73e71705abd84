"""A bundle and all that a machine needs to run it, as one folder or archive: the command ``bilevel deploy``."""
