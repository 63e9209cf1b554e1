"""How large the KV cache is: a function of numbers that a compile doesn't change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from piecework.bundle.plan import Instance, OpStep, Recipe, State
from piecework.engine import kv_memory
from piecework.engine.kv_memory import (
    Memory,
    MemoryNeeds,
    memory_needs,
    num_blocks_in,
    num_blocks_of_bytes,
    read_memory,
)
from piecework.errors import CapacityError
from piecework.models.adapter import build_causal_lm
from piecework.ops.mla.plain import CONTEXT_CHUNK
from piecework.spec.config import read_config
from piecework.spec.model_spec import ModelSpec
from tests.unit.models.tiny import write_config

GIB = 2**30
NEEDS = MemoryNeeds(weights=2 * GIB, activations=GIB, block=2**20)


def test_a_fraction_of_what_is_left_goes_to_the_cache() -> None:
    memory = Memory(total=64 * GIB, free=13 * GIB)
    assert num_blocks_in(memory, NEEDS, fraction=0.5) == 5 * 1024
    assert num_blocks_in(memory, NEEDS, fraction=1.0) == 10 * 1024


def test_a_few_megabytes_of_other_processes_change_nothing() -> None:
    exact = Memory(total=64 * GIB, free=13 * GIB + GIB // 2)
    found = {num_blocks_in(replace(exact, free=exact.free + d * 2**20), NEEDS, fraction=0.5) for d in (-400, 0, 400)}
    assert len(found) == 1


def test_too_little_memory_is_said_so() -> None:
    with pytest.raises(CapacityError, match=r"weights take 2,048\.0 MiB"):
        num_blocks_in(Memory(total=64 * GIB, free=3 * GIB), NEEDS, fraction=0.9)
    with pytest.raises(CapacityError, match="one block takes"):
        num_blocks_of_bytes(2**20 - 1, NEEDS)
    assert num_blocks_of_bytes(5 * 2**20 + 7, NEEDS) == 5


def plan_of(*weights: Recipe, states: list[State], steps: tuple[OpStep, ...] = ()) -> Any:
    """Return the part of a plan that is counted: one instance has all weights but those that steps take."""
    taken = {a["recipe"] for step in steps for a in step.args if "recipe" in a}
    bound = tuple(index for index in range(len(weights)) if index not in taken)
    sizes = {"tokens": (1, 256), "seqs": (1, 8)}
    return SimpleNamespace(recipes=weights, states=states, sizes=sizes, instances=[Instance(0, bound)], steps=steps)


def test_needs_are_counted_from_plan_and_config(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path, "llama"))
    states = [State(f"{i}", (2, "blocks", 16, 2, 16), "bfloat16", "cpu") for i in range(3)]
    embedding, norm = Recipe("a", (131, 64), "bfloat16"), Recipe("b", (64,), "float32")
    gate_up = Recipe("c", (192, 64), "bfloat16")
    needs = memory_needs(plan_of(embedding, norm, gate_up, states=states), config, max_seqs=8)
    assert needs.weights == (131 + 192) * 64 * 2 + 64 * 4
    assert needs.block == 3 * 2 * 16 * 2 * 16 * 2
    assert needs.activations == (256 * (2 * 64 + 192) + 8 * 131) * 6


def test_recurrent_states_are_counted_for_every_sequence(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path, "bamba"))
    states = [
        State("a", (2, "blocks", 16, 2, 16), "bfloat16", "cpu"),
        State("b", ("state_slots", 8, 3), "bfloat16", "cpu"),
        State("c", ("state_slots", 4, 8, 6), "float32", "cpu"),
    ]
    needs = memory_needs(plan_of(states=states), config, max_seqs=5)
    assert (needs.block, needs.states) == (2 * 16 * 2 * 16 * 2, 5 * (8 * 3 * 2 + 4 * 8 * 6 * 4))
    assert needs.activations == 8 * 131 * 6  # as bfloat16 and float32: what states are kept in is not what is computed
    assert num_blocks_in(Memory(total=64, free=64), MemoryNeeds(16, 16, block=2, states=8), fraction=1.0) == 12


def test_of_experts_those_are_counted_that_a_token_chooses(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path, "mixtral", num_experts_per_tok=3))
    states = [State("s", (2, "blocks", 16, 2, 16), "bfloat16", "cpu")]
    embedding, experts = Recipe("a", (131, 64), "bfloat16"), Recipe("b", (4, 192, 64), "bfloat16")
    step = OpStep("aten::_grouped_mm", ({"slot": 0}, {"recipe": 1}), {}, (1,))
    needs = memory_needs(plan_of(embedding, experts, states=states, steps=(step,)), config, max_seqs=8)
    assert needs.activations == (256 * (2 * 64 + 3 * 192) + 8 * 131) * 6


def test_this_machine_says_how_much_is_free() -> None:
    memory = read_memory("cpu")
    assert 0 < memory.free <= memory.total


def write_cgroup(root: Path, *, limit: str) -> None:
    (root / "memory.max").write_text(f"{limit}\n")
    (root / "memory.current").write_text("600\n")
    (root / "memory.stat").write_text("anon 300\ninactive_file 150\nactive_file 50\n")


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_memory, "_CGROUP", tmp_path)
    host = read_memory("cpu")
    write_cgroup(tmp_path, limit="max")
    assert read_memory("cpu").total == host.total
    write_cgroup(tmp_path, limit="1000")
    assert read_memory("cpu") == Memory(total=1000, free=600)


def test_where_nobody_knows_how_much_is_free_it_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_memory, "_MEMINFO", tmp_path / "none")
    with pytest.raises(CapacityError, match="give the KV cache's bytes"):
        read_memory("cpu")


def test_experts_in_a_piece_compute_every_token(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path, "llama4_text"))
    states = [State("s", (2, "blocks", 16, 2, 16), "bfloat16", "cpu")]
    embedding, experts = Recipe("a", (131, 64), "bfloat16"), Recipe("b", (4, 64, 192), "bfloat16")
    needs = memory_needs(plan_of(embedding, experts, states=states), config, max_seqs=8)
    assert needs.activations == (256 * (2 * 64 + 4 * 192) + 8 * 131) * 6


def test_latents_are_what_a_token_of_a_latent_model_takes(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path, "deepseek_v3"))
    request = build_causal_lm(ModelSpec.of(tmp_path, dtype="bfloat16", max_tokens=256))
    states = [State(name, given.shape, given.dtype, "cpu") for name, given in request.states.items()]
    needs = memory_needs(plan_of(states=states), config, max_seqs=8)
    latents, rotary, layers = 32, 8, 3
    assert needs.block == 16 * (latents + rotary) * 2 * layers
    heads, expanded = 4, 4 * (16 + 12)
    numbers = 256 * expanded + 8 * (131 + 2 * heads * 32) + CONTEXT_CHUNK * (40 + 2 * expanded)
    assert needs.activations == numbers * 6
