"""A Llama of any shape with random weights, written as a directory in Hugging Face layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from piecework.errors import RequestError

MAX_POSITIONS: Final = 2048
_NUM_BYTES: Final = 256
BOS: Final = _NUM_BYTES
EOS: Final = _NUM_BYTES + 1
_SEED: Final = 0


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Llama, apart from its layers."""

    hidden: int = 256
    heads: int = 4
    intermediate: int = 512
    vocab: int = 1024

    def __post_init__(self) -> None:
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise RequestError(
                asked=f"a model of hidden size {self.hidden} with {self.heads} heads",
                found="heads of unequal or odd size",
                try_="a hidden size that is an even multiple of the number of heads",
            )
        if self.vocab < EOS + 1:
            raise RequestError(
                asked=f"a vocabulary of {self.vocab} tokens",
                found="256 bytes and two special tokens don't fit in",
                try_=f"--vocab {EOS + 1} or more",
            )


def write_llama(directory: Path, *, shape: ModelShape, layers: int, dtype: str) -> Path:
    """Write config.json, model.safetensors and the tokenizer's files into a new directory, and return it.

    Args:
        directory: what to make.
        shape: sizes.
        layers: number of layers.
        dtype: of the weights, "float32" or "bfloat16". The values are those of a fixed seed, whatever the dtype.
    """
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config(shape, layers=layers, dtype=dtype), indent=1) + "\n")
    write_weights(directory, shapes=weight_shapes(shape, layers=layers), dtype=dtype)
    write_tokenizer(directory, vocab=shape.vocab)
    return directory


def config(shape: ModelShape, *, layers: int, dtype: str) -> dict[str, object]:
    """Return the model's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "dtype": dtype,
    }


def weight_shapes(shape: ModelShape, *, layers: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the checkpoint, by name."""
    hidden, wide = shape.hidden, shape.intermediate
    block = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    return {
        "model.embed_tokens.weight": (shape.vocab, hidden),
        **{f"model.layers.{layer}.{name}.weight": size for layer in range(layers) for name, size in block.items()},
        "model.norm.weight": (hidden,),
        "lm_head.weight": (shape.vocab, hidden),
    }


def write_weights(directory: Path, *, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    """Write model.safetensors: tensors of these shapes, by name, with the values of a fixed seed."""
    import torch  # noqa: PLC0415  only who writes a model needs it
    from safetensors.torch import save_file  # noqa: PLC0415

    from piecework.models.checkpoint import TensorMeta, random_checkpoint  # noqa: PLC0415

    made = random_checkpoint({n: TensorMeta(s, getattr(torch, dtype)) for n, s in shapes.items()}, seed=_SEED)
    save_file({name: made.get(name) for name in shapes}, directory / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(directory: Path, *, vocab: int) -> None:
    """Write a byte-level tokenizer without merges: 256 bytes, two special tokens, and fillers that text never gives."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415

    tokens = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokens |= {"<s>": BOS, "</s>": EOS}
    tokens |= {f"<f{index}>": index for index in range(EOS + 1, vocab)}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")
