"""What a checkpoint must have, in all the forms in which transformers reads it, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from piecework.bundle.recipes import Concat, Stack, Take
from piecework.errors import WeightsError
from piecework.models.adapter import build_causal_lm
from piecework.models.checkpoint import open_checkpoint
from piecework.models.weight_check import Wanted, find_wanted, wanted_by_module
from piecework.spec.model_spec import ModelSpec
from piecework.spec.weight_files import weight_files
from tests.unit.models.tiny import write_config

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, Tensor]


def saved(model_dir: Path, change: Callable[[Tensors], Tensors] = lambda tensors: tensors) -> tuple[Wanted, ...]:
    """Write random weights as `change` has them, and return what the model wants."""
    request = build_causal_lm(ModelSpec.of(model_dir, max_tokens=16))
    generator = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in request.module.named_parameters()}
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    save_file(change(tensors), model_dir / "model.safetensors")
    return wanted_by_module(request)


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return write_config(tmp_path, "qwen2", num_hidden_layers=1)


FORMS: dict[str, Callable[[Tensors], Tensors]] = {
    "without the head": lambda tensors: tensors,
    "with the head": lambda tensors: {**tensors, HEAD: tensors[EMBEDDING].clone()},
    "under the head's name": lambda tensors: {HEAD if n == EMBEDDING else n: t for n, t in tensors.items()},
    "of the base model": lambda tensors: {n.removeprefix("model."): t for n, t in tensors.items()},
    "in float16": lambda tensors: {n: t.half() for n, t in tensors.items()},
    "with others": lambda tensors: {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
}


@pytest.mark.parametrize("form", FORMS)
def test_what_transformers_reads_is_read_alike(form: str, tied: Path) -> None:
    wanted = saved(tied, FORMS[form])
    expected = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32).state_dict()
    checkpoint = open_checkpoint(tied, wanted)
    names = [one.source.name for one in wanted if isinstance(one.source, Take)]
    assert EMBEDDING in names
    for name in names:
        torch.testing.assert_close(checkpoint.get(name).float(), expected[name], rtol=0, atol=0)


def test_a_head_that_is_no_embedding_is_refused(tied: Path) -> None:
    wanted = saved(tied, lambda tensors: {**tensors, HEAD: tensors[EMBEDDING] + 0.1})
    with pytest.raises(WeightsError, match=r'"tie_word_embeddings": false'):
        open_checkpoint(tied, wanted)


def test_a_missing_head_is_refused(tmp_path: Path) -> None:
    wanted = saved(write_config(tmp_path, "llama"), lambda tensors: {n: t for n, t in tensors.items() if n != HEAD})
    with pytest.raises(WeightsError, match=r'"tie_word_embeddings": true'):
        open_checkpoint(tmp_path, wanted)


NEEDED = (
    Wanted(Take("a", (2, 3)), "float32"),
    Wanted(Concat((Take("b.0", (4,)), Take("b.1", (4,)))), "bfloat16"),
    Wanted(Stack(Take("e.*.w", (2,)), 2, "e.w"), "float32"),
)
HAS = {
    "a": torch.zeros(2, 3),
    "b.0": torch.zeros(4),
    "b.1": torch.zeros(4),
    "e.0.w": torch.ones(2),
    "e.1.w": torch.ones(2),
}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"a": torch.zeros(3, 2)}, "shape (3, 2)"),
        ({"b.1": torch.zeros(5)}, "shape (5,)"),
        ({"a": None}, "no such tensor in model.safetensors"),
        ({"a": None, "e.1.w": None}, "nor 1 others"),
        ({"a": torch.zeros(2, 3, dtype=torch.int8)}, "int8, as quantized"),
        ({"a": torch.zeros(2, 3, dtype=torch.float8_e4m3fn)}, "float8_e4m3fn, as quantized"),
        ({"a": torch.zeros(2, 3, dtype=torch.uint16)}, "U16, as quantized"),
    ],
)
def test_what_differs_is_named(changes: dict[str, Tensor | None], found: str, tmp_path: Path) -> None:
    save_file(HAS, tmp_path / "model.safetensors")
    assert find_wanted(weight_files(tmp_path), NEEDED).renamed == {}
    save_file({n: t for n, t in {**HAS, **changes}.items() if t is not None}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as error:
        find_wanted(weight_files(tmp_path), NEEDED)
    assert found in error.value.found
    assert error.value.try_


def test_a_stack_may_be_there_as_a_whole(tmp_path: Path) -> None:
    others = {name: tensor for name, tensor in HAS.items() if not name.startswith("e.")}
    save_file({**others, "e.w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    find_wanted(weight_files(tmp_path), NEEDED)
    save_file({**others, "e.w": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"e\.w"):
        find_wanted(weight_files(tmp_path), NEEDED)


def test_names_of_a_larger_model_are_found(tmp_path: Path) -> None:
    inner = {f"text.{name}": tensor for name, tensor in HAS.items()}
    save_file({**inner, "a": HAS["a"].clone(), "vision.c": torch.ones(1)}, tmp_path / "model.safetensors")
    renamed = find_wanted(weight_files(tmp_path), NEEDED).renamed
    assert "a" not in renamed, "what has its name keeps it"
    assert renamed["b.0"] == "text.b.0"
    save_file(
        {**inner, **{f"other.{name}": tensor.clone() for name, tensor in HAS.items()}}, tmp_path / "model.safetensors"
    )
    with pytest.raises(WeightsError, match="tensor a"):  # one of two: nothing says which
        find_wanted(weight_files(tmp_path), NEEDED)


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_norms_of_old_checkpoints_are_found_under_their_names(tmp_path: Path, prefix: str) -> None:
    old = {f"{prefix}x.LayerNorm.gamma": torch.ones(2), f"{prefix}x.LayerNorm.beta": torch.zeros(2)}
    save_file({**old, f"{prefix}x.ls.gamma": torch.ones(3)}, tmp_path / "model.safetensors")
    wanted = [Wanted(Take(f"x.{n}", (2,), f"bert.x.{n}"), "float32") for n in ("LayerNorm.weight", "LayerNorm.bias")]
    checkpoint = open_checkpoint(tmp_path, wanted)
    assert torch.equal(checkpoint.get(f"{prefix}x.LayerNorm.weight"), torch.ones(2))
    assert torch.equal(checkpoint.get(f"{prefix}x.LayerNorm.bias"), torch.zeros(2))
    with pytest.raises(WeightsError, match=r"x\.ls\.weight"):
        open_checkpoint(tmp_path, [Wanted(Take("x.ls.weight", (3,)), "float32")])


def test_a_shard_that_lacks_what_the_index_says_is_refused(tmp_path: Path) -> None:
    save_file(HAS, tmp_path / "one.safetensors")
    index = {"weight_map": dict.fromkeys((*HAS, "f"), "one.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="tensor f"):
        find_wanted(weight_files(tmp_path), NEEDED)


def test_headers_are_read_without_torch(tmp_path: Path) -> None:
    save_file(HAS, tmp_path / "model.safetensors")
    code = (
        "import sys, pathlib; from piecework.models.weight_check import *; from piecework.spec.weight_files import *; "
        f"find_wanted(weight_files(pathlib.Path({str(tmp_path)!r})), [Wanted(Take('a', (2, 3)), 'float32')]); "
        "raise SystemExit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
