"""RMS norms of a package: of rows [T, H], and in place with the addition before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from piecework.ops.ir.values import flattened
from piecework.ops.norms import Norming, add_rms_norm, rms_norm
from piecework.providers.families.conditions import first_of, name_of

_PROBED_COLUMNS = 1024


class Rounding(Enum):
    """When a kernel rounds rows of a narrow type: before it multiplies them with the weight, after, or otherwise."""

    FIRST = "before the weight"
    LAST = "after the weight"
    OTHER = "neither before nor after the weight"

    def conflict(self, x: Tensor, norming: Norming) -> str:
        """Return why a call asks for something else, or ""."""
        asked = Rounding.FIRST if norming.round_first else Rounding.LAST
        if norming.weight is None or x.dtype == torch.float32 or self is asked:
            return ""
        return f"the kernel rounds to {name_of(x.dtype)} {self.value}, the call {asked.value}"


@dataclass(frozen=True)
class NormKernels:
    """A package's kernels.

    Args:
        norm: takes rows [T, H] and what they are normed with; returns new rows.
        add: takes rows, a residual [T, H], and what they are normed with: writes their sum over the residual, and its
            norm over the rows. None where there is none.
        why_not: takes a call's rows, what they are normed with, and a residual or None; "" or why not.
        batch_invariant: whether a row's result is the same in any batch.
    """

    norm: Callable[[Tensor, Norming], Tensor]
    add: Callable[[Tensor, Tensor, Norming], object] | None
    why_not: Callable[[Tensor, Norming, Tensor | None], str]
    batch_invariant: bool = False


def implement_norms(provider: str, kernels: NormKernels) -> None:
    """Register the implementations of `rms_norm` and `add_rms_norm`."""

    @flattened
    def supports(x: Tensor, norming: Norming) -> bool | str:
        return first_of(kernels.why_not(x, norming, None))

    @rms_norm.implement(provider, supports=supports, batch_invariant=kernels.batch_invariant)
    @flattened
    def norm(x: Tensor, norming: Norming) -> Tensor:
        return kernels.norm(rows(x), norming).view(x.shape) if x.numel() else torch.empty_like(x)

    if kernels.add is not None:
        _implement_add(provider, kernels, kernels.add)


def _implement_add(provider: str, kernels: NormKernels, add: Callable[..., object]) -> None:
    @flattened
    def supports(x: Tensor, residual: Tensor, norming: Norming) -> bool | str:
        return first_of(kernels.why_not(x, norming, residual))

    @add_rms_norm.implement(
        provider, supports=supports, reuses=("x", "residual"), batch_invariant=kernels.batch_invariant
    )
    @flattened
    def add_norm(x: Tensor, residual: Tensor, norming: Norming) -> tuple[Tensor, Tensor]:
        if x.numel():
            add(rows(x), rows(residual), norming)
        return x, residual


def rows(x: Tensor) -> Tensor:
    """Return a contiguous tensor [..., H] as [T, H]."""
    return x.view(-1, x.shape[-1])


def probe(norm: Callable[[Tensor, Tensor], Tensor], *, device: str) -> Rounding:
    """Ask a kernel when it rounds: one row of bfloat16 tells.

    Args:
        norm: takes rows [1, H] and a weight [H], with eps 1e-6; returns new rows.
        device: where the kernel runs.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, _PROBED_COLUMNS, generator=generator).bfloat16().to(device)
    found = norm(x[None].clone(), weight)
    wrong = {
        rounding: int((found != rms_norm.native(x[None], weight, 1e-6, 0.0, rounding is Rounding.FIRST)).sum())
        for rounding in (Rounding.FIRST, Rounding.LAST)
    }
    best = min(wrong, key=lambda rounding: wrong[rounding])
    # the other way differs in about every third element; sums in another order change a few
    return best if wrong[best] < _PROBED_COLUMNS // 16 else Rounding.OTHER
