"""What a pass is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from piecework.compiler.rewrite.metas import MetaRun
from piecework.compiler.rewrite.rewritten import Rewritten
from piecework.report.spelling import spell_numbers


@dataclass(frozen=True)
class PassInput:
    """What a pass works on.

    Attributes:
        rewritten: the program, as the passes before left it.
        runs: all of its values without contents, at typical sizes.
        strict_outputs: positions of results that must keep their strides.
    """

    rewritten: Rewritten
    runs: tuple[MetaRun, ...]
    strict_outputs: frozenset[int]

    def named(self, numbers: Sequence[int] | frozenset[int]) -> str:
        """Return captured calls for people, of the numbers of calls as they are now: "calls 3-9, 12"."""
        return named_calls(sorted({origin for n in numbers for origin in self.rewritten.origins[n]}))

    def shown(self, reference: Any) -> str:
        """Return a tensor for people: "float32[s0, 64]"."""
        tensors = [run.of(reference) for run in self.runs]
        sizes = zip(*(tensor.shape for tensor in tensors), strict=True)
        return f"{str(tensors[0].dtype).removeprefix('torch.')}[{', '.join(self._size(found) for found in sizes)}]"

    def _size(self, found: Sequence[int]) -> str:
        """Return a size that is `found` in the runs: a number, or the symbol that is that, or "?"."""
        if len(set(found)) == 1:
            return str(found[0])
        symbols = self.runs[0].sizes
        return next((s for s in symbols if [run.sizes[s] for run in self.runs] == list(found)), "?")


@dataclass(frozen=True)
class NearMiss:
    """Where a pass nearly applied.

    Attributes:
        why: what was there, and what kept it from applying, for people; calls are numbered as captured.
        calls: the captured calls it is about. Where another pass fused them after all, it is no miss.
    """

    why: str
    calls: tuple[int, ...] = ()


@dataclass(frozen=True)
class PassResult:
    """What a pass made of a program.

    Attributes:
        rewritten: the program now.
        matches: where it applied, for people; calls are numbered as captured.
        near_misses: where it nearly did, and why not.
    """

    rewritten: Rewritten
    matches: tuple[str, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()


@dataclass(frozen=True)
class Pass:
    """A transformation of programs that leaves their results as they are.

    Attributes:
        name: by which it is turned off and reported.
        run: does it.
    """

    name: str
    run: Callable[[PassInput], PassResult]


@dataclass(frozen=True)
class PassReport:
    """What a pass did with a piece.

    Attributes:
        name: the pass.
        matches: where it applied; calls are numbered as captured.
        near_misses: where it nearly did, and why not.
        ops_before: calls of the program that it was given.
        ops_after: calls of the program that it left.
    """

    name: str
    matches: tuple[str, ...]
    near_misses: tuple[str, ...]
    ops_before: int
    ops_after: int

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return {
            "name": self.name,
            "matches": list(self.matches),
            "near_misses": list(self.near_misses),
            "ops_before": self.ops_before,
            "ops_after": self.ops_after,
        }


def named_calls(numbers: Sequence[int]) -> str:
    """Return "call 3", "calls 3-9" or "calls 3-9, 12" of ascending numbers."""
    return f"call{'' if len(numbers) == 1 else 's'} {spell_numbers(numbers)}"
