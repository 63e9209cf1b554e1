"""Digests, atomic files and locks, the one reader of the environment, the CPU, and what touches private torch API."""
