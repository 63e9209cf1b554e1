"""The provider `kernels`: kernels of the Hugging Face Hub, through the package `kernels`, for NVIDIA GPUs.

Of `kernels-community`: `activation`, `liger-kernels` (RMS norm) and `rotary`, in fixed versions. The package downloads
a kernel when a call on a GPU first asks for it, unless the Hub's cache, or `LOCAL_KERNELS`, has it. What can't be had
is passed over with the reason.

Not implemented: `add_rms_norm` and `layer_norm` (the Hub's are layers for training that keep more than results),
quantization and routing, which these repositories have no kernels for.
"""

from __future__ import annotations


def register() -> None:
    """Register the implementations. Raises ImportError where `kernels` is not installed or can't be imported."""
    from piecework.providers.hub import implementations  # noqa: PLC0415  it needs torch
    from piecework.providers.known import import_package  # noqa: PLC0415

    implementations.register(import_package("kernels"))
