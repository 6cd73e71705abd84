"""The command line: ``main`` finds the command, one module each does the work."""
