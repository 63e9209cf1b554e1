"""Which provider each call of an IR op has, and why not the others: a report as data, as text and as JSON."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from piecework.bundle import Bundle
from piecework.bundle.format import EXPLANATION
from piecework.bundle.manifest import corrupt
from piecework.bundle.plan import PieceStep, Plan
from piecework.report.natives import NativeReport, native_reports
from piecework.report.subject import piece_letter

_SYMBOL: Final = re.compile(r"\bs\d+\b")


@dataclass(frozen=True)
class CallReport:
    """A call of an IR op.

    Args:
        piece: the unique piece's letter.
        num_uses: how many of the plan's steps run that piece.
        op: the op's name.
        arguments: the call's, for people, with the model's names of sizes.
        provider: whose implementation it has.
        rejected: why each other provider's was not taken.
        source: the source lines that it stands for, "package/file.py:63-67 in Norm.forward", or "".
    """

    piece: str
    num_uses: int
    op: str
    arguments: str
    provider: str
    rejected: Mapping[str, str]
    source: str = ""


@dataclass(frozen=True)
class OpsReport:
    """The calls of IR ops in a bundle.

    Args:
        path: the bundle.
        order: the order of providers that it was compiled with.
        calls: of each unique piece, in order.
        natives: calls inside opaque ops.
    """

    path: str
    order: str
    calls: tuple[CallReport, ...]
    natives: tuple[NativeReport, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return the report as a JSON object."""
        return asdict(self)

    def to_text(self) -> str:
        """Return the report as lines for people: calls that differ in their pieces only are one."""
        lines = [f"bundle         {self.path}", f"providers      {self.order}"]
        groups: dict[Any, list[CallReport]] = {}
        for call in self.calls:
            kind = call.op, call.arguments, call.source, call.provider, tuple(call.rejected.items())
            groups.setdefault(kind, []).append(call)
        if not groups and not self.natives:
            return "\n".join([*lines, "", "no calls of IR ops"])
        for group in groups.values():
            lines += ["", *_call_lines(group)]
        for native in self.natives:
            lines += ["", f"{native.call}", f"  inside {', '.join(native.callers)}"]
            lines += _chosen_lines(f"{native.provider}{', compiled' if native.artifact else ''}", native.rejected)
        return "\n".join(lines)


def describe_ops(bundle: Bundle) -> OpsReport:
    """Return the calls of IR ops in a bundle. Raises CorruptBundle where what it says of them isn't that."""
    plan = Plan.from_json(bundle.plan())
    uses = Counter(plan.instances[step.instance].piece for step in plan.all_steps if isinstance(step, PieceStep))
    order = next((str(f.value) for f in bundle.facts if (f.kind, f.name) == ("option", "providers")), "native")
    explanation = bundle.explanation() or {}
    try:
        names = [dict(piece.get("sizes", {})) for piece in explanation.get("pieces", ())]
        calls = [
            CallReport(
                piece=piece_letter(index),
                num_uses=uses[index],
                op=str(site["op"]),
                arguments=_named(str(site["arguments"]), names[index] if index < len(names) else {}),
                provider=str(site["provider"]),
                rejected={str(provider): str(why) for provider, why in site["rejected"]},
                source=str(site.get("source", "")),
            )
            for index, sites in enumerate(explanation.get("ir_ops", ()))
            for site in sites
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise corrupt(EXPLANATION, bundle=str(bundle.path), found="does not say what became of IR ops") from error
    return OpsReport(str(bundle.path), order, tuple(calls), native_reports(bundle, plan))


def _named(arguments: str, names: Mapping[str, str]) -> str:
    return _SYMBOL.sub(lambda m: names.get(m.group(0), m.group(0)), arguments)


def _call_lines(group: Sequence[CallReport]) -> Iterator[str]:
    first = group[0]
    pieces = dict.fromkeys(call.piece for call in group)
    where = f"piece{'s' if len(pieces) > 1 else ''} {' '.join(pieces)}"
    yield f"{sum(call.num_uses for call in group)} × {first.op}({first.arguments}), {where}"
    if first.source:
        yield f"  at {first.source}"
    yield from _chosen_lines(first.provider, first.rejected)


def _chosen_lines(provider: str, rejected: Mapping[str, str]) -> Iterator[str]:
    yield f"  {provider}"
    yield from (f"    not {other}: {why}" for other, why in rejected.items())
