"""Prompts to text on a backend: rows, sampling, text in and out."""
