"""Passes over whole models: what each family's spellings become, and that logits stay as without any pass."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import piecework
from piecework.bundle.bundle import Bundle
from piecework.bundle.run import load
from piecework.bundle.store.directory import DirectoryStore
from piecework.compiler.deduplicate import Deduplicated, Forward, deduplicate
from piecework.compiler.driver import capture_variants
from piecework.compiler.model import compile_model
from piecework.compiler.split import split
from piecework.foundation.environment import Environment
from piecework.models.adapter import build_causal_lm
from piecework.ops.ir.provider_order import IR_OPS
from piecework.spec.compile_options import BackendName, CompileOptions
from piecework.spec.latent_config import MLA_MODES
from piecework.spec.model_spec import ModelSpec
from piecework.spec.passes import PASS_NAMES
from tests.choice import one_in, slow_but
from tests.unit.models.tiny import FAMILIES, LATENT_FAMILIES, reference_model, write_config

Compile = Callable[..., Bundle]

ANCHORS = ("aten.rsqrt.default", "aten.silu.default", "aten.gelu.default", "aten.neg.default", "aten.sub.Tensor")
"""Operators that only norms, gates and rotations have in these models."""

SPELLED = {
    "llama": {"rms_norm": 2, "add_rms_norm": 3, "silu_mul": 2, "rotary": 2},
    "mistral": {"rms_norm": 2, "add_rms_norm": 3, "silu_mul": 2, "rotary": 2},
    "qwen2": {"rms_norm": 2, "add_rms_norm": 3, "silu_mul": 2, "rotary": 2},
    "qwen3": {"rms_norm": 6, "add_rms_norm": 3, "silu_mul": 2, "rotary": 2},  # queries and keys have norms too
}
"""Ops in a family's three unique pieces: the last norm's sum is read by nothing else."""


PASS_BY_PASS = ("qwen3", "deepseek_v2_groups", "deepseek_v3_halves")
"""Other families, and other forms of latent attention, differ in what no pass looks at."""


@pytest.fixture
def compile_tiny(home: Path) -> Compile:
    def made(model_dir: Path, *, backend: BackendName = BackendName.EAGER, **options: Any) -> Bundle:
        return compile_model(
            ModelSpec.of(model_dir, dtype="float32", max_tokens=64, backend=backend, **options),
            store=DirectoryStore(home),
            environment=Environment(store_root=home),
            check_weights=False,
        ).bundle

    return made


def _pieces(model_dir: Path, *, dtype: str, mla: str = "exposed") -> Deduplicated:
    request = build_causal_lm(ModelSpec.of(model_dir, dtype=dtype, max_tokens=64, mla=mla))
    paths = [Forward(captured, split(captured), variant) for captured, variant in capture_variants(request)]
    return deduplicate(paths, passes=PASS_NAMES)


def _ops(pieces: Deduplicated) -> Counter[str]:
    called = [call.target.split(".")[1] for unique in pieces.unique for call in unique.program.calls]
    return Counter(name for name in called if name in IR_OPS)


def _left(pieces: Deduplicated) -> list[str]:
    return [call.target for unique in pieces.unique for call in unique.program.calls if call.target in ANCHORS]


@pytest.mark.parametrize(("family", "dtype"), one_in(2, FAMILIES, ["float32", "bfloat16"]))
def test_every_norm_activation_and_rotation_is_an_op(family: str, dtype: str, tmp_path: Path) -> None:
    pieces = _pieces(write_config(tmp_path, family), dtype=dtype)
    assert _ops(pieces) == SPELLED[family]
    assert _left(pieces) == []
    misses = [why for unique in pieces.unique for found in unique.passes for why in found.near_misses]
    assert len(misses) == 1
    assert misses[0].endswith("nothing else reads the sum")


@pytest.mark.parametrize(("family", "mla", "dtype"), one_in(4, LATENT_FAMILIES, MLA_MODES, ["float32", "bfloat16"]))
def test_latent_families_have_ops_too(family: str, mla: str, dtype: str, tmp_path: Path) -> None:
    """Exposed, the attention cores rotate queries."""
    pieces = _pieces(write_config(tmp_path, family), dtype=dtype, mla=mla)
    assert _left(pieces) == []
    ops = _ops(pieces)
    assert set(ops) == {"rms_norm", "add_rms_norm", "silu_mul"} | ({"rotate_pairs"} if mla == "opaque" else set())
    assert all(count >= 2 for count in ops.values())


def test_origins_are_the_spellings_calls(tmp_path: Path) -> None:
    pieces = _pieces(write_config(tmp_path, "llama"), dtype="bfloat16")
    assert len(pieces.unique) == 3
    for unique in pieces.unique:
        made = unique.lowered
        assert len(made.origins) == len(made.program.calls)
        for call, origins in zip(made.program.calls, made.origins, strict=True):
            stood = {unique.captured.calls[number].target for number in origins}
            if "rms_norm" in call.target:
                assert {"aten.rsqrt.default", "aten.mean.dim", "aten._to_copy.default"} <= stood
            elif "silu_mul" in call.target:
                assert stood == {"aten.silu.default", "aten.mul.Tensor"}
            elif "rotary" in call.target:
                assert {"aten.neg.default", "aten.cat.default", "aten.mul.Tensor", "aten.add.Tensor"} <= stood
            elif call.target != "operator.getitem":
                assert stood <= {call.target, "piecework.linear.default"}


def _logits(bundle: Bundle, weights: Any) -> list[Tensor]:
    """Return the logits of a prompt of 21 tokens, and of the 22nd."""
    model = load(bundle, weights=weights)
    model.make_states({"blocks": 8})
    ids = torch.randint(5, 130, (22,), generator=torch.Generator().manual_seed(1))
    found = []
    for begin, end in ((0, 21), (21, 22)):
        inputs: dict[str, Any] = {
            "input_ids": ids[begin:end],
            "positions": torch.arange(begin, end),
            "slot_mapping": torch.arange(16 + begin, 16 + end),
            "block_tables": torch.arange(1, 3)[None],
            "seq_lens": torch.tensor([end]),
            "query_start": torch.tensor([0, end - begin]),
            "logits_indices": torch.arange(end - begin),
            "num_decode_tokens": int(end - begin == 1),
            "num_prefill_tokens": 0 if end - begin == 1 else end - begin,
        }
        found.append(model.run({name: inputs[name] for name in (given.name for given in model.plan.inputs)})[0])
    model.close()
    return found


def _weights(model_dir: Path) -> Path:
    model: Any = reference_model(model_dir)
    model.save_pretrained(model_dir)
    return model_dir / "model.safetensors"


def _assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def _applied(bundle: Bundle) -> set[str]:
    """Return the passes that found something in the bundle's pieces."""
    explained = json.loads((bundle.path / "explain.json").read_text())
    return {found["name"] for reports in explained["passes"] for found in reports if found["matches"]}


