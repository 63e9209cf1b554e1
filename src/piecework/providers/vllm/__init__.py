"""The provider `vllm`: kernels of an installed vLLM, of its build for CUDA or for CPUs.

Its library of operators is loaded, not its Python: `import vllm` takes seconds and imports compilers, the library takes
a twentieth of one. Schemas of its operators decide what is there, since builds and versions differ.

Not implemented: `layer_norm`, which it has no kernel for. On CPUs it has none for fp8, by groups, and for routing.
"""

from __future__ import annotations


def register() -> None:
    """Register the implementations. Raises ImportError where vLLM is not installed, or its library can't be loaded."""
    from piecework.providers.vllm import activations, library, norms, quantize, routing  # noqa: PLC0415  need torch
    from piecework.providers.vllm import rotary as rotary_embedding  # noqa: PLC0415

    operators = library.load()
    norms.register(operators)
    activations.register(operators)
    rotary_embedding.register(operators)
    quantize.register(operators)
    routing.register(operators)
