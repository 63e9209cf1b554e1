"""Operators of layers whose states are of a fixed size, and are given as arguments."""
