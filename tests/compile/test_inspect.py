"""What `piecework inspect` says of libraries that were really compiled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from piecework.bundle.bundle import Bundle, BundleContent, write_bundle
from piecework.compiler.model import CompiledModel
from piecework.foundation.digests import digest_file
from piecework.foundation.notes import KERNELS, read_note
from piecework.report.inspect import describe
from piecework.report.kernel_counts import Moved, MovedRow


def layers(bundle: Bundle) -> MovedRow:
    """Return what each inner layer moves at one token."""
    return next(row for row in describe(bundle, verified=False).moved[0].rows if row.part == "layers")


@pytest.mark.slow
def test_a_layer_before_and_after(float32: CompiledModel) -> None:
    row = layers(float32.bundle)
    captured, passed, lowered, compiled = row.stages
    assert all(moved.kernels and moved.weight_bytes and moved.other_bytes for moved in row.stages)
    # four projections of attention, three of the MLP, two norms
    weights = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64 + 2 * 64)
    assert (captured.weight_bytes, passed.weight_bytes, lowered.weight_bytes) == (weights, weights, weights)
    assert weights <= (compiled.weight_bytes or 0) < 1.01 * weights, "a norm's may be read by two kernels"
    # four linear layers, two norms with the sums before them, silu(gate) * up, and rotary of query and key
    assert passed.kernels == 8
    assert (captured.kernels or 0) > 3 * (compiled.kernels or 0)
    assert (lowered.kernels or 0) > 3 * (compiled.kernels or 0)
    assert (lowered.other_bytes or 0) > (compiled.other_bytes or 0) > 0.8 * (passed.other_bytes or 0)
    assert row.num_calls == 1


def test_every_linear_layer_is_a_call_and_nothing_else_is(float32: CompiledModel) -> None:
    report = describe(float32.bundle, verified=False)
    assert len(report.kernels) == 3
    for piece in report.kernels:
        lowered = Counter(kernel.name == "piecework.linear" for kernel in piece.lowered or ())
        (form,) = piece.compiled
        assert form[2] is not None
        calls = [kernel.name for kernel in form[2] if not kernel.name.startswith("loops: ")]
        assert len(calls) == lowered[True]
        assert all("linear" in name for name in calls)


@pytest.mark.slow
def test_ranges_have_kernels_of_their_own(ranged: CompiledModel) -> None:
    report = describe(ranged.bundle, verified=False, sizes=[{"tokens": n} for n in (1, 32, 256)])
    for table in report.moved:
        assert all(stage != Moved(None, None, None) for row in table.rows for stage in row.stages)
    one = report.kernels[1].compiled[0]
    assert one[:2] == (1, 1)
    assert not any("tokens" in text for kernel in one[2] or () for term in kernel.writes for text in term)


@pytest.mark.slow
def test_what_the_store_had_says_the_same(
    compiled: Callable[..., CompiledModel], float32: CompiledModel, tmp_path: Path
) -> None:
    again = compiled(out=tmp_path / "again")
    assert describe(again.bundle, verified=False).kernels == describe(float32.bundle, verified=False).kernels


def test_libraries_that_were_compiled_before_counts_were_noted(float32: CompiledModel, tmp_path: Path) -> None:
    bundle = float32.bundle
    plan = json.dumps(bundle.plan())
    artifacts: dict[str, Path] = {}
    for name in bundle.artifacts:
        path = bundle.artifact_path(name)
        note = read_note(path, mark=KERNELS).encode()
        content = path.read_bytes()
        old = tmp_path / name
        old.write_bytes(content[: -len(note) - 8 - len(KERNELS)] if note else content)
        digest = digest_file(old)
        plan = plan.replace(name, f"{digest}.so")
        artifacts[f"{digest}.so"] = old
    old_bundle = write_bundle(
        tmp_path / "old",
        BundleContent(
            plan=json.loads(plan),
            artifacts=artifacts,
            facts=bundle.facts,
            record=bundle.record(),
            explanation=bundle.explanation(),
        ),
    )
    *before, compiled = layers(old_bundle).stages
    assert compiled == Moved(None, None, None)
    assert tuple(before) == layers(bundle).stages[:3]
