"""Operators: what they mean in plain torch, programs of them, and layer handles."""
