"""What a directory says of an encoder: how its tokens become one vector, or one score, for each text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final

from piecework.errors import UnsupportedModelError
from piecework.spec.json_file import read_json_file

_POOLINGS: Final[Mapping[str, str]] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""sentence-transformers' names for poolings, in the order in which several are put side by side."""

ACTIVATIONS: Final = ("Identity", "Tanh", "Sigmoid", "ReLU", "GELU", "SiLU")
_PLAIN: Final = ("Model", "ForMaskedLM", "ForPreTraining")
_SCORES: Final = "ForSequenceClassification"
_NORMALIZE: Final = "normalize"


class Task(Enum):
    """What a model does with texts: continues them, makes a vector of each, or gives a pair of them a score."""

    GENERATE = "generate"
    EMBED = "embed"
    SCORE = "score"


@dataclass(frozen=True)
class Dense:
    """A linear layer behind the pooling: its folder, which has its weights, its sizes and its activation's class."""

    path: str
    in_features: int
    out_features: int
    bias: bool
    activation: str


@dataclass(frozen=True)
class EncoderConfig:
    """How texts become vectors or scores.

    Attributes:
        scores: whether it is a cross-encoder, which gives one score for a pair of texts.
        poolings: what of each text's tokens is put side by side, by sentence-transformers' names; of a cross-encoder,
            what its head takes.
        dense: linear layers after that.
        normalize: whether vectors get length 1.
        activation: the class of what a cross-encoder's score goes through.
        longest: most tokens of a text; what is longer is cut off.
        lower_case: whether texts are written in small letters first.
        prompts: what may be put before texts, by name.
        default_prompt: the name of the one that is, or "".
    """

    scores: bool
    poolings: tuple[str, ...]
    dense: tuple[Dense, ...] = ()
    normalize: bool = False
    activation: str = "Identity"
    longest: int = 512
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""

    @property
    def task(self) -> Task:
        """What it does with texts."""
        return Task.SCORE if self.scores else Task.EMBED

    @property
    def fact(self) -> str:
        """What of this a compile depends on, as text, such as "mean, normalize"."""
        layers = [f"{d.path} {d.in_features}x{d.out_features} bias={d.bias} {d.activation}" for d in self.dense]
        end = [_NORMALIZE] if self.normalize else []
        return ", ".join(["score " + self.activation] * self.scores + [*self.poolings, *layers, *end])


def read_encoder(
    model_dir: Path, raw: Mapping[str, Any], architecture: str, *, max_positions: int, asked: str
) -> EncoderConfig | None:
    """Read how a directory's texts become vectors or scores; None where it is no encoder's.

    Args:
        model_dir: with sentence-transformers' modules.json, or a transformers model alone: the mean of tokens then.
        raw: its config.json.
        architecture: the class that config.json names.
        max_positions: the longest text that its positions are made for.
        asked: for errors.

    Raises UnsupportedModelError for what an encoder can't have here.
    """
    modules = model_dir / "modules.json"
    if architecture.endswith(_SCORES):
        return _cross_encoder(model_dir, raw, max_positions=max_positions, asked=asked)
    if modules.exists():
        return _sentence_transformer(model_dir, max_positions=max_positions, asked=asked)
    if architecture.endswith(_PLAIN):
        return EncoderConfig(scores=False, poolings=("mean",), **_texts(model_dir, max_positions, asked=asked))
    return None


def _cross_encoder(model_dir: Path, raw: Mapping[str, Any], *, max_positions: int, asked: str) -> EncoderConfig:
    labels = int(raw.get("num_labels") or len(raw.get("id2label") or (0, 1)))
    if labels != 1:
        raise _refused(asked, f"a classifier with {labels} labels", "a cross-encoder, which has one")
    said = raw.get("sentence_transformers") or {}
    activation = said.get("activation_fn") or raw.get("sbert_ce_default_activation_function") or "Sigmoid"
    return EncoderConfig(
        scores=True,
        poolings=("mean" if raw.get("classifier_pooling") == "mean" else "cls",),
        activation=_activation(activation, asked=asked),
        **_texts(model_dir, max_positions, asked=asked),
    )


