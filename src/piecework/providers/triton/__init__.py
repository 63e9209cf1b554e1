"""The provider `triton`: kernels for NVIDIA and AMD GPUs, one program per row.

Triton is imported when somebody asks for the provider. Kernels also run under its interpreter (TRITON_INTERPRET=1), on
tensors of the CPU, which is how they are tested without a GPU.
"""

from __future__ import annotations


def register() -> None:
    """Register the implementations. Raises ImportError where Triton isn't installed."""
    from piecework.providers.known import import_package  # noqa: PLC0415  as below

    import_package("triton")  # takes part of a second, and is not there on every machine
    from piecework.providers.triton import activations, norms, quantize, rotary  # noqa: PLC0415  they import Triton

    norms.register()
    activations.register()
    quantize.register()
    rotary.register()
