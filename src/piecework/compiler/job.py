"""A compile job: one program over one range of sizes, data that crosses to a worker process and keys the artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from piecework.bundle.packings import OWN
from piecework.compiler.passes.native_matmul import native_sources
from piecework.foundation.digests import JsonScalar, digest_json
from piecework.ops.ir.program import Program


@dataclass(frozen=True)
class Job:
    """What to compile.

    Attributes:
        program: the piece.
        ranges: symbol → (min, max) where narrower than the program declares.
        pack: constants that are bound packed, and how (bundle/packings.py).
        options: backend options that change the artifact.
        target: what the artifact runs on (`Target.fact`, torch's version).
    """

    program: Program
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    pack: Mapping[int, str] = field(default_factory=dict)
    options: Mapping[str, JsonScalar] = field(default_factory=dict)
    target: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the job as JSON."""
        return {
            "program": self.program.to_json(),
            "ranges": {s: list(r) for s, r in sorted(self.ranges.items())},
            "pack": [[index, how] for index, how in sorted(self.pack.items())],
            "options": dict(self.options),
            "target": dict(self.target),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Job:
        """Read what `to_json` wrote."""
        return Job(
            program=Program.from_json(data["program"]),
            ranges={s: (int(lo), int(hi)) for s, (lo, hi) in data["ranges"].items()},
            pack={int(index): str(how) for index, how in data["pack"]},
            options=data["options"],
            target=data["target"],
        )

    def packed(self, *how: str) -> frozenset[int]:
        """Return the constants that are bound packed in one of these ways."""
        return frozenset(index for index, name in self.pack.items() if name in how)

    def key(self) -> str:
        """Return the artifact's key: the digest of all that the compile depends on."""
        sources = native_sources() if self.packed(*OWN) else {}
        return digest_json({**self.to_json(), **({"sources": sources} if sources else {})})
