"""The provider `flashinfer`: FlashInfer's kernels for NVIDIA GPUs.

The package is imported when the provider is asked for. It compiles most kernels when they are first called, unless its
package of compiled ones is installed too.

Not implemented, since it has no kernel that does what the ops say: `quantize_static_fp8`, `quantize_dynamic_per_token`
and `quantize_group_fp8` (its quantization is to block formats), and `moe_route` by softmax.
"""

from __future__ import annotations


def register() -> None:
    """Register the implementations. Raises ImportError where FlashInfer is not installed or can't be imported."""
    from piecework.providers.flashinfer import activations, norms, routing  # noqa: PLC0415  they need torch
    from piecework.providers.flashinfer import rotary as rotary_embedding  # noqa: PLC0415
    from piecework.providers.known import import_package  # noqa: PLC0415

    package = import_package("flashinfer")
    norms.register(package)
    activations.register(package)
    rotary_embedding.register(package)
    routing.register(package)
