"""What a model directory says about its model, read without transformers and without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from piecework.errors import UnsupportedModelError
from piecework.spec.encoder_config import EncoderConfig, Task, read_encoder
from piecework.spec.json_file import read_json_file
from piecework.spec.latent_config import (
    LATENT_MODEL_TYPES,
    ExpertRouting,
    LatentSizes,
    expert_routing,
    latent_sizes,
)
from piecework.spec.other_models import refuse_others
from piecework.spec.quantization import Quantization, read_quantization
from piecework.spec.sampling_defaults import read_generation_config

_LAYERS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_LONGEST: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_DEFAULT_LONGEST: Final = 2048
DTYPES: Final = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelConfig:
    """The part of config.json and generation_config.json that a warm start needs.

    Attributes:
        path: the model directory.
        raw: config.json as it stands.
        model_type: "llama", ...
        architecture: the class that transformers would build, "LlamaForCausalLM".
        num_layers: of its stack, 0 where config.json has no name for it that is known here.
        vocab_size: how many tokens there are.
        max_positions: longest sequence the positions are made for, in tokens.
        dtype: the weights' type as the checkpoint's author gives it, one of DTYPES.
        eos_token_ids: tokens that end a generation.
        tie_word_embeddings: whether the output projection is the embedding.
        encoder: how its texts become vectors or scores, or None where it continues texts.
        latent: sizes of its latent attention, or None where keys and values are cached as they are.
        experts: how tokens choose among experts, or None where all layers are dense.
        quantization: how the checkpoint's linear weights are quantized, or None where they aren't.
        read: the fields of config.json that all this was read from.
    """

    path: Path
    raw: Mapping[str, Any]
    model_type: str
    architecture: str
    num_layers: int
    vocab_size: int
    max_positions: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    tie_word_embeddings: bool
    encoder: EncoderConfig | None = None
    latent: LatentSizes | None = None
    experts: ExpertRouting | None = None
    quantization: Quantization | None = None
    read: frozenset[str] = frozenset()

    @property
    def task(self) -> Task:
        """What it does with texts."""
        return Task.GENERATE if self.encoder is None else self.encoder.task

    @property
    def weight_folders(self) -> tuple[str, ...]:
        """Folders of the directory that have weights of their own."""
        return () if self.encoder is None else tuple(layer.path for layer in self.encoder.dense)


def read_config(model_dir: Path) -> ModelConfig:
    """Read a model directory in Hugging Face layout.

    Raises UnsupportedModelError where config.json is missing or broken, or its model neither continues texts nor
    encodes them.
    """
    asked = f"the model in {model_dir}"
    refuse_others(model_dir, asked=asked)
    raw = read_json_file(model_dir / "config.json", asked=asked)
    fields = _Fields(raw)
    model_type, architecture = _architecture(fields, asked=asked)
    try:
        config = _model_config(model_dir, fields, model_type, architecture)
        encoder = read_encoder(model_dir, fields, architecture, max_positions=config.max_positions, asked=asked)
        if encoder is None:
            _check_causal_lm(architecture, asked=asked)
        quantization = read_quantization(fields, asked=asked)
        return replace(config, encoder=encoder, quantization=quantization, raw=raw, read=frozenset(fields.read))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UnsupportedModelError(
            asked=asked,
            found=f"config.json lacks a field or holds a wrong value: {type(error).__name__} {error}",
            try_="compare it with the config.json of the model it was made from",
        ) from error


class _Fields(Mapping[str, Any]):
    """A config.json that notes which of its fields were asked for, absent ones included."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return self._raw[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._raw)

    def __len__(self) -> int:
        return len(self._raw)


def _architecture(raw: Mapping[str, Any], *, asked: str) -> tuple[str, str]:
    """Return model type and architecture, or raise UnsupportedModelError."""
    model_type = raw.get("model_type")
    if not (isinstance(model_type, str) and model_type):
        raise UnsupportedModelError(
            asked=asked,
            found=f"model_type {model_type!r}" if model_type else "config.json names no model_type",
            try_='what transformers writes there, such as "model_type": "llama"',
        )
    architectures = raw.get("architectures")
    if not (isinstance(architectures, list) and architectures and isinstance(architectures[0], str)):
        raise UnsupportedModelError(
            asked=asked,
            found='config.json names no "architectures"',
            try_='add what transformers writes there, such as "architectures": ["LlamaForCausalLM"]',
        )
    return model_type, architectures[0]


def _check_causal_lm(architecture: str, *, asked: str) -> None:
    if not architecture.endswith("ForCausalLM"):
        raise UnsupportedModelError(
            asked=asked,
            found=f"architecture {architecture}, which is neither a causal language model nor an encoder",
            try_="a checkpoint whose architecture ends in ForCausalLM, ForMaskedLM, ForSequenceClassification or "
            "Model, or piecework.compile for the module as it is",
        )


def _model_config(model_dir: Path, raw: Mapping[str, Any], model_type: str, architecture: str) -> ModelConfig:
    latent = model_type in LATENT_MODEL_TYPES
    return ModelConfig(
        path=model_dir,
        raw=raw,
        model_type=model_type,
        architecture=architecture,
        num_layers=next((int(raw[name]) for name in _LAYERS if raw.get(name)), 0),
        vocab_size=int(raw["vocab_size"]),
        max_positions=next((int(raw[name]) for name in _LONGEST if raw.get(name)), _DEFAULT_LONGEST),
        dtype=_dtype(raw),
        eos_token_ids=_eos_token_ids(model_dir, raw),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        latent=latent_sizes(raw) if latent else None,
        experts=expert_routing(raw, model_type) if latent else None,
    )


def _dtype(raw: Mapping[str, Any]) -> str:
    """Return the declared type of the weights; float32 where none is, as transformers has it."""
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    return str(dtype)


def _eos_token_ids(model_dir: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the stop tokens of generation_config.json, or of config.json where that names none."""
    value = read_generation_config(model_dir).get("eos_token_id", raw.get("eos_token_id"))
    if value is None:
        return ()
    return tuple(int(token) for token in value) if isinstance(value, list) else (int(value),)
