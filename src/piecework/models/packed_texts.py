"""Encoders of transformers on packed texts: all tokens of a batch in one row, by transformers' own interfaces.

A model is reached by its attention interface and its mask interface, as in models/paged_attention.py. One that isn't
(it adds relative positions to its scores, or attends by code of its own) gets its texts in rows of their own, filled up
to the longest one and masked, as transformers' tokenizers do it. None of its code is replaced, and no model is known by
name. What makes one vector, or one score, of each text's tokens comes after it.

Shape suffixes: T tokens, S texts, L tokens of the longest text, E hidden size.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    PretrainedConfig,
)
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPooling

from piecework.bundle.facts import longest_text
from piecework.bundle.recipes import Source, Sources, Take
from piecework.errors import PieceworkError, UnsupportedModelError
from piecework.foundation.torch_private import SymbolicSession
from piecework.models.adapted import AdaptedModel
from piecework.models.cache_interface import Past, Sight, sight
from piecework.models.conversions import checkpoint_sources
from piecework.models.meta import meta_parameters
from piecework.models.rope import fixed_frequencies
from piecework.models.trial import UNKNOWN_MASK, unreached
from piecework.ops.texts.packed import packed_reduce
from piecework.spec.config import ModelConfig
from piecework.spec.encoder_config import EncoderConfig

ATTENTION: Final = "piecework, packed texts"
TOKEN_TYPES: Final = "token_type_ids"
PLACES: Final = "places"
LONGEST: Final = "longest"
"""The input of a forward on texts in rows of their own, and its size: 0 to L - 1, L being the longest text's tokens."""
LEAST_PLACES: Final = 2
"""The least L, whatever the texts: code for matrices of L * L elements is another where that is one."""
_ASKED: Final = "attention over packed texts"


@dataclass(frozen=True)
class PackedTexts:
    """Where a batch's texts are, the same object for every layer.

    Attributes:
        query_start: [S + 1] int64, prefix sums of the texts' tokens.
        attended: gets each module that attends.
        places: [1, L] int64, 0 to L - 1, where each text gets a row of its own; else None.
    """

    query_start: Tensor
    attended: list[nn.Module]
    places: Tensor | None = None


def adapt_encoder(config: ModelConfig, hf_config: PretrainedConfig, *, dtype: torch.dtype) -> AdaptedModel:
    """Return transformers' encoder on packed texts with what comes after it, as a `TextEncoder`.

    Raises UnsupportedModelError where its attention isn't reached, or tokens meet by other ways than attention.
    """
    encoder = config.encoder
    assert encoder is not None
    AttentionInterface.register(ATTENTION, attend_packed)
    AttentionMaskInterface.register(ATTENTION, sight)
    try:
        return _adapted(config, encoder, hf_config, dtype=dtype, attention=ATTENTION)
    except _NotPacked as unreached_attention:
        found = unreached_attention.reason.found
    model = _adapted(config, encoder, hf_config, dtype=dtype, attention="eager")
    note = f"texts are filled up to the longest one of a batch: {found}"
    return replace(model, notes=(*model.notes, note))


