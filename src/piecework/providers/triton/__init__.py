"""The provider `triton`: kernels for NVIDIA and AMD GPUs, one program per row.

Triton is imported when somebody asks for the provider. Kernels also run under its interpreter (TRITON_INTERPRET=1), on
tensors of the CPU, which is how they are tested without a GPU.
"""

from __future__ import annotations


def register() -> None:
    """Register the implementations. Raises ImportError where Triton isn't installed."""
    try:
        import triton  # noqa: F401, PLC0415  takes part of a second, and is not there on every machine
    except ModuleNotFoundError as error:
        raise ImportError("the package triton is not installed") from error
    from piecework.providers.triton import activations, norms, quantize  # noqa: PLC0415  they import Triton

    norms.register()
    activations.register()
    quantize.register()
