"""What a caller of a compile can choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from piecework.compiler.passes.names import MERGE_LINEAR, PASS_NAMES
from piecework.errors import CompileError
from piecework.foundation.digests import JsonScalar
from piecework.ops.ir.selection import ProviderOrder


class BackendName(Enum):
    """Which backend makes the artifacts."""

    AOTI = "aoti"
    EAGER = "eager"


@dataclass(frozen=True)
class CompileOptions:
    """Options of a compile.

    Attributes:
        backend: `aoti` makes native libraries, `eager` artifacts that run the pieces operator by operator.
        ranges: ranges of the primary size (tokens) that get artifacts of their own, ascending and without gaps; empty
            for one artifact over the whole declared range.
        pack_linear: what linear weights are bound packed for: "own" is code of ours where it fits a layer's sizes, and
            oneDNN elsewhere, "onednn" always the latter; None decides by the target, False packs none.
        merge_linear: whether linear layers that read the same tensor become one; None: yes, for native libraries.
        passes_off: passes that don't run; for the others see `passes.names.PASS_NAMES`.
        device: device type that a model directory is compiled for; a module's is that of its example arguments.
        providers: which implementations IR ops get.
    """

    backend: BackendName = BackendName.AOTI
    ranges: tuple[tuple[int, int], ...] = ()
    pack_linear: Literal["own", "onednn", False] | None = None
    merge_linear: bool | None = None
    passes_off: frozenset[str] = frozenset()
    device: str = "cpu"
    providers: ProviderOrder = field(default_factory=ProviderOrder)

    def __post_init__(self) -> None:
        unknown = sorted(self.passes_off - set(PASS_NAMES))
        if unknown:
            raise CompileError(
                asked=f"a compile without the pass {unknown[0]!r}",
                found="no pass of that name that can be turned off",
                try_=f"one of {', '.join(PASS_NAMES)}",
            )
        if self.pack_linear not in ("own", "onednn", False, None):
            raise CompileError(
                asked=f"a compile with pack_linear={self.pack_linear!r}",
                found="no such packing of linear layers",
                try_='"own", "onednn", False, or None, which decides by the target',
            )

    def facts(self) -> Mapping[str, JsonScalar]:
        """Return the options as facts of the bundle."""
        return {
            "backend": self.backend.value,
            "ranges": ",".join(f"{lo}:{hi}" for lo, hi in self.ranges),
            "pack_linear": self.pack_linear,
            "merge_linear": self.merge_linear,
            "passes_off": ",".join(name for name in PASS_NAMES if name in self.passes_off),
            "device": self.device,
            "providers": self.providers.text(),
        }


def chosen_passes(options: CompileOptions) -> tuple[str, ...]:
    """Return the passes that run, in their order."""
    merges = options.backend is BackendName.AOTI if options.merge_linear is None else options.merge_linear
    off = options.passes_off if merges else options.passes_off | {MERGE_LINEAR}
    return tuple(name for name in PASS_NAMES if name not in off)


def parse_ranges(text: str) -> tuple[tuple[int, int], ...]:
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
