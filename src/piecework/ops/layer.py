"""A layer's handle: a string that addresses one layer and never tells layers apart for the compiler."""

from __future__ import annotations


class LayerHandle(str):
    """The name of a layer, for use as a string argument of an opaque op.

    Kept as an attribute of a module, it may differ between the blocks of a stack without costing a trace or a compile:
    capture treats it as a named input of the block's template, and the plan carries each layer's own name.
    """

    __slots__ = ()
