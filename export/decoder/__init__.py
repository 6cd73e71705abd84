"""A checkpoint to a bundle: the decoder as a graph with caches, its dense twin, and the folder they are written to."""
