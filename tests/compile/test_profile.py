"""A profile of an engine's forwards: the trace names every piece and opaque op with its layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from piecework.bundle.plan import Plan
from piecework.compiler.model import CompiledModel
from piecework.engine.events import notes_to
from piecework.engine.llm import LLM
from piecework.engine.opening import open_engine
from piecework.engine.options import EngineOptions
from piecework.engine.profile_options import ProfileOptions
from piecework.engine.request import GenerationRequest
from piecework.engine.sampling_params import SamplingParams
from piecework.errors import StoreError
from piecework.foundation.environment import read_environment
from piecework.report.step_labels import step_labels
from piecework.spec.model_spec import ModelSpec
from tests.compile.test_llm import BLOCK_BYTES, eager, weights_dir

__all__ = ["eager", "weights_dir"]

PROMPTS = [[5, 6, 7], [8, 9]]
PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


def trace(path: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return sorted((e for e in events if e.get("ph") == "X"), key=lambda e: float(e["ts"]))


def run(
    weights: Path, bundle: CompiledModel, profile: ProfileOptions | None
) -> tuple[list[tuple[int, ...]], list[str]]:
    notes: list[str] = []
    options: dict[str, Any] = {"kv_cache_memory": 20 * BLOCK_BYTES, "profile": profile, "on_note": notes.append}
    with LLM(weights, bundle=bundle.bundle.path, **options) as llm:
        tokens = [tuple(c.tokens) for c in llm.generate(PROMPTS, PARAMS)]
        tokens += [tuple(c.tokens) for c in llm.generate(PROMPTS[:1], PARAMS)]
    return tokens, notes


def test_a_window_of_forwards(eager: CompiledModel, weights_dir: Path, tmp_path: Path) -> None:
    plain, _ = run(weights_dir, eager, None)
    options = ProfileOptions(tmp_path / "new" / "profile", steps=3, skip=1)
    found, notes = run(weights_dir, eager, options)
    assert found == plain
    (path,) = options.directory.iterdir()
    assert notes == [f"profile of 3 forwards: {path}"]
    events = trace(path)
    labels = step_labels(Plan.from_json(eager.bundle.plan()))
    assert any("model.layers 0-1" in label for label in labels)
    assert any(label.startswith("piecework::attention ") for label in labels)
    assert [e["name"] for e in events if e["name"] in labels] == list(labels) * 3
    forwards = [e["name"] for e in events if e["name"].startswith("forward ")]
    assert [name.partition(":")[0] for name in forwards] == ["forward 2", "forward 3", "forward 4"]
    assert all(name.endswith("tokens, 2 of them decoding") for name in forwards[1:])


def test_what_ends_early_is_written_as_well(eager: CompiledModel, weights_dir: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        _, notes = run(weights_dir, eager, ProfileOptions(tmp_path, steps=1000))
        assert notes[0].endswith(f"trace-{number}.json")
    events = trace(tmp_path / "trace-2.json")
    assert any(e["name"].endswith("of them decoding") for e in events)
    _, notes = run(weights_dir, eager, ProfileOptions(tmp_path, skip=1000))
    assert notes == []


def test_no_place_for_it(eager: CompiledModel, weights_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="profile"):
        run(weights_dir, eager, ProfileOptions(tmp_path / "file"))


def test_a_trace_that_cant_be_written_stops_nothing(eager: CompiledModel, weights_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "profile"
    options = ProfileOptions(directory, steps=2)
    plain, _ = run(weights_dir, eager, None)
    notes: list[str] = []
    with LLM(
        weights_dir, bundle=eager.bundle.path, kv_cache_memory=20 * BLOCK_BYTES, profile=options, on_note=notes.append
    ) as llm:
        directory.rmdir()
        assert [tuple(c.tokens) for c in llm.generate(PROMPTS, PARAMS)] == plain[:2]
    assert len(notes) == 1
    assert notes[0].startswith("no profile: ")


def test_a_server_profiles_its_first_forwards(eager: CompiledModel, weights_dir: Path, tmp_path: Path) -> None:
    profile = ProfileOptions(tmp_path / "profile", steps=2)
    options = EngineOptions(kv_cache_memory=20 * BLOCK_BYTES, profile=profile, bundle=eager.bundle.path)
    notes = list[str]()
    engine = open_engine(
        ModelSpec.of(weights_dir), options, environment=read_environment(), on_event=notes_to(notes.append)
    ).engine
    engine.add(GenerationRequest("r", tuple(PROMPTS[0]), PARAMS))
    while engine.has_work:
        engine.step()
    engine.close()
    assert len(notes) == 1
    forwards = [e["name"] for e in trace(tmp_path / "profile" / "trace-1.json") if e["name"].startswith("forward ")]
    assert forwards == ["forward 1: 3 tokens, 0 of them decoding", "forward 2: 1 tokens, 1 of them decoding"]
