"""Measurements: what piecework and the systems beside it take to start and to step. Every cell is a process of its own."""
