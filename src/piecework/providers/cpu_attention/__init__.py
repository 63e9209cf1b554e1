"""Attention on the CPU as one native call: its C++ sources, and what calls them once they are built."""
