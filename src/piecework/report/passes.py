"""What each pass did with a bundle's pieces: how often it applied and nearly applied, and to what."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from piecework.bundle import Bundle
from piecework.bundle.format import EXPLANATION
from piecework.bundle.manifest import corrupt
from piecework.bundle.plan import Plan
from piecework.report.subject import piece_letter

_SYMBOL: Final = re.compile(r"\bs\d+\b")
_CALLS: Final = re.compile(r"\bcalls? (\d[\d, -]*)")


@dataclass(frozen=True)
class Finding:
    """A place where a pass applied, or nearly did.

    Args:
        text: what was there, and why the pass didn't apply where it didn't; calls are numbered as captured, from 0.
        source: the source lines of those calls, or "".
        pieces: letters of the unique pieces that have it.
    """

    text: str
    source: str
    pieces: tuple[str, ...]


@dataclass(frozen=True)
class PassUse:
    """What a pass did with all unique pieces.

    Args:
        name: the pass.
        matches: where it applied.
        near_misses: where it nearly did.
        num_matches: how many places of unique pieces those matches are.
        num_near_misses: the same of the near misses.
        ops_before: operators of all unique pieces before it.
        ops_after: and after it.
    """

    name: str
    matches: tuple[Finding, ...]
    near_misses: tuple[Finding, ...]
    num_matches: int
    num_near_misses: int
    ops_before: int
    ops_after: int


def pass_uses(bundle: Bundle, plan: Plan) -> tuple[PassUse, ...]:
    """Return what each pass did, in the order in which they run; () where the bundle doesn't say.

    Raises CorruptBundle where what it says isn't that.
    """
    explanation = bundle.explanation() or {}
    try:
        pieces = [list(reports) for reports in explanation.get("passes", ())][: len(plan.pieces)]
        noted = [_Piece.of(explanation, index) for index in range(len(pieces))]
        names = dict.fromkeys(str(report["name"]) for reports in pieces for report in reports)
        return tuple(_use(name, pieces, noted) for name in names)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise corrupt(EXPLANATION, bundle=str(bundle.path), found="does not say what passes did") from error


def pass_lines(uses: Sequence[PassUse], *, everything: bool) -> list[str]:
    """Write what passes did for people; with `everything`, each place of theirs."""
    width = max((len(use.name) for use in uses), default=0)
    lines = []
    for use in uses:
        counts = [_count(use.num_matches, "match", "matches")]
        if use.num_near_misses:
            counts.append(_count(use.num_near_misses, "near miss", "near misses"))
        operators = f", {use.ops_before} → {use.ops_after} operators" if use.ops_before != use.ops_after else ""
        lines.append(f"{use.name:<{width}}  {', '.join(counts)}{operators}")
        if everything:
            lines += [line for finding in use.matches for line in _finding_lines("+", finding)]
            lines += [line for finding in use.near_misses for line in _finding_lines("-", finding)]
    if not everything and any(use.num_near_misses for use in uses):
        lines.append("(--passes shows each place, and why a pass nearly applied and didn't)")
    return lines


def _finding_lines(sign: str, finding: Finding) -> Iterator[str]:
    yield f"  {sign} {' '.join(finding.pieces)}: {finding.text}"
    if finding.source:
        yield f"      at {finding.source}"


@dataclass(frozen=True)
class _Piece:
    """What is known of a unique piece: the source line of each call, "" where it isn't known, and its sizes' names."""

    lines: Sequence[str]
    sizes: Mapping[str, str]

    @staticmethod
    def of(explanation: Mapping[str, Any], index: int) -> _Piece:
        pieces, lines = explanation.get("pieces", ()), explanation.get("locations", ())
        piece = pieces[index] if index < len(pieces) else {"at": ()}
        return _Piece(
            [str(lines[number]) if number >= 0 else "" for number in piece["at"]], dict(piece.get("sizes", {}))
        )

    def named(self, text: str) -> str:
        """Return a text with the sizes' names in place of symbols."""
        return _SYMBOL.sub(lambda m: self.sizes.get(m.group(0), m.group(0)), text)


def _use(name: str, pieces: Sequence[Sequence[Mapping[str, Any]]], noted: Sequence[_Piece]) -> PassUse:
    found: dict[str, list[tuple[int, str]]] = {"matches": [], "near_misses": []}
    before = after = 0
    for index, reports in enumerate(pieces):
        for report in (r for r in reports if r["name"] == name):
            before += int(report["ops_before"])
            after += int(report["ops_after"])
            for kind, texts in found.items():
                texts += [(index, noted[index].named(str(text)).removeprefix(f"{name}: ")) for text in report[kind]]
    return PassUse(
        name=name,
        matches=_findings(found["matches"], noted),
        near_misses=_findings(found["near_misses"], noted),
        num_matches=len(found["matches"]),
        num_near_misses=len(found["near_misses"]),
        ops_before=before,
        ops_after=after,
    )


def _findings(texts: Sequence[tuple[int, str]], noted: Sequence[_Piece]) -> tuple[Finding, ...]:
    """Join what is said of the same source lines with the same words but for the calls' numbers."""
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for index, text in texts:
        source = _source(text, noted[index].lines)
        groups.setdefault((_CALLS.sub("", text) if source else text, source), []).append((index, text))
    return tuple(
        Finding(group[0][1], source, tuple(dict.fromkeys(piece_letter(index) for index, _ in group)))
        for (_, source), group in groups.items()
    )


def _source(text: str, lines: Sequence[str]) -> str:
    """Return the source lines of the calls that a text names, those of one file as a range."""
    numbers: dict[str, list[int]] = {}
    for match in _CALLS.finditer(text):
        for run in match.group(1).split(","):
            low, _, high = run.strip().partition("-")
            if not low.strip().isdigit():
                continue
            last = int(high) if high.strip().isdigit() else int(low)
            for line in lines[int(low) : last + 1]:
                file, _, number = line.rpartition(":")
                if number.isdigit():
                    numbers.setdefault(file, []).append(int(number))
    return ", ".join(
        f"{file}:{min(found)}" + (f"-{max(found)}" if max(found) > min(found) else "")
        for file, found in numbers.items()
    )


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"