class _NotPacked(Exception):
    """A model can't compute packed texts; `reason` says why."""

    def __init__(self, reason: UnsupportedModelError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _adapted(
    config: ModelConfig, encoder: EncoderConfig, hf_config: PretrainedConfig, *, dtype: torch.dtype, attention: str
) -> AdaptedModel:
    """Do what `adapt_encoder` does with one attention of transformers'; raises _NotPacked where `ATTENTION` fails."""
    auto = AutoModelForSequenceClassification if encoder.scores else AutoModel
    if config.architecture.endswith("EncoderModel"):  # the first half of an encoder and decoder
        auto = AutoModelForTextEncoding
    with meta_parameters(), no_init_weights():
        model: Any = auto.from_config(copy.deepcopy(hf_config), attn_implementation=attention, dtype=dtype)
        model.tie_weights()
        module = TextEncoder(model, encoder, dtype=dtype)
    module.padded = attention != ATTENTION
    if encoder.scores and type(model).__name__ != config.architecture:
        raise UnsupportedModelError(
            asked=f"the model in {config.path}",
            found=f"architecture {config.architecture}, where transformers builds a {type(model).__name__}",
            try_="correct config.json, or upgrade transformers",
        )
    notes = fixed_frequencies(model, longest=config.max_positions)
    module.eval()
    positions = _try(module, longest=encoder.longest, untold=config.max_positions)
    module.first_position = positions.first
    facts = (longest_text(positions.room),)
    return AdaptedModel(module, {}, _sources(module, encoder), notes, facts=facts)


def attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Sight | Tensor | None,
    scaling: float | None = None,
    *,
    texts: PackedTexts,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_ignored: object,
) -> tuple[Tensor, None]:
    """Serve as transformers' attention function: query [1, H, T, D], key/value [1, K, T, D] -> [1, T, H, D]."""
    if not isinstance(attention_mask, Sight):
        raise unreached(module, UNKNOWN_MASK, asked=_ASKED)
    if softcap or s_aux is not None or attention_mask.chunk or key.shape != value.shape:
        raise unreached(module, "attends with soft-capped scores, sinks, chunks or wider values", asked=_ASKED)
    if position_bias is not None:
        raise unreached(module, "adds a bias to its scores", asked=_ASKED)
    texts.attended.append(module)
    out = torch.ops.piecework.packed_attention(
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        texts.query_start,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        attention_mask.window,
        attention_mask.causal,
    )
    return out.unsqueeze(0), None


@final
class TextEncoder(nn.Module):
    """A model of transformers on packed texts, and what makes one vector or one score of each text's tokens.

    Args:
        model: as transformers builds it, with a head where scores are wanted.
        config: what comes after it.
        dtype: of its weights.
    """

    def __init__(self, model: Any, config: EncoderConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dense = nn.ModuleList(nn.Linear(d.in_features, d.out_features, bias=d.bias, dtype=dtype)
                                   for d in config.dense)  # fmt: skip
        self.first_position = 0
        self.padded = False
        self._config = config
        base = getattr(model, model.base_model_prefix, model) if config.scores else model
        taken = inspect.signature(type(base).forward).parameters
        self.takes_types = TOKEN_TYPES in taken and getattr(base.config, "type_vocab_size", 1) > 1
        self._path = "" if base is model else model.base_model_prefix
        self._takes_positions = "position_ids" in taken
        self._past = "past_key_values" in taken and model.config.architectures[0].endswith("ForCausalLM")
        if not config.scores and getattr(base, "pooler", None) is not None:
            base.pooler = None  # checkpoints needn't have it, and nobody takes what it gives

    def forward(self, input_ids: Tensor, places: Tensor, texts: PackedTexts, token_types: Tensor | None) -> Tensor:
        """Return vectors [S, dim] or scores [S, 1], in float32.

        Args:
            input_ids: [1, T] int64.
            places: [1, T] int64, of the tokens in their texts.
            texts: where those are.
            token_types: [1, T] int64, which of a pair of texts a token is of, where the model takes that.
        """
        tokens = {"input_ids": input_ids} if token_types is None else {"input_ids": input_ids, TOKEN_TYPES: token_types}
        hidden = self._in_rows(tokens, places, texts) if self.padded else self._in_one_row(tokens, places, texts)
        pooled = [_pooled(hidden, texts.query_start, name) for name in self._config.poolings]
        vectors = pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=-1)
        if self._config.scores:
            return _activated(self._head(vectors), self._config.activation).float()
        for layer, declared in zip(self.dense, self._config.dense, strict=True):
            vectors = _activated(layer(vectors), declared.activation)
        vectors = vectors.float()
        return nn.functional.normalize(vectors, dim=-1) if self._config.normalize else vectors

    def _in_one_row(self, tokens: dict[str, Tensor], places: Tensor, texts: PackedTexts) -> Tensor:
        """Return the model's hidden states [T, E] of packed tokens."""
        given: dict[str, Any] = {**tokens, "position_ids": self._positions(places), "texts": texts}
        if self._past:
            given |= {"past_key_values": Past(places), "use_cache": False}
        hidden: Tensor = self.model.get_submodule(self._path)(return_dict=True, **given)[0]
        return hidden.squeeze(0)

    def _in_rows(self, tokens: dict[str, Tensor], places: Tensor, texts: PackedTexts) -> Tensor:
        """Return the model's hidden states [T, E] of texts that stand in rows [S, L], masked behind their ends."""
        row = texts.places
        assert row is not None
        begins, ends = texts.query_start[:-1].unsqueeze(1), texts.query_start[1:].unsqueeze(1)
        # behind a text's end stands whatever comes there: nobody sees it
        where = (begins + row).clamp(max=places.shape[1] - 1)
        given: dict[str, Any] = {name: packed.squeeze(0)[where] for name, packed in tokens.items()}
        given["attention_mask"] = (begins + row < ends).to(row.dtype)
        if self._takes_positions:
            given["position_ids"] = self._positions(row)
        hidden: Tensor = self.model.get_submodule(self._path)(return_dict=True, **given)[0]
        text = torch.searchsorted(
            texts.query_start[1:], torch.arange(places.shape[1], device=places.device), right=True
        )
        return hidden[text, places.squeeze(0)]

    def _positions(self, places: Tensor) -> Tensor:
        return places + self.first_position if self.first_position else places

    def _head(self, vectors: Tensor) -> Tensor:
        """Return what the model's own head makes of one token's hidden state [S, E] for each text."""
        head = copy.copy(self.model)
        head._modules = {**self.model._modules, self._path: _GivenTokens(self.model.get_submodule(self._path))}
        logits: Tensor = head(inputs_embeds=vectors.unsqueeze(1)).logits
        return logits


