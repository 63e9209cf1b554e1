"""The calls of IR ops inside opaque ops, and what serves each: a body in the bundle, or a provider's function."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from piecework.bundle import Bundle
from piecework.bundle.format import EXPLANATION
from piecework.bundle.manifest import corrupt
from piecework.bundle.plan import NativeCall, Plan
from piecework.foundation.notes import KERNELS, read_note
from piecework.report.spelling import spell_bytes, spell_count


@dataclass(frozen=True)
class NativeReport:
    """What serves the calls of one form.

    Args:
        op: the op, such as "silu_mul".
        call: with its arguments, for people.
        sizes: the dynamic sizes in them, each with its least and greatest value.
        callers: the opaque ops that call it.
        provider: whose implementation it is.
        rejected: why each other provider's was not taken.
        artifact: the file of the compiled body, or "" where the provider's own function is called.
        size_bytes: of that file.
        num_kernels: how many kernels it has, or None where that isn't known.
    """

    op: str
    call: str
    sizes: dict[str, tuple[int, int]]
    callers: tuple[str, ...]
    provider: str
    rejected: dict[str, str]
    artifact: str
    size_bytes: int
    num_kernels: int | None


def native_reports(bundle: Bundle, plan: Plan) -> tuple[NativeReport, ...]:
    """Return what serves calls inside opaque ops. Raises CorruptBundle where what the bundle says isn't that."""
    noted = (bundle.explanation() or {}).get("natives", ())
    try:
        rejected = [_rejected(native) for native in noted]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise corrupt(EXPLANATION, bundle=str(bundle.path), found="does not say what serves calls of ops") from error
    return tuple(
        _report(bundle, native, rejected[number] if number < len(rejected) else {})
        for number, native in enumerate(plan.natives)
    )


def native_lines(reports: Sequence[NativeReport]) -> Iterator[str]:
    """Write them for people."""
    for report in reports:
        sizes = ", ".join(f"{name} {low} to {high}" for name, (low, high) in report.sizes.items())
        yield report.call + (f", {sizes}" if sizes else "")
        served = f"compiled, {report.artifact[:12]}…, {spell_bytes(report.size_bytes)}" if report.artifact else "called"
        kernels = f", {spell_count(report.num_kernels, 'kernel')}" if report.num_kernels is not None else ""
        yield f"  in {', '.join(report.callers)}: {report.provider}, {served}{kernels}"


def _report(bundle: Bundle, native: NativeCall, rejected: dict[str, str]) -> NativeReport:
    file = bundle.artifact_path(native.artifact).name if native.artifact else ""
    return NativeReport(
        op=native.form.op.removeprefix("piecework::"),
        call=native.form.text(),
        sizes={name: (low, high) for name, low, high in native.form.sizes},
        callers=native.ops,
        provider=native.provider,
        rejected=rejected,
        artifact=file,
        size_bytes=bundle.artifacts[file].size if file else 0,
        num_kernels=_num_kernels(bundle, file) if file else None,
    )


def _num_kernels(bundle: Bundle, file: str) -> int | None:
    path = bundle.artifact_path(file)
    try:
        text = "" if path.suffix == ".json" else read_note(path, mark=KERNELS)
        return len(json.loads(text)) if text else None
    except (OSError, ValueError, TypeError):
        return None


def _rejected(native: Mapping[str, Any]) -> dict[str, str]:
    """Return why the other providers weren't taken for the op itself, the first of the calls that were lowered."""
    sites = native["sites"]
    return {str(provider): str(why) for provider, why in sites[0]["rejected"]} if sites else {}
