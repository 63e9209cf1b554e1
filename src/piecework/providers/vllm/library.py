"""Find and load vLLM's library of operators, without importing vLLM."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from piecework.foundation.target import Target, read_target
from piecework.foundation.torch_private import Argument, find_overload, operator_arguments
from piecework.foundation.torch_private.custom_ops import has_device_kernel
from piecework.providers.known import known_provider

NAME: Final = "vllm"


@dataclass(frozen=True)
class Operators:
    """vLLM's operators that are there.

    Attributes:
        device: "cuda" or "cpu", what the library was built for.
    """

    device: str

    def find(self, name: str) -> Callable[..., Any] | None:
        """Return the operator "namespace::name", or None where this build has none."""
        # builds for CPUs declare some without parameters, for Python that only asks whether they exist
        return find_overload(name) if self.parameters(name) else None

    def parameters(self, name: str) -> Mapping[str, Argument]:
        """Return an operator's parameters by name; none where it isn't there."""
        overload = find_overload(name)
        return {} if overload is None else {argument.name: argument for argument in operator_arguments(overload)}


def load() -> Operators:
    """Load the library, unless it is loaded. Raises ImportError."""
    known = known_provider(NAME)
    assert known is not None
    if known.why_absent:
        raise ImportError(known.why_absent)
    if find_overload("_C::rms_norm") is None:
        spec = importlib.util.find_spec(NAME)
        assert spec is not None
        for file in libraries(Path(str(spec.origin)).parent, target=read_target()):
            try:
                torch.ops.load_library(file)
            except OSError as error:
                raise ImportError(f"vllm's {file.name} can't be loaded: {error}") from error
    if find_overload("_C::rms_norm") is None:
        raise ImportError("the package vllm has no library of operators")
    return Operators("cuda" if has_device_kernel("_C::rms_norm", device="cuda") else "cpu")


def libraries(folder: Path, *, target: Target) -> tuple[Path, ...]:
    """Return the libraries of an installed vLLM that hold its operators.

    They are those that vLLM itself would load, so that it can still be imported.
    """
    there = {path.name.partition(".")[0]: path for path in sorted(folder.glob("*.so"))}
    if "_C_AVX2" in there:  # a build for x86 CPUs has one for each level
        level = "_C" if "bf16" in target.isa else "_C_AVX512" if target.isa == "avx512" else "_C_AVX2"
        return (there[level],) if level in there else ()
    stable = [there[name] for name in ("_C_stable_libtorch", "_moe_C_stable_libtorch") if name in there]
    return tuple(stable or [there[name] for name in ("_C", "_moe_C") if name in there])
