"""Figures of a benchmark as a picture: an HTML page that needs nothing else, or a PNG by matplotlib."""
