"""The bundle: the file format between export and runtime. Needs the standard library and numpy only."""
