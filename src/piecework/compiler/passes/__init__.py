"""Transformations of pieces before they are compiled, one per file."""
