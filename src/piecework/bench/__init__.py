"""Measurements of piecework and of the systems beside it. Every cell is a process of its own."""
