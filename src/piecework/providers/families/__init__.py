"""Families of ops as packages of kernels have them: what a call must be like, and how arguments are handed over.

Packages agree in much: norms of rows [T, H] that round once, activations of both halves in one tensor, rotary embedding
in place by a table of cosines and sines. A provider gives its kernels and its own conditions.
"""
