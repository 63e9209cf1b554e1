"""`ModelSpec`: which model, compiled how. Its facts, its bundle's key and the compile's request are made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from piecework.bundle.facts import Asked, Fact, longest_text, option_facts
from piecework.errors import CompileError, UnsupportedModelError
from piecework.foundation.digests import JsonScalar, digest_json
from piecework.spec.compile_options import CompileOptions, ranges_text
from piecework.spec.config import DTYPES, ModelConfig, read_config
from piecework.spec.encoder_config import EncoderConfig
from piecework.spec.latent_config import (
    DEFAULT_KV_CACHE_DTYPE,
    DEFAULT_MLA,
    KV_CACHE_DTYPES,
    MLA_MODES,
    check_kv_cache_dtype,
)
from piecework.spec.option import Declared, at_least_one, declared_options, option, read_options, written, wrong_choice
from piecework.spec.quantization import AS_STORED, GROUPS, WEIGHTS_DTYPES, Quantization, quantization_for
from piecework.spec.source import fetch_weights, model_directory

DEFAULT_MAX_TOKENS: Final = 2048
CONFIG_DTYPE: Final = "auto"


@dataclass(frozen=True)
class ModelSpec:
    """Which model, compiled how. `ModelSpec.of` makes one from what a user writes, and reads its config.json once.

    Attributes:
        config: what the model directory says.
        dtype: type of weights and activations; "auto" becomes the config's.
        max_tokens: most tokens in one forward pass; of an encoder, whose texts are computed whole, the default is never
            less than its longest text.
        mla: for models with latent attention: "exposed" has the steps of a layer compiled, "opaque" is one operator;
            see `models/latent_attention.py`.
        kv_cache_dtype: "auto" caches in the model's type; "fp8", for models with latent attention, caches latents in a
            byte per number, with scales.
        weights_dtype: "auto" keeps linear weights as the checkpoint has them; "int8", "int4" and "fp8" quantize those
            of one that isn't quantized, when they are bound (docs/quantized-weights.md).
        weights_group: columns of a quantized weight that share a scale; 0: all of them, or 32 for int4.
        options: how the graph is compiled.

    Raises UnsupportedModelError for what the model can't have, CompileError for ranges that end elsewhere than at
    `max_tokens`.
    """

    config: ModelConfig
    dtype: str = option(CONFIG_DTYPE, "type of weights and activations", choices=DTYPES, default_text="the config's")
    max_tokens: int = option(DEFAULT_MAX_TOKENS, "most tokens in one forward pass", metavar="N", read=at_least_one)
    mla: str = option(
        DEFAULT_MLA,
        "for models with latent attention: exposed has a layer's steps compiled, opaque hides them in one operator",
        choices=MLA_MODES,
        latent_only=True,
    )
    kv_cache_dtype: str = option(
        DEFAULT_KV_CACHE_DTYPE,
        "type of the KV cache: auto is the model's, or what a given bundle has; fp8, for models with latent attention, "
        "keeps latents in a byte per number",
        choices=KV_CACHE_DTYPES,
        latent_only=True,
    )
    weights_dtype: str = option(
        AS_STORED,
        "type of linear weights, which a checkpoint's are quantized to when they are read: a byte per number, or half "
        "a byte",
        choices=WEIGHTS_DTYPES,
        default_text="as the checkpoint has them",
    )
    weights_group: int = option(
        0,
        "columns of a quantized weight that share a scale",
        choices=tuple(str(group) for group in GROUPS),
        default_text="all, 32 for int4",
        read=int,
        write=str,
    )
    options: CompileOptions = CompileOptions()

    def __post_init__(self) -> None:
        if self.dtype == CONFIG_DTYPE:
            object.__setattr__(self, "dtype", self.config.dtype)
        if self.config.encoder is not None:
            object.__setattr__(self, "max_tokens", _most_tokens(self.max_tokens, self.config.encoder, self.source))
        wrong = wrong_choice(self)
        if wrong is not None:
            raise UnsupportedModelError(
                asked=f"{self.source} with {wrong.name}={getattr(self, wrong.name)!r}",
                found=f"a {wrong.name} that isn't supported",
                try_=f"one of {', '.join(wrong.option.choices)}",
            )
        check_kv_cache_dtype(self.kv_cache_dtype, self.config.latent, asked=f"{self.source}")
        self._check_weights()
        ranges = self.options.ranges
        if ranges and ranges[-1][1] != self.max_tokens:
            raise CompileError(
                asked=f"artifacts for the ranges {ranges_text(ranges)}",
                found=f"forward passes of up to {self.max_tokens} tokens",
                try_=f"ranges that end at {self.max_tokens}, or another --max-tokens",
            )

    def _check_weights(self) -> None:
        """Raise UnsupportedModelError where the model's weights can't be quantized, or not once more."""
        if self.weights_dtype != AS_STORED and self.config.quantization is not None:
            raise UnsupportedModelError(
                asked=f"{self.source} with {self.weights_dtype} weights",
                found="a checkpoint that is quantized already (quantization_config in config.json)",
                try_="leave --weights-dtype out, or give the checkpoint that it was quantized from",
            )
        if self.config.quantization is not None and self.config.latent is not None:
            raise UnsupportedModelError(
                asked=f"{self.source}, whose weights are quantized",
                found="latent attention, whose projections are absorbed into each other",
                try_="the checkpoint that it was quantized from, with --weights-dtype",
            )

    @staticmethod
    def of(source: str | Path | ModelConfig, *, weights: bool = True, **options: Any) -> ModelSpec:
        """Return the spec of a model.

        Args:
            source: the directory in Hugging Face layout, a Hub id ("OWNER/NAME" or "OWNER/NAME@REVISION"), or what was
                read of the directory.
            weights: whether a Hub id's weights are fetched too, once it is clear that the rest will do.
            options: by name, any option of ModelSpec and of CompileOptions, as the command line or Python has it;
                None for the default.

        Raises UnsupportedModelError, CompileError, OpError.

        Example: `ModelSpec.of("models/llama", dtype="bfloat16", ranges="1,2:2048", passes_off=["merge_linear"])`.
        """
        check_names(options, known=spec_options())
        try:
            how = CompileOptions(**read_options(CompileOptions, options))
            which = read_options(ModelSpec, options)
        except ValueError as error:
            name = str(error).partition("=")[0]
            raise CompileError(
                asked=f"a model with {str(error).partition(': ')[0]}",
                found=str(error).partition(": ")[2],
                try_=next(d.help for d in spec_options() if d.name == name),
            ) from error
        if isinstance(source, ModelConfig):
            return ModelSpec(source, **which, options=how)
        spec = ModelSpec(read_config(model_directory(source)), **which, options=how)
        if weights:
            fetch_weights(source, spec.source)
        return spec

    @property
    def source(self) -> Path:
        """The model directory."""
        return self.config.path

    @property
    def quantization(self) -> Quantization | None:
        """How linear weights are quantized, by the checkpoint or when they are bound; None where they aren't."""
        return self.config.quantization or quantization_for(
            self.weights_dtype, self.weights_group, latent=self.config.latent is not None
        )

    @property
    def own_facts(self) -> dict[str, JsonScalar]:
        """What is chosen for the model itself, beside how its graph is compiled, and what an encoder gives."""
        own: dict[str, JsonScalar] = {
            d.name: value
            for d, value in zip(declared_options(ModelSpec), written(self).values(), strict=True)
            if self.config.latent is not None or not d.option.latent_only
        }
        return own if self.config.encoder is None else {**own, "encoder": self.config.encoder.fact}

    @property
    def identity(self) -> dict[str, JsonScalar]:
        """What its bundle says that it is of."""
        return {"architecture": self.config.architecture, "layers": self.config.num_layers, **self.own_facts}

    @property
    def facts(self) -> tuple[Fact, ...]:
        """The facts that its bundle must have which the spec knows: its options."""
        return option_facts({**self.own_facts, **self.options.facts()})

    @property
    def asked(self) -> Asked:
        """What a bundle must be to stand for a compile of this spec."""
        return Asked((*self.facts, *self._bounds), config=self.config.raw, as_made_here=True)

    @property
    def named(self) -> Asked:
        """What a bundle must be which the caller named: of this model, and of the options that aren't the default."""
        default = {fact for fact in ModelSpec(self.config).facts if fact.name != "encoder"}
        chosen = (fact for fact in self.facts if fact not in default)
        return Asked((*chosen, *self._bounds), config=self.config.raw)

    @property
    def _bounds(self) -> tuple[Fact, ...]:
        """What a bundle must be enough for."""
        return () if self.config.encoder is None else (longest_text(self.config.encoder.longest),)

    @property
    def key(self) -> str:
        """The key under which a store keeps its bundles, one beside the other for all that their facts differ in."""
        return digest_json([self.identity, [fact.to_json() for fact in self.facts]])

    def to_json(self) -> str:
        """Return the spec as one line, for another process."""
        return json.dumps({"source": str(self.source), **written(self), **self.options.facts()})

    @staticmethod
    def from_json(text: str) -> ModelSpec:
        """Read what `to_json` wrote, and the model's config.json. Raises as `of`, CompileError for other texts."""
        try:
            values = json.loads(text)
            source = values.pop("source")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CompileError(
                asked="a compile of --spec", found=f"no spec: {error}", try_="what ModelSpec.to_json returns"
            ) from error
        return ModelSpec.of(source, **values)


def _most_tokens(chosen: int, encoder: EncoderConfig, source: Path) -> int:
    """Return the most tokens of an encoder's forward pass. Raises CompileError where texts don't fit in it."""
    if chosen == DEFAULT_MAX_TOKENS:
        return max(chosen, encoder.longest)
    if chosen < encoder.longest:
        raise CompileError(
            asked=f"{source} with forward passes of {chosen} tokens",
            found=f"texts of up to {encoder.longest} tokens, which an encoder computes whole",
            try_=f"--max-tokens {encoder.longest} or more, or a smaller max_seq_length in sentence_bert_config.json",
        )
    return chosen


def spec_options() -> tuple[Declared, ...]:
    """Return all options of a spec, in the order in which `--help` shows them."""
    return (*declared_options(ModelSpec), *declared_options(CompileOptions))


def check_names(given: Mapping[str, Any], *, known: tuple[Declared, ...]) -> None:
    """Raise CompileError where one of `given` is no option."""
    names = [d.name for d in known]
    for name in given:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            raise CompileError(
                asked=f"a model with {name}={given[name]!r}",
                found="no such option",
                try_=f"did you mean {near[0]}?" if near else f"one of {', '.join(names)}",
            )
