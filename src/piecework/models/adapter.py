"""Put a Hugging Face causal language model on `piecework::attention`, as a request to capture.

transformers' own modelling code runs unchanged; its attention interface hands query, key and value to our op, together
with the batch's block tables. The result needs no weights: parameters are on the meta device, and only buffers that are
computed from the config (rotary frequencies) are real.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from piecework.errors import UnsupportedModelError
from piecework.graph.request import CaptureRequest, Dim, SizeInput, TensorInput
from piecework.models.config import DTYPES, ModelConfig, read_config
from piecework.ops.attention import ATTENTION_OP

ATTENTION: Final = "piecework"
BLOCK_SIZE: Final = 16
KV_CACHE: Final = "kv_cache"
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


@dataclass(frozen=True)
class ForwardBatch:
    """What attention needs to know of the batch; the same object for every layer. See `ops/attention.py`."""

    slot_mapping: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start: Tensor
    num_decode_tokens: int


def build_causal_lm(
    model_dir: Path, *, dtype: str | None = None, max_tokens: int, device: str = "cpu"
) -> CaptureRequest:
    """Return what to capture for the model of a directory; only config.json (and generation_config.json) is read.

    Args:
        model_dir: a directory in Hugging Face layout.
        dtype: type of weights and activations; default: the config's.
        max_tokens: most tokens in one forward pass.
        device: device type that the compiled model runs on, "cpu" or "cuda".

    Raises UnsupportedModelError where piecework can't compile the model.
    """
    config = read_config(model_dir)
    dtype = dtype or config.dtype
    if dtype not in DTYPES:
        raise UnsupportedModelError(
            asked=f"{model_dir} in {dtype}", found="a dtype that isn't supported", try_=f"one of {', '.join(DTYPES)}"
        )
    module = _build_module(config, dtype=getattr(torch, dtype))
    states = add_kv_caches(module, config, dtype=dtype)
    if not states:
        raise UnsupportedModelError(
            asked=f"the model in {model_dir}",
            found=f"no attention module that transformers' AttentionInterface reaches in {config.architecture}",
            try_="upgrade transformers, or report the model",
        )
    return CaptureRequest(
        module=module,
        call=call_causal_lm,
        inputs=(
            *(TensorInput(name, shape, "int64", device) for name, shape in _INPUTS.items()),
            SizeInput("num_decode_tokens", "decode_tokens"),
        ),
        sizes=_sizes(config, max_tokens=max_tokens),
        states=states,
        opaque=frozenset({ATTENTION_OP}),
        device=device,
    )


def call_causal_lm(module: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Run transformers' forward on the named inputs of a batch; returns the logits [logits, vocab]."""
    batch = ForwardBatch(
        slot_mapping=inputs["slot_mapping"],
        block_tables=inputs["block_tables"],
        seq_lens=inputs["seq_lens"],
        query_start=inputs["query_start"],
        num_decode_tokens=inputs["num_decode_tokens"],
    )
    output = module(
        input_ids=inputs["input_ids"].unsqueeze(0),
        position_ids=inputs["positions"].unsqueeze(0),
        use_cache=False,
        logits_to_keep=inputs["logits_indices"],
        batch=batch,
    )
    logits: Tensor = output.logits
    return logits.squeeze(0)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    batch: ForwardBatch,
    **_ignored: object,
) -> tuple[Tensor, None]:
    """Serve as transformers' attention function: query [1, H, T, D], key/value [1, K, T, D] -> [1, T, H, D].

    Of the module only the `kv_cache` is read, so that nothing tells sibling layers apart.
    """
    out = torch.ops.piecework.attention(
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        module.kv_cache,
        batch.slot_mapping,
        batch.block_tables,
        batch.seq_lens,
        batch.query_start,
        batch.num_decode_tokens,
        scaling,
        sliding_window or 0,
        softcap or 0.0,
    )
    return out.unsqueeze(0), None


def add_kv_caches(module: nn.Module, config: ModelConfig, *, dtype: str) -> dict[str, TensorInput]:
    """Give every attention module a `kv_cache` buffer on the meta device; return them by qualified name.

    An attention module is known by what transformers gives all of those that use its attention interface: a
    `layer_idx` and `num_key_value_groups`.
    """
    states = {}
    for name, part in module.named_modules():
        if hasattr(part, "layer_idx") and hasattr(part, "num_key_value_groups"):
            shape = (BLOCK_SIZE, config.num_kv_heads, config.head_dim)
            cache = torch.empty((2, 1, *shape), dtype=getattr(torch, dtype), device="meta")
            part.register_buffer(KV_CACHE, cache, persistent=False)
            qualified = f"{name}.{KV_CACHE}"
            states[qualified] = TensorInput(qualified, (2, "blocks", *shape), dtype)
    return states


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


def _build_module(config: ModelConfig, *, dtype: torch.dtype) -> nn.Module:
    asked = f"the model in {config.path}"
    AttentionInterface.register(ATTENTION, paged_attention)
    try:
        hf_config = AutoConfig.from_pretrained(config.path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedModelError(
            asked=asked, found=f"transformers can't read its config.json: {error}", try_="check the file's fields"
        ) from error
    _check_rope(getattr(hf_config, "rope_parameters", None), asked=asked)
    with _meta_parameters(), no_init_weights():
        module: nn.Module = AutoModelForCausalLM.from_config(hf_config, attn_implementation=ATTENTION, dtype=dtype)
    if type(module).__name__ != config.architecture:
        raise UnsupportedModelError(
            asked=asked,
            found=f"architecture {config.architecture}, where transformers builds a {type(module).__name__}",
            try_="correct config.json, or upgrade transformers",
        )
    module.tie_weights()  # type: ignore[operator]
    module.requires_grad_(False)
    return module.eval()


def _check_rope(parameters: object, *, asked: str) -> None:
    """Raise UnsupportedModelError where the rotary frequencies depend on more than positions and config."""
    if not isinstance(parameters, Mapping):
        return
    for value in parameters.values():
        _check_rope(value, asked=asked)
    rope_type = str(parameters.get("rope_type", "default"))
    if "dynamic" in rope_type or rope_type == "longrope":
        raise UnsupportedModelError(
            asked=asked,
            found=f"rotary embedding of type {rope_type!r}, whose frequencies change with the longest sequence so far",
            try_='a checkpoint whose rope type is "default", "linear", "yarn" or "llama3"',
        )


@contextlib.contextmanager
def _meta_parameters() -> Iterator[None]:
    """Put every parameter that is registered inside on the meta device; buffers stay real."""
    original = nn.Module.register_parameter
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            if id(param) not in made:
                meta = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False)
                made[id(param)] = (param, meta)  # the original is kept, so that its id isn't used again
            param = made[id(param)][1]
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