@final
class _GivenTokens(nn.Module):
    """Stands for a model whose hidden states [S, 1, E] are known already, in front of its head."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.pooler = getattr(base, "pooler", None)

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> BaseModelOutputWithPooling:
        """Return them as transformers' models do."""
        pooled = None if self.pooler is None else self.pooler(inputs_embeds)
        return BaseModelOutputWithPooling(last_hidden_state=inputs_embeds, pooler_output=pooled)


def _pooled(hidden: Tensor, query_start: Tensor, name: str) -> Tensor:
    """Return one vector [S, E] for each text of its tokens' [T, E], by one of sentence-transformers' poolings."""
    begins, ends = query_start[:-1], query_start[1:]
    lengths = (ends - begins).unsqueeze(1)
    if name in {"cls", "lasttoken"}:
        return hidden[begins if name == "cls" else ends - 1]
    if name == "weightedmean":  # a text's first token counts once, its second twice, and so on
        tokens = torch.arange(hidden.shape[0], device=hidden.device)
        text = torch.searchsorted(ends, tokens, right=True)
        weights = 2.0 * (tokens - begins[text] + 1) / (lengths.squeeze(1)[text] + 1)
        return _reduced(hidden.float() * weights.unsqueeze(1), query_start).to(hidden.dtype)
    reduced = _reduced(hidden, query_start, largest=name == "max")
    return reduced * lengths.to(hidden.dtype).sqrt() if name == "mean_sqrt_len_tokens" else reduced


def _reduced(x: Tensor, query_start: Tensor, *, largest: bool = False) -> Tensor:
    made: Tensor = packed_reduce(x, query_start, largest)
    return made


def _activated(x: Tensor, name: str) -> Tensor:
    if name == "Identity":
        return x
    activation: nn.Module = getattr(nn, name)()
    made: Tensor = activation(x)
    return made


