"""From a directory in Hugging Face layout to a request to capture its model on piecework's ops.

How depends on the family: models/paged_attention.py for causal language models that transformers' attention interface
reaches, models/deepseek.py for latent attention, models/packed_texts.py for encoders. The result needs no
weights: parameters are on the meta device, and only buffers that are computed from the config (rotary frequencies) are
real.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers import __version__ as transformers_version

from piecework.bundle.where import Where
from piecework.capture.request import CaptureRequest, Dim, SizeInput, TensorInput, Variant
from piecework.capture.sources import is_users
from piecework.errors import PieceworkError, UnsupportedModelError
from piecework.models.adapted import AdaptedModel
from piecework.models.batch import BLOCK_SIZE, STATE_SLOTS, ForwardBatch
from piecework.models.cache_interface import Past, cache_arguments
from piecework.models.deepseek import adapt_deepseek
from piecework.models.packed_texts import (
    LEAST_PLACES,
    LONGEST,
    PLACES,
    TOKEN_TYPES,
    PackedTexts,
    TextEncoder,
    adapt_encoder,
)
from piecework.models.paged_attention import adapt_paged
from piecework.models.quantized import with_quantized_weights
from piecework.ops.mla.core import Regime
from piecework.spec.config import ModelConfig
from piecework.spec.model_spec import ModelSpec

MAX_SEQS: Final = 256
MAX_BLOCKS: Final = 2**31 - 1

_INPUTS: Final[Mapping[str, tuple[str, ...]]] = {
    "input_ids": ("tokens",),
    "positions": ("tokens",),
    "slot_mapping": ("tokens",),
    "block_tables": ("seqs", "table_width"),
    "seq_lens": ("seqs",),
    "query_start": ("seqs_plus_one",),
    "logits_indices": ("logits",),
}


def build_request(spec: ModelSpec) -> CaptureRequest:
    """Return what to capture for a model, which continues texts or encodes them; raises as `build_causal_lm`."""
    return build_causal_lm(spec) if spec.config.encoder is None else build_encoder(spec)


def build_encoder(spec: ModelSpec) -> CaptureRequest:
    """Return what to capture for an encoder, on packed texts; reads and raises as `build_causal_lm`."""
    model, device = _adapt(spec), spec.options.device
    assert isinstance(model.module, TextEncoder)
    inputs = {"input_ids": "tokens", "positions": "tokens", "query_start": "seqs_plus_one"}
    if model.module.takes_types:
        inputs[TOKEN_TYPES] = "tokens"
    sizes = {"tokens": Dim(1, spec.max_tokens), "seqs_plus_one": Dim(2, MAX_SEQS + 1)}
    if model.module.padded:
        assert spec.config.encoder is not None
        inputs[PLACES] = LONGEST
        sizes[LONGEST] = Dim(LEAST_PLACES, max(LEAST_PLACES, spec.config.encoder.longest))
    return CaptureRequest(
        module=model.module,
        call=call_encoder,
        inputs=tuple(TensorInput(name, (size,), "int64", device) for name, size in inputs.items()),
        sizes=sizes,
        device=device,
        sources=model.sources,
        notes=model.notes,
        facts=model.facts,
    )


def call_encoder(module: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Run a `TextEncoder` on the named inputs of a batch; returns vectors [seqs, dim] or scores [seqs, 1]."""
    types, places = inputs.get(TOKEN_TYPES), inputs.get(PLACES)
    row = (1, inputs["input_ids"].shape[0])  # the size is asked for here, and not in the first of the layers
    made: Tensor = module(
        inputs["input_ids"].view(row),
        inputs["positions"].view(row),
        PackedTexts(inputs["query_start"], [], None if places is None else places.unsqueeze(0)),
        None if types is None else types.view(row),
    )
    return made


def build_causal_lm(spec: ModelSpec) -> CaptureRequest:
    """Return what to capture for a model; of its directory nothing more is read than the spec has.

    Raises UnsupportedModelError where piecework can't compile the model.
    """
    config, device = spec.config, spec.options.device
    model = _adapt(spec)
    regimes = config.latent is not None and spec.mla == "exposed"
    sizes = _sizes(config, max_tokens=spec.max_tokens)
    inputs: list[TensorInput | SizeInput] = [
        *(TensorInput(name, shape, "int64", device) for name, shape in _INPUTS.items()),
        SizeInput("num_decode_tokens", "decode_tokens"),
    ]
    if any(STATE_SLOTS in state.shape for state in model.states.values()):
        inputs.append(TensorInput(STATE_SLOTS, ("seqs",), "int64", device))
        sizes[STATE_SLOTS] = Dim(1, MAX_SEQS)
    if regimes:
        inputs.append(SizeInput("num_prefill_tokens", "prefill_tokens"))
        sizes["prefill_tokens"] = Dim(0, spec.max_tokens)
    return CaptureRequest(
        module=model.module,
        call=partial(call_causal_lm, regime=Regime.MIXED, cache_length=model.cache_length),
        inputs=tuple(inputs),
        sizes=sizes,
        states=model.states,
        device=device,
        variants=_VARIANTS if regimes else (),
        sources=model.sources,
        notes=model.notes,
        facts=model.facts,
    )