@pytest.mark.parametrize("family", slow_but([*FAMILIES, *LATENT_FAMILIES], "qwen3", "deepseek_v2_groups"))
def test_logits_are_the_same_with_all_passes_as_with_none(family: str, compile_tiny: Compile, tmp_path: Path) -> None:
    weights = _weights(write_config(tmp_path, family))
    wanted = _logits(compile_tiny(tmp_path, passes_off=frozenset(PASS_NAMES)), weights)
    every = compile_tiny(tmp_path)
    assert {"no_ops", "rms_norm", "silu_mul", "add_rms_norm", "merge_linear"} <= _applied(every)
    _assert_close(_logits(every, weights), wanted)


@pytest.mark.parametrize("family", slow_but(PASS_BY_PASS, seldom=PASS_BY_PASS[1:]))
def test_logits_are_the_same_without_any_one_pass(family: str, compile_tiny: Compile, tmp_path: Path) -> None:
    weights = _weights(write_config(tmp_path, family))
    every = compile_tiny(tmp_path)
    wanted = _logits(every, weights)
    applied = sorted(_applied(every))
    assert len(applied) >= 5
    for name in applied:
        without = compile_tiny(tmp_path, passes_off=frozenset({name}))
        _assert_close(_logits(without, weights), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3"])
def test_native_code_gives_the_same_logits(family: str, compile_tiny: Compile, tmp_path: Path) -> None:
    weights = _weights(write_config(tmp_path, family))
    on, off = (
        _logits(compile_tiny(tmp_path, backend=BackendName.AOTI, passes_off=frozenset(names)), weights)
        for names in ((), PASS_NAMES)
    )
    _assert_close(on, off)


def test_a_bundle_says_what_each_pass_did(compile_tiny: Compile, tmp_path: Path) -> None:
    write_config(tmp_path, "llama")
    bundle = compile_tiny(tmp_path, passes_off=frozenset({"rotary", "merge_linear"}))
    explained = json.loads((bundle.path / "explain.json").read_text())
    for reports in explained["passes"]:
        names = [found["name"] for found in reports]
        assert names == [name for name in PASS_NAMES if name not in {"rotary", "merge_linear"}]
    assert sum(len(found["matches"]) for found in explained["passes"][1]) == 5
    assert ("option", "passes_off", "rotary,merge_linear") in {(f.kind, f.name, f.value) for f in bundle.facts}
    sites = explained["ir_ops"][1]
    assert [site["op"] for site in sites] == ["add_rms_norm", "silu_mul", "add_rms_norm"]
    assert sites[1]["origins"] == [12, 14]


class _Norm(nn.Module):
    """An RMS norm that somebody wrote by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        mean_of_squares = (x * x).mean(dim=2, keepdim=True)
        return x * torch.rsqrt(mean_of_squares + 1e-5) * self.scale


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _Norm(width)
        self.both = nn.Linear(width, 4 * width)
        self.down = nn.Linear(2 * width, width)
        self.last = nn.RMSNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = self.both(self.norm(x)).chunk(2, dim=-1)
        x = x + self.down(nn.functional.gelu(gate) * up)
        return self.last(x), x


@pytest.mark.parametrize("backend", slow_but([BackendName.EAGER, BackendName.AOTI], BackendName.EAGER))
def test_a_users_own_module(backend: BackendName, home: Path, tmp_path: Path) -> None:
    module = _Block(16).eval()
    bundle = piecework.compile(
        module,
        (torch.randn(1, 4, 16),),
        dynamic={"rows": piecework.Dim(1, 64, axes={"x": 1})},
        options=CompileOptions(backend=backend),
        out=tmp_path / "b",
    )
    explained = json.loads((tmp_path / "b" / "explain.json").read_text())
    assert [site["op"] for site in explained["ir_ops"][0]] == ["rms_norm", "gelu_mul", "add_rms_norm"]
    loaded = piecework.load(bundle, weights=module)
    x = torch.randn(1, 7, 16)
    for found, wanted in zip(loaded(x), module(x), strict=True):
        torch.testing.assert_close(found, wanted)
