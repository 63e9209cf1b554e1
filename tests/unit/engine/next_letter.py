"""A model directory, and a bundle that is written by hand: one operator, which continues every letter with the next."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from piecework.bundle import Bundle, BundleContent, config_facts, environment_facts, write_bundle
from piecework.bundle.facts import making_facts
from piecework.bundle.plan import OpStep, Plan, PlanInput, Recipe, State
from piecework.bundle.record import Record
from piecework.spec.model_spec import ModelSpec

VOCAB = 60
END = 26
BLOCK_BYTES = 2 * 16 * 1 * 4 * 4
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": VOCAB,
    "eos_token_id": END,
    "max_position_embeddings": 64,
}


@torch.library.custom_op("pwllm::next_letter", mutates_args=())
def next_letter(tokens: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    assert weight.shape == (2, 3)
    return torch.nn.functional.one_hot((tokens[wanted] + 1) % VOCAB, VOCAB).float()


PLAN = Plan(
    sizes={"tokens": (1, 8), "seqs": (1, 4), "blocks": (1, 1 << 30)},
    primary="tokens",
    inputs=(
        PlanInput("input_ids", shape=("tokens",), dtype="int64", device="cpu"),
        PlanInput("logits_indices", shape=("seqs",), dtype="int64", device="cpu"),
    ),
    states=(State("kv", (2, "blocks", 16, 1, 4), dtype="float32", device="cpu"),),
    recipes=(Recipe("a.weight", (2, 3), "float32"),),
    pieces=(),
    instances=(),
    steps=(OpStep("pwllm::next_letter", ({"slot": 0}, {"slot": 1}, {"recipe": 0}), {}, (2,)),),
    num_slots=3,
    output_slots=(2,),
    structure={"leaf": 0},
)


def write_model_dir(directory: Path) -> Path:
    """Write config.json and a tokenizer of letters."""
    alphabet = {chr(ord("a") + i): i for i in range(26)} | {"</s>": END}
    tokenizer = HuggingFaceTokenizer(models.WordLevel(alphabet, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def letter_content(spec: ModelSpec) -> BundleContent:
    """Return the bundle of a spec of that directory."""
    config = config_facts(spec.config.raw, spec.config.raw)
    facts = (*environment_facts(), *making_facts(), *spec.facts, *config)
    return BundleContent(plan=PLAN.to_json(), artifacts={}, facts=facts, record=Record())


def write_letter_bundle(model_dir: Path) -> Bundle:
    """Write the bundle beside the model's files, as its default options have it."""
    return write_bundle(model_dir / "bundle", letter_content(ModelSpec.of(model_dir)))
