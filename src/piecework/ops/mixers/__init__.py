"""Operators of layers with recurrent states, which they find by the layer's name."""
