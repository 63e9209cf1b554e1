"""Which provider each call of an IR op has, and why not the others: a report as data, as text and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from piecework.report.subject import piece_letter
from piecework.store import Bundle
from piecework.store.format import EXPLANATION
from piecework.store.manifest import corrupt
from piecework.store.plan import PieceStep, Plan


@dataclass(frozen=True)
class CallReport:
    """A call of an IR op.

    Args:
        piece: the unique piece's letter.
        num_uses: how many of the plan's steps run that piece.
        op: the op's name.
        arguments: the call's, for people.
        provider: whose implementation it has.
        rejected: why each other provider's was not taken.
    """

    piece: str
    num_uses: int
    op: str
    arguments: str
    provider: str
    rejected: Mapping[str, str]


@dataclass(frozen=True)
class OpsReport:
    """The calls of IR ops in a bundle.

    Args:
        path: the bundle.
        order: the order of providers that it was compiled with.
        calls: of each unique piece, in order.
    """

    path: str
    order: str
    calls: tuple[CallReport, ...]

    def to_json(self) -> dict[str, object]:
        """Return the report as a JSON object."""
        return asdict(self)

    def to_text(self) -> str:
        """Return the report as lines for people."""
        lines = [f"bundle         {self.path}", f"providers      {self.order}"]
        if not self.calls:
            return "\n".join([*lines, "", "no calls of IR ops"])
        piece = ""
        for call in self.calls:
            if call.piece != piece:
                piece = call.piece
                lines += ["", f"piece {piece}, {call.num_uses} ×"]
            lines += [f"  {call.op}({call.arguments})", f"    {call.provider}"]
            lines += [f"      not {provider}: {why}" for provider, why in call.rejected.items()]
        return "\n".join(lines)


def describe_ops(bundle: Bundle) -> OpsReport:
    """Return the calls of IR ops in a bundle. Raises CorruptBundle where what it says of them isn't that."""
    plan = Plan.from_json(bundle.plan())
    steps = [*plan.steps, *(step for variant in plan.variants for step in variant.steps)]
    uses = Counter(plan.instances[step.instance].piece for step in steps if isinstance(step, PieceStep))
    order = next((str(f.value) for f in bundle.facts if (f.kind, f.name) == ("option", "providers")), "native")
    try:
        calls = [
            CallReport(
                piece=piece_letter(index),
                num_uses=uses[index],
                op=str(site["op"]),
                arguments=str(site["arguments"]),
                provider=str(site["provider"]),
                rejected={str(provider): str(why) for provider, why in site["rejected"]},
            )
            for index, sites in enumerate((bundle.explanation() or {}).get("ir_ops", ()))
            for site in sites
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise corrupt(EXPLANATION, bundle=str(bundle.path), found="does not say what became of IR ops") from error
    return OpsReport(str(bundle.path), order, tuple(calls))