@dataclass(frozen=True)
class _Positions:
    """The number of a text's first position in the table of positions, and for how many there is room from there."""

    first: int
    room: int


def _try(module: TextEncoder, *, longest: int, untold: int) -> _Positions:
    """Run the module once without values; return where positions are in its table, `untold` of them without one.

    A table with a padding index counts from the row after that, as fairseq has it. Raises UnsupportedModelError where
    attention isn't reached in every layer, where tokens meet in convolutions, and where a text has more tokens than the
    table has positions.
    """
    convolution = next((m for m in module.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)
    if convolution is not None:
        raise unreached(convolution, "mixes tokens of different texts", asked=_ASKED)
    model, attended = module.model, list[nn.Module]()
    if module.padded and "attention_mask" not in inspect.signature(type(model).forward).parameters:
        raise unreached(model, "takes no attention_mask", asked=_ASKED)
    try:
        tables = _run_without_values(module, attended)
    except PieceworkError as error:
        raise _not_packed(module, error) from error
    except Exception as error:  # what modelling code makes of a mask that is none
        why = f"fails on packed texts: {type(error).__name__}: {error}"
        raise _not_packed(module, unreached(model, why, asked=_ASKED)) from error
    if not module.padded and len(attended) < model.config.num_hidden_layers:
        why = f"attends in {len(attended)} layers where transformers' AttentionInterface reaches it"
        raise _NotPacked(unreached(model, why, asked=_ASKED))
    first = max((1 + t.padding_idx for t in tables if t.padding_idx is not None), default=0)
    room = min((t.num_embeddings for t in tables), default=first + untold) - first
    if room < longest:
        raise UnsupportedModelError(
            asked=f"texts of up to {longest} tokens",
            found=f"positions for {room}",
            try_=f'"max_seq_length": {room} in sentence_bert_config.json',
        )
    return _Positions(first, room)


def _not_packed(module: TextEncoder, error: PieceworkError) -> Exception:
    """Return what to raise for a model that failed: there is another way for one that was to attend by `ATTENTION`."""
    return _NotPacked(error) if isinstance(error, UnsupportedModelError) and not module.padded else error


def _run_without_values(module: TextEncoder, attended: list[nn.Module]) -> list[nn.Embedding]:
    """Run the module on fake tensors; return the tables in which positions are looked up as they are."""
    tables: list[nn.Embedding] = []
    given = [*module.named_parameters(), *module.named_buffers()]
    with torch.no_grad(), SymbolicSession().fake_mode:
        tokens, places, row, start = (torch.zeros(shape, dtype=torch.int64) for shape in ((1, 2), (1, 2), (1, 2), (2,)))
        tensors = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in given}

        def see(table: nn.Module, arguments: tuple[object, ...]) -> None:
            if isinstance(table, nn.Embedding) and (arguments[0] is places or arguments[0] is row):
                tables.append(table)

        hooks = [m.register_forward_pre_hook(see) for m in module.modules() if isinstance(m, nn.Embedding)]
        try:
            types = tokens if module.takes_types else None
            torch.func.functional_call(module, tensors, (tokens, places, PackedTexts(start, attended, row), types))
        finally:
            for hook in hooks:
                hook.remove()
    return tables


def _sources(module: TextEncoder, config: EncoderConfig) -> Sources:
    """Say how parameters are made; a checkpoint may name them as a model with a head has them."""
    model = module.model
    made = checkpoint_sources(model)
    sources: dict[str, Source] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with_head = "" if module._path else f"{model.base_model_prefix}.{name}"
        sources[f"model.{name}"] = made.get(name, Take(name, tuple(parameter.shape), with_head))
    for number, declared in enumerate(config.dense):
        for name, parameter in module.dense[number].named_parameters():
            taken = Take(f"{declared.path}/linear.{name}", tuple(parameter.shape))
            sources[f"dense.{number}.{name}"] = taken
    return sources