def call_causal_lm(module: nn.Module, inputs: Mapping[str, Any], *, regime: Regime, cache_length: int = 0) -> Tensor:
    """Run transformers' forward on the named inputs of a batch; returns the logits [logits, vocab].

    Its cache seems to hold `cache_length` tokens, where its code attends by itself.
    """
    num_tokens = inputs["input_ids"].shape[0]
    num_decode = {Regime.DECODE: num_tokens, Regime.PREFILL: 0}.get(regime, inputs["num_decode_tokens"])
    batch = ForwardBatch(
        slot_mapping=inputs["slot_mapping"],
        block_tables=inputs["block_tables"],
        seq_lens=inputs["seq_lens"],
        query_start=inputs["query_start"],
        num_decode_tokens=num_decode,
        num_prefill_tokens=inputs.get("num_prefill_tokens", num_tokens - num_decode),
        state_slots=inputs.get(STATE_SLOTS),
        regime=regime,
    )
    positions = inputs["positions"].unsqueeze(0)
    output = module(
        input_ids=inputs["input_ids"].unsqueeze(0),
        position_ids=positions,
        **cache_arguments(module, Past(positions, batch, cache_length)),
        logits_to_keep=inputs["logits_indices"],
        batch=batch,
    )
    logits: Tensor = output.logits
    return logits.squeeze(0)


# Whether tokens decode is known of the batch, so each kind has its own graph, without rows that are cut out of it.
_VARIANTS: Final = (
    Variant("decode", Where(equal=(("decode_tokens", "tokens"),)), partial(call_causal_lm, regime=Regime.DECODE)),
    Variant("prefill", Where(within=(("decode_tokens", 0, 0),)), partial(call_causal_lm, regime=Regime.PREFILL)),
)


def _sizes(config: ModelConfig, *, max_tokens: int) -> dict[str, Dim]:
    """Return the declared sizes; "tokens" comes first, because shape ranges are about it."""
    return {
        "tokens": Dim(1, max_tokens),
        "seqs": Dim(1, MAX_SEQS),
        "seqs_plus_one": Dim(2, MAX_SEQS + 1),
        "table_width": Dim(1, max(1, -(-config.max_positions // BLOCK_SIZE))),
        "logits": Dim(1, max_tokens),
        "decode_tokens": Dim(0, MAX_SEQS),
        "blocks": Dim(1, MAX_BLOCKS),
    }


def _adapt(spec: ModelSpec) -> AdaptedModel:
    config = spec.config
    asked = f"the model in {config.path}"
    hf_config = _transformers_config(config, asked=asked)
    dtype = getattr(torch, spec.dtype)
    try:
        if config.encoder is not None:
            model = adapt_encoder(config, hf_config, dtype=dtype)
        elif config.latent is None:
            model = adapt_paged(config, hf_config, dtype=dtype)
        else:
            model = adapt_deepseek(spec, hf_config)
    except PieceworkError:
        raise
    except Exception as error:  # what modelling code makes of values that it doesn't expect
        raise UnsupportedModelError(
            asked=asked,
            found=f"transformers' code can't be built or run on a paged cache: {type(error).__name__}: "
            f"{_first_line(error)} (at {_place(error)})",
            try_="check its config.json, or piecework.compile for the module as it is, without the engine",
        ) from error
    module = model.module
    if config.encoder is None:
        _check_model(model, config, asked=asked)
        module.tie_weights()  # type: ignore[operator]
    module.requires_grad_(False)
    module.eval()
    return model if spec.quantization is None else with_quantized_weights(model, spec.quantization)


def _check_model(model: AdaptedModel, config: ModelConfig, *, asked: str) -> None:
    module = model.module
    if type(module).__name__ != config.architecture:
        raise UnsupportedModelError(
            asked=asked,
            found=f"architecture {config.architecture}, where transformers builds a {type(module).__name__}",
            try_="correct config.json, or upgrade transformers",
        )
    if not model.states:
        raise UnsupportedModelError(
            asked=asked,
            found=f"no attention that transformers' AttentionInterface reaches in {config.architecture}",
            try_="piecework.compile for the module as it is, without the engine",
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _place(error: BaseException) -> str:
    """Return the last line of transformers' code, or of the user's, that led to an error."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "torch"


def _transformers_config(config: ModelConfig, *, asked: str) -> PretrainedConfig:
    if config.model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            asked=asked,
            found=f"model_type {config.model_type!r}, which transformers {transformers_version} doesn't know",
            try_="upgrade transformers; code that lies beside a config.json is not run",
        )
    try:
        fields = {name: value for name, value in config.raw.items() if name != "quantization_config"}
        hf_config = CONFIG_MAPPING[config.model_type].from_dict(deepcopy(fields))
    except Exception as error:  # what each family's checks raise
        raise UnsupportedModelError(
            asked=asked, found=f"transformers can't read its config.json: {error}", try_="check the file's fields"
        ) from error
    made: PretrainedConfig = hf_config
    return made
