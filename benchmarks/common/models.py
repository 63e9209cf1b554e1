"""Models with random weights, written as directories in Hugging Face layout: Llamas, and DeepSeeks of dense MLPs."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from piecework.errors import RequestError

MAX_POSITIONS: Final = 2048
BOS: Final = 256  # a token per byte comes first
EOS: Final = 257
_SEED: Final = 0

Sizes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shape(ABC):
    """The sizes of a model, apart from its layers: of hidden states, heads, the MLPs' inner width, the vocabulary."""

    hidden: int = 256
    heads: int = 4
    intermediate: int = 512
    vocab: int = 1024

    def __post_init__(self) -> None:
        if self.vocab < EOS + 1:
            raise RequestError(
                asked=f"a vocabulary of {self.vocab} tokens",
                found="256 bytes and two special tokens don't fit in",
                try_=f"--vocab {EOS + 1} or more",
            )

    def config(self, *, layers: int, dtype: str) -> dict[str, Any]:
        """Return the model's config.json."""
        return {
            **self._own_config(layers),
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": MAX_POSITIONS,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "dtype": dtype,
        }

    def weights(self, *, layers: int) -> Sizes:
        """Return the shape of every tensor of the checkpoint, by name."""
        hidden, wide = self.hidden, self.intermediate
        block = {
            "input_layernorm": (hidden,),
            **self._attention_weights(),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }
        return {
            "model.embed_tokens.weight": (self.vocab, hidden),
            **{f"model.layers.{layer}.{name}.weight": size for layer in range(layers) for name, size in block.items()},
            "model.norm.weight": (hidden,),
            "lm_head.weight": (self.vocab, hidden),
        }

    @abstractmethod
    def _own_config(self, layers: int) -> dict[str, Any]: ...

    @abstractmethod
    def _attention_weights(self) -> Sizes: ...


@dataclass(frozen=True)
class LlamaShape(Shape):
    """The sizes of a Llama."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise RequestError(
                asked=f"a model of hidden size {self.hidden} with {self.heads} heads",
                found="heads of unequal or odd size",
                try_="a hidden size that is an even multiple of the number of heads",
            )

    def _own_config(self, layers: int) -> dict[str, Any]:
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}

    def _attention_weights(self) -> Sizes:
        return {f"self_attn.{name}_proj": (self.hidden, self.hidden) for name in "qkvo"}


@dataclass(frozen=True)
class LatentShape(Shape):
    """The sizes of a DeepSeek-V2, in which every layer's MLP is dense.

    Args:
        kv_rank: of the latent vector that is cached.
        rope, nope: rotary dimensions of a head's queries and keys, and those without position.
        value: dimensions of a head's values.
    """

    kv_rank: int = 512
    rope: int = 64
    nope: int = 128
    value: int = 128

    def _own_config(self, layers: int) -> dict[str, Any]:
        """Name experts as well, because the format wants them; no layer has any."""
        return {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "q_lora_rank": None,
            "kv_lora_rank": self.kv_rank,
            "qk_rope_head_dim": self.rope,
            "qk_nope_head_dim": self.nope,
            "v_head_dim": self.value,
            "first_k_dense_replace": layers,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 256,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "rope_scaling": None,
            "attention_bias": False,
        }

    def _attention_weights(self) -> Sizes:
        return {
            "self_attn.q_proj": (self.heads * (self.nope + self.rope), self.hidden),
            "self_attn.kv_a_proj_with_mqa": (self.kv_rank + self.rope, self.hidden),
            "self_attn.kv_a_layernorm": (self.kv_rank,),
            "self_attn.kv_b_proj": (self.heads * (self.nope + self.value), self.kv_rank),
            "self_attn.o_proj": (self.hidden, self.heads * self.value),
        }


@dataclass(frozen=True)
class RandomModel:
    """A model of so many layers of a shape."""

    name: str
    layers: int
    shape: Shape

    def write(self, directory: Path, *, dtype: str, weights: bool = True) -> Path:
        """Write config, tokenizer and, unless left out, weights of a fixed seed into a new directory; return it."""
        write_config(directory, self.shape.config(layers=self.layers, dtype=dtype))
        if weights:
            write_weights(directory, sizes=self.shape.weights(layers=self.layers), dtype=dtype)
        return directory


TINY_LATENT: Final = LatentShape(64, 2, 128, 1024, kv_rank=32, rope=16, nope=32, value=32)
RANDOM_MODELS: Final[Mapping[str, RandomModel]] = {
    model.name: model
    for model in (
        RandomModel("llama-tiny", 2, LlamaShape(64, 2, 128, 1024)),
        RandomModel("llama-100m", 12, LlamaShape(768, 12, 2048, 32000)),
        RandomModel("mla-tiny", 2, TINY_LATENT),
        RandomModel("mla-100m", 12, LatentShape(768, 6, 2048, 32000)),
    )
}


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write config.json and the tokenizer's files into a new directory."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_tokenizer(directory, vocab=config["vocab_size"])


def write_weights(directory: Path, *, sizes: Sizes, dtype: str) -> None:
    """Write model.safetensors: tensors of these shapes, by name; their values are a seed's, whatever the dtype."""
    import torch  # only who writes a model needs it
    from safetensors.torch import save_file

    from piecework.models.checkpoint import TensorMeta, random_checkpoint

    made = random_checkpoint({n: TensorMeta(s, getattr(torch, dtype)) for n, s in sizes.items()}, seed=_SEED)
    save_file({name: made.get(name) for name in sizes}, directory / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(directory: Path, *, vocab: int) -> None:
    """Write a byte-level tokenizer without merges: 256 bytes, two special tokens, and fillers that text never gives."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

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
