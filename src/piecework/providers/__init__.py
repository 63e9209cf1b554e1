"""Implementations of operators besides their meaning in plain torch: kernels built with a bundle, one folder each."""
