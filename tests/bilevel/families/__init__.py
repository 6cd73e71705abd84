"""Families of released models against transformers' own classes, and against definitions in slow loops where it has none."""
