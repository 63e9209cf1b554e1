"""Operators over whole texts, packed one after the other."""
