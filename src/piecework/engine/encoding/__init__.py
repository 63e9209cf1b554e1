"""Encoders: texts in, vectors or scores out."""
