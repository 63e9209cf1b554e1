"""What each kernel of the Hub is for, and what its arguments must be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from piecework.ops.norms import Norming
from piecework.ops.rotary import rotary
from piecework.providers.families.conditions import contiguous, first_of, of_one_type, of_types, on_device
from piecework.providers.families.gated import GatedKernel, GatedKernels, implement_gated
from piecework.providers.families.norms import NormKernels, implement_norms

NAME: Final = "kernels"
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_LONGEST: Final = 65536  # elements of a row that the norm's program holds at once


@dataclass(frozen=True)
class HubKernel:
    """A kernel of the Hub, loaded when it is first asked for.

    Attributes:
        repository: "organization/name".
        version: of it; a branch of the repository.
        fetch: loads it, once: the module, or the reason why it can't be had.
    """

    repository: str
    version: int
    fetch: Callable[[], ModuleType | str]

    @property
    def why_absent(self) -> str:
        """Why it can't be had, or ""; loads it."""
        found = self.fetch()
        return found if isinstance(found, str) else ""

    @property
    def module(self) -> Any:
        """The kernel."""
        found = self.fetch()
        assert isinstance(found, ModuleType), found
        return found


def hub_kernel(package: ModuleType, repository: str, *, version: int) -> HubKernel:
    """Return a kernel that `package` (the module `kernels`) fetches."""

    @functools.cache
    def fetch() -> ModuleType | str:
        try:
            found: ModuleType = package.get_kernel(repository, version=version)
        except Exception as error:  # noqa: BLE001  no network, no build for this torch, an untrusted repository …
            return f"{repository} can't be had: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return found

    return HubKernel(repository, version, fetch)


def register(package: ModuleType) -> None:
    """Register the implementations; nothing is fetched."""
    _register_gated(hub_kernel(package, "kernels-community/activation", version=1))
    _register_norm(hub_kernel(package, "kernels-community/liger-kernels", version=3))
    _register_rotary(hub_kernel(package, "kernels-community/rotary", version=2))


def _register_gated(kernel: HubKernel) -> None:
    def why_not(gate: Tensor, up: Tensor) -> str:
        wrong = on_device(("cuda",), gate) or of_types(_DTYPES, gate) or of_one_type(gate, up, what="up")
        return wrong or kernel.why_absent

    def out_first(name: str) -> GatedKernel:
        return lambda both, out: getattr(kernel.module, name)(out, both)

    silu, gelu, gelu_tanh = map(out_first, ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"))
    implement_gated(NAME, GatedKernels(silu, gelu, gelu_tanh, why_not))


def _register_norm(kernel: HubKernel) -> None:
    """Register Liger's norm: its casting modes "llama" and "gemma" round before and after the weight."""

    def why_not(x: Tensor, norming: Norming, residual: Tensor | None) -> str:
        long = f"rows of {x.shape[-1]} elements, more than {_LONGEST}" if x.shape[-1] > _LONGEST else ""
        wrong = on_device(("cuda",), x) or of_types(_DTYPES, x, norming.weight) or contiguous(x, norming.weight) or long
        return wrong or kernel.why_absent

    def norm(x: Tensor, norming: Norming) -> Tensor:
        weight, eps, offset, round_first = norming
        mode = "llama" if round_first else "gemma"
        made: Tensor = kernel.module.rms_norm.rms_norm_forward(x, weight, eps, offset, mode, None)[0]
        return made

    implement_norms(NAME, NormKernels(norm, None, why_not))


def _register_rotary(kernel: HubKernel) -> None:
    """Register `apply_rotary`: it rotates two parts of heads, halves or neighbours, with cosines of their type."""

    def supports(
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,  # noqa: FBT001, FBT002  the op's
    ) -> bool | str:
        return first_of(
            on_device(("cuda",), q),
            of_types(_DTYPES, q),
            of_one_type(q, k, what="the keys' type"),
            of_one_type(q, cos, sin, what="the cosines' type"),
            kernel.why_absent if q.is_cuda else "",
        )

    @rotary.implement(NAME, supports=supports, batch_invariant=True)
    def rotate(
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,  # noqa: FBT001, FBT002  the op's
    ) -> tuple[Tensor, Tensor]:
        size = cos.shape[-1]
        parts = (slice(0, size, 2), slice(1, size, 2)) if interleaved else (slice(size // 2), slice(size // 2, size))
        angles = [x[..., parts[0]] for x in (cos, sin)]
        made = []
        for x in (q, k):
            # strides as the op's: those of its arguments, but contiguous where the rest of a head is put beside
            out = x.clone() if size == x.shape[-1] else x.clone(memory_format=torch.contiguous_format)
            if x.numel():
                pairs = [(x[..., part], out[..., part]) for part in parts]
                kernel.module.apply_rotary(pairs[0][0], pairs[1][0], *angles, pairs[0][1], pairs[1][1], False)
            made.append(out)
        return made[0], made[1]
