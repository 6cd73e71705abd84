"""Parity of a bundle with its checkpoint: both sides run part by part, and what they chose and computed is judged."""
