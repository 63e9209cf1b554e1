"""The provider `sgl_kernel`: SGLang's kernels for NVIDIA GPUs. The package is imported when the provider is asked for.

Its norms, gated activations and rotary embedding have FlashInfer's functions and conditions.

Not implemented: `layer_norm`, and int8, which it has no kernels for; fp8 with a scale per row, since its kernel for few
rows gives rows of zeros 448 with a scale of 0, where the op gives zeros.
"""

from __future__ import annotations


def register() -> None:
    """Register the implementations. Raises ImportError where sgl-kernel is not installed or can't be imported."""
    from piecework.providers.families.gated import implement_gated  # noqa: PLC0415  they need torch
    from piecework.providers.families.norms import implement_norms  # noqa: PLC0415
    from piecework.providers.families.rotary import implement_rotary  # noqa: PLC0415
    from piecework.providers.flashinfer.activations import gated_kernels  # noqa: PLC0415
    from piecework.providers.flashinfer.norms import norm_kernels  # noqa: PLC0415
    from piecework.providers.flashinfer.rotary import rotary_kernels  # noqa: PLC0415
    from piecework.providers.known import import_package  # noqa: PLC0415
    from piecework.providers.sgl_kernel import quantize, routing  # noqa: PLC0415

    package = import_package("sgl_kernel")
    implement_norms("sgl_kernel", norm_kernels(package))
    implement_gated("sgl_kernel", gated_kernels(package))
    if hasattr(package, "apply_rope_with_cos_sin_cache_inplace"):
        implement_rotary("sgl_kernel", rotary_kernels(package))
    quantize.register(package)
    routing.register(package)