def _sentence_transformer(model_dir: Path, *, max_positions: int, asked: str) -> EncoderConfig:
    first, *rest = _modules(model_dir / "modules.json", asked=asked) or [("", "")]
    if first != ("Transformer", ""):
        raise _refused(asked, f"{first[0]} in {first[1] or 'modules.json'!r} as the first module", "Transformer at ''")
    poolings: tuple[str, ...] = ()
    dense: list[Dense] = []
    normalize = False
    for number, (kind, path) in enumerate(rest):
        if kind == "Pooling" and number == 0:
            poolings = _poolings(model_dir / path, asked=asked)
        elif kind == "Dense" and poolings and not normalize:
            dense.append(_dense(model_dir, path, asked=asked))
        elif kind == "Normalize" and poolings:
            normalize = True
        elif kind != "Dropout":
            raise _refused(
                asked, f"the module {kind} in place {number + 1}", "Pooling, Dense, Normalize, in this order"
            )
    if not poolings:
        raise _refused(asked, "no Pooling after the Transformer", "a model that gives a vector for each text")
    texts = _texts(model_dir, max_positions, asked=asked)
    return EncoderConfig(scores=False, poolings=poolings, dense=tuple(dense), normalize=normalize, **texts)


def _modules(path: Path, *, asked: str) -> list[tuple[str, str]]:
    """Return class and folder of each of sentence-transformers' modules."""
    try:
        modules = [(str(module["type"]), str(module["path"])) for module in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _refused(asked, f"{path} can't be read: {error}", "download the file again") from error
    for kind, folder in modules:
        if not kind.startswith("sentence_transformers."):
            raise _refused(asked, f"the module {kind}, whose code isn't sentence-transformers'", "another model")
        if folder and Path(folder).name != folder:
            raise _refused(asked, f"the module {kind} in {folder!r}", "folders inside the model directory")
    return [(kind.rpartition(".")[2], folder) for kind, folder in modules]


def _poolings(folder: Path, *, asked: str) -> tuple[str, ...]:
    said = read_json_file(folder / "config.json", asked=asked)
    given = said.get("pooling_mode") or [name for key, name in _POOLINGS.items() if said.get(key)] or "mean"
    poolings = (given,) if isinstance(given, str) else tuple(map(str, given))
    for name in poolings:
        if name not in _POOLINGS.values():
            raise _refused(asked, f"the pooling {name!r}", f"one of {', '.join(_POOLINGS.values())}")
    if not said.get("include_prompt", True):
        raise _refused(asked, "a pooling that leaves the prompt's tokens out", "a model that includes them")
    return poolings


def _dense(model_dir: Path, path: str, *, asked: str) -> Dense:
    said = read_json_file(model_dir / path / "config.json", asked=asked)
    if any(said.get(name, usual) != usual for name, usual in _USUAL.items()):
        raise _refused(asked, f"a Dense module of other tensors than texts' vectors in {path}", "a Dense of those")
    try:
        sizes = int(said["in_features"]), int(said["out_features"])
    except (KeyError, TypeError, ValueError) as error:
        raise _refused(asked, f"{path}/config.json lacks a size: {error}", "download the file again") from error
    activation = _activation(said.get("activation_function") or "Tanh", asked=asked)
    return Dense(path, *sizes, bias=bool(said.get("bias", True)), activation=activation)


_USUAL: Final = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}


def _activation(name: object, *, asked: str) -> str:
    """Return the class of an activation that is named by its path, such as "torch.nn.modules.linear.Identity"."""
    path = str(name).removesuffix("()")
    short = path.rpartition(".")[2]
    if short not in ACTIVATIONS or not (path == short or path.startswith("torch.nn.")):
        raise _refused(asked, f"the activation {name}", f"one of torch.nn's {', '.join(ACTIVATIONS)}")
    return short


def _texts(model_dir: Path, max_positions: int, *, asked: str) -> dict[str, Any]:
    """Return how texts are read: those fields of `EncoderConfig`."""

    def said(name: str) -> dict[str, Any]:
        path = model_dir / name
        return read_json_file(path, asked=asked) if path.exists() else {}

    sentence, prompts = said("sentence_bert_config.json"), said("config_sentence_transformers.json")
    longest = sentence.get("max_seq_length") or said("tokenizer_config.json").get("model_max_length") or max_positions
    return {
        "longest": max(1, min(int(longest), max_positions)),
        "lower_case": bool(sentence.get("do_lower_case")),
        "prompts": {str(name): str(text) for name, text in (prompts.get("prompts") or {}).items()},
        "default_prompt": str(prompts.get("default_prompt_name") or ""),
    }


def _refused(asked: str, found: str, try_: str) -> UnsupportedModelError:
    return UnsupportedModelError(asked=asked, found=found, try_=try_)
