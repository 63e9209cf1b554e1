"""Models with quantized weights, run eagerly, against the model of the weights that these stand for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

import piecework
from piecework.bundle.plan import Recipe
from piecework.bundle.run.constants import as_source, make_constants
from piecework.errors import UnsupportedModelError
from piecework.models.adapter import build_causal_lm
from piecework.models.checkpoint import open_checkpoint
from piecework.models.quantized import QuantizedLinear
from piecework.models.weight_check import wanted_by_module
from piecework.ops.linear_quantized import dequantized
from piecework.spec.model_spec import ModelSpec
from tests.choice import slow_but
from tests.unit.models.batches import Part, error, expected, run
from tests.unit.models.quantized_layouts import PUBLISHED
from tests.unit.models.tiny import EagerModel, reference_model, write_config

STEP = [Part(torch.arange(3, 43), 40, [1, 3, 2])]
DEMO = Path(piecework.__file__).parent / "demo_model"


def quantized_model(spec: ModelSpec, weights: Any) -> EagerModel:
    """Return a model whose parameters are made of a checkpoint's tensors by their recipes."""
    request = build_causal_lm(spec)
    parameters = dict(request.module.named_parameters())
    recipes = [
        Recipe(name, tuple(p.shape), str(p.dtype).removeprefix("torch."), source=request.sources.get(name))
        for name, p in parameters.items()
    ]
    made = make_constants(recipes, source=as_source(weights), literals={}, device="cpu")
    state = dict(zip(parameters, made, strict=True))
    tied = request.module.state_dict().keys() - state.keys()
    model = EagerModel(request, {**state, **dict.fromkeys(tied, state["model.embed_tokens.weight"])})
    model.make_states({"blocks": 40})
    return model


def linear_weights(reference: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the layers' linear modules by the module's name."""
    found = {}
    for name, part in reference.named_modules():
        if isinstance(part, nn.Linear) and name != "lm_head":
            found[name] = part.weight.detach()
    return found


@pytest.mark.parametrize("layout", PUBLISHED)
def test_a_published_layout_is_read_as_it_is(tmp_path: Path, layout: str) -> None:
    config, write = PUBLISHED[layout]
    plain = write_config(tmp_path / "plain", "llama", num_hidden_layers=1)
    reference = reference_model(plain)
    stored = {f"{name}": tensor.clone() for name, tensor in reference.state_dict().items()}
    for name, weight in linear_weights(reference).items():
        written = write(weight.clone())
        del stored[f"{name}.weight"]
        stored |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in written.tensors.items()}
        weight.copy_(written.weight)
    model_dir = write_config(tmp_path / "quantized", "llama", num_hidden_layers=1, quantization_config=config)
    save_file(stored, model_dir / "model.safetensors")
    spec = ModelSpec.of(model_dir, max_tokens=64)
    checkpoint = open_checkpoint(model_dir, wanted_by_module(build_causal_lm(spec)))
    model = quantized_model(spec, checkpoint)
    assert error(run(model, STEP), expected(reference, STEP)) <= 1e-5


@pytest.mark.parametrize(("weights", "most"), [("int8", 0.007), ("int4", 0.09), ("fp8", 0.04)])
@pytest.mark.parametrize("family", slow_but(["llama", "qwen2", "phi3", "mixtral"], "qwen2"))
def test_any_checkpoint_is_quantized_when_it_is_bound(tmp_path: Path, family: str, weights: str, most: float) -> None:
    model_dir = write_config(tmp_path, family, vocab_size=160)
    reference = reference_model(model_dir)
    model = quantized_model(ModelSpec.of(model_dir, max_tokens=64, weights_dtype=weights), reference)
    layers = dict(model.request.module.named_modules())
    for name, linear in reference.named_modules():
        if isinstance(linear, nn.Linear):
            layer = layers[name]
            assert isinstance(layer, QuantizedLinear)
            meant = dequantized(layer.values, layer.scales, layer.offsets)
            assert 0 < float((meant - linear.weight).norm() / linear.weight.norm()) <= most
            linear.weight = nn.Parameter(meant, requires_grad=False)  # a head that is the embedding has its own now
    assert error(run(model, STEP), expected(reference, STEP)) <= 1e-5


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"quant_method": "gptq", "bits": 8, "group_size": 32}, "quantization_config.bits 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, "quantization_config.desc_act True"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "quantization_config.version 'gemv'"),
        ({"quant_method": "awq", "bits": 4, "group_size": "all"}, "quantization_config.group_size 'all'"),
        ({"quant_method": "bitsandbytes"}, "quantization_config.quant_method 'bitsandbytes'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "quantization_config.weight_block_size [128]"),
        ({**PUBLISHED["W4A16"][0], "config_groups": {}}, "quantization_config.config_groups []"),
        ({**PUBLISHED["W4A16"][0], "format": "marlin-24"}, "quantization_config.format 'marlin-24'"),
        ("int4", "quantization_config 'int4'"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, changes: Mapping[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedModelError) as found:
        ModelSpec.of(write_config(tmp_path, "llama", quantization_config=changes))
    assert field in found.value.found


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path: Path) -> None:
    model_dir = write_config(tmp_path, "llama", quantization_config=PUBLISHED["awq"][0])
    with pytest.raises(UnsupportedModelError, match="quantized already"):
        ModelSpec.of(model_dir, weights_dtype="int8")


def test_groups_that_do_not_divide_a_row_are_refused(tmp_path: Path) -> None:
    config = {**PUBLISHED["awq"][0], "group_size": 40}
    spec = ModelSpec.of(write_config(tmp_path, "llama", quantization_config=config))
    with pytest.raises(UnsupportedModelError, match="groups of 40 columns"):
        build_causal_lm(spec)


def test_experts_of_a_quantized_checkpoint_are_refused(tmp_path: Path) -> None:
    spec = ModelSpec.of(write_config(tmp_path, "mixtral", quantization_config=PUBLISHED["W8A8"][0]))
    with pytest.raises(UnsupportedModelError, match="experts"):
        build_causal_lm(spec)


TOPICS = ("class", "global", "import", "lambda", "raise", "with")
"""Pages of Python's own documentation: the kind of text that the demo model continues."""


@pytest.fixture(scope="module")
def exact() -> float:
    return perplexity(quantized_model(ModelSpec.of(DEMO, max_tokens=512, dtype="float32"), _demo_weights()))


@pytest.mark.parametrize(("weights", "most"), [("int8", 1.01), ("int4", 1.04), ("fp8", 1.02)])
def test_texts_of_its_kind_are_about_as_likely(exact: float, weights: str, most: float) -> None:
    spec = ModelSpec.of(DEMO, max_tokens=512, dtype="float32", weights_dtype=weights)
    assert perplexity(quantized_model(spec, _demo_weights())) <= exact * most


def perplexity(model: EagerModel) -> float:
    """Return the perplexity of the beginnings of some texts, whose first token is given."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    losses = []
    for topic in TOPICS:
        tokens = torch.tensor(tokenizer.encode(topics[topic][:1300]).ids)
        logits = run(model, [Part(tokens, len(tokens), list(range(1, 33)))])
        losses.append(nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none"))
    return float(torch.cat(losses).mean().exp())


def _demo_weights() -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(DEMO / "model.safetensors")
    return found
