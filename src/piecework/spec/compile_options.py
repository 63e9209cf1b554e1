"""How a graph is compiled, whatever it is of: what a caller of `piecework.compile` can choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from piecework.errors import CompileError
from piecework.foundation.digests import JsonScalar
from piecework.ops.ir.provider_order import ProviderOrder, as_order
from piecework.spec.option import option, written, wrong_choice
from piecework.spec.passes import PASS_NAMES

Ranges = tuple[tuple[int, int], ...]


class BackendName(Enum):
    """Which backend makes the artifacts."""

    AOTI = "aoti"
    EAGER = "eager"


def parse_ranges(text: str) -> Ranges:
    """Parse "1,2:64,65:8192". Raises ValueError, with the reason, for anything that isn't ascending without gaps."""
    ranges: list[tuple[int, int]] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        low, colon, high = part.partition(":")
        if not low.isdigit() or (colon and not high.isdigit()):
            raise ValueError(f"{part!r} is neither a number nor a range such as 2:64")
        lo, hi = int(low), int(high) if colon else int(low)
        if lo < 1 or hi < lo:
            raise ValueError(f"{part!r} is empty or below 1")
        if ranges and lo != ranges[-1][1] + 1:
            raise ValueError(f"{part!r} does not follow on {ranges[-1][0]}:{ranges[-1][1]}")
        ranges.append((lo, hi))
    return tuple(ranges)


def ranges_text(ranges: Ranges) -> str:
    """Return what `parse_ranges` reads."""
    return ",".join(f"{lo}:{hi}" for lo, hi in ranges)


def _read_ranges(value: Any) -> Ranges:
    return parse_ranges(value if isinstance(value, str) else ranges_text(value))


def _read_packing(value: Any) -> Any:
    return False if value == "off" else value


def _packing_text(value: Any) -> Any:
    return "off" if value is False else value


def _read_passes(value: Any) -> frozenset[str]:
    return frozenset(filter(None, value.split(",")) if isinstance(value, str) else value)


def _passes_text(passes: frozenset[str]) -> str:
    return ",".join(name for name in PASS_NAMES if name in passes)


@dataclass(frozen=True)
class CompileOptions:
    """Options of a compile.

    Attributes:
        device: device type that a model directory is compiled for; a module's is that of its example arguments.
        backend: `aoti` makes native libraries, `eager` artifacts that run the pieces operator by operator.
        providers: which implementations IR ops get.
        ranges: ranges of the primary size (tokens) that get artifacts of their own, ascending and without gaps; empty
            for one artifact over the whole declared range.
        passes_off: passes that don't run; for the others see `spec.passes.PASS_NAMES`.
        pack_linear: what linear weights are bound packed for: "own" is code of ours where it fits a layer's sizes, and
            oneDNN elsewhere, "onednn" always the latter; None decides by the target, False packs none.

    Raises CompileError for a pass, a device or a packing that there is not.
    """

    device: str = option("cpu", "what the model runs on", choices=("cpu", "cuda"))
    backend: BackendName = option(
        BackendName.AOTI,
        "aoti: native code; eager: run the pieces operator by operator",
        choices=tuple(name.value for name in BackendName),
        read=BackendName,
        write=lambda backend: backend.value,
    )
    providers: ProviderOrder = option(
        ProviderOrder(),
        'which implementations operators get, in order: "rms_norm=triton,native", "rms_norm[1:64]=aten,native" for a '
        'range of tokens, "@cuda=triton,native" for a device, or "aten,native" for all; may be given several times',
        flag="--provider",
        metavar="RULE",
        repeated=True,
        read=as_order,
        write=ProviderOrder.text,
    )
    ranges: Ranges = option(
        (),
        'ranges of tokens with artifacts of their own, such as "1,2:64,65:2048"',
        metavar="R",
        default_text="one for all",
        read=_read_ranges,
        write=ranges_text,
    )
    passes_off: frozenset[str] = option(
        frozenset(),
        "leave a pass out, such as rotary or merge_linear; may be given several times; `inspect --passes` shows what "
        "each did",
        flag="--without-pass",
        metavar="NAME",
        repeated=True,
        default_text="none",
        read=_read_passes,
        write=_passes_text,
    )
    pack_linear: Literal["own", "onednn", False] | None = option(
        None,
        "what linear layers' weights are packed for: code of ours where it fits, oneDNN always, or nothing",
        choices=("own", "onednn", "off"),
        default_text="by the CPU",
        read=_read_packing,
        write=_packing_text,
    )

    def __post_init__(self) -> None:
        unknown = sorted(self.passes_off - set(PASS_NAMES))
        if unknown:
            raise CompileError(
                asked=f"a compile without the pass {unknown[0]!r}",
                found="no pass of that name that can be turned off",
                try_=f"one of {', '.join(PASS_NAMES)}",
            )
        wrong = wrong_choice(self)
        if wrong is not None:
            raise CompileError(
                asked=f"a compile with {wrong.name}={getattr(self, wrong.name)!r}",
                found=f"a {wrong.name} that there is not",
                try_=f"one of {', '.join(wrong.option.choices)}",
            )

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes that run, in their order."""
        return tuple(name for name in PASS_NAMES if name not in self.passes_off)

    def facts(self) -> Mapping[str, JsonScalar]:
        """Return the options as facts of the bundle."""
        return written(self)
