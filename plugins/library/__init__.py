"""Shared libraries of kernels: built, described, found and opened."""
