"""Linear weights in the layouts that are published, written number by number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

GROUP = 32
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)

Numbers = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Written:
    """A layer's tensors by what their names end in, and the weight that they stand for."""

    tensors: Mapping[str, Tensor]
    weight: Tensor


def words_of(numbers: Numbers, bits: int = 4, order: tuple[int, ...] = tuple(range(8))) -> Numbers:
    """Return numbers [n, m] as words [n, m / (32 / bits)], the one at place `order[i]` at bit `bits * i`."""
    per_word = 32 // bits
    made = np.zeros((numbers.shape[0], numbers.shape[1] // per_word), dtype=np.uint32)
    for row, column in np.ndindex(*made.shape):
        for place in range(per_word):
            number = int(numbers[row, column * per_word + order[place]])
            made[row, column] |= np.uint32(number << (bits * place))
    return made.view(np.int32)


def _asymmetric(weight: Tensor) -> tuple[Numbers, Numbers, Numbers]:
    """Return numbers from 0 to 15 [out, in], zero points and scales [out, groups]."""
    groups = weight.numpy().reshape(weight.shape[0], -1, GROUP)
    least, most = groups.min(-1), groups.max(-1)
    scales = ((most - least) / 15).astype(np.float16).astype(np.float32)
    zeros = np.clip(np.round(-least / scales), 1, 15).astype(np.int64)
    numbers = np.clip(np.round(groups / scales[..., None]) + zeros[..., None], 0, 15).astype(np.int64)
    return numbers.reshape(weight.shape), zeros, scales


def _symmetric(weight: Tensor, bits: int, group: int) -> tuple[Numbers, Numbers]:
    """Return numbers [out, in] around 0, and scales [out, groups]."""
    most = 2 ** (bits - 1) - 1
    groups = weight.numpy().reshape(weight.shape[0], -1, group)
    scales = (np.abs(groups).max(-1) / most).astype(np.float16).astype(np.float32)
    numbers = np.clip(np.round(groups / scales[..., None]), -most - 1, most).astype(np.int64)
    return numbers.reshape(weight.shape), scales


def _meant(numbers: Numbers, scales: Numbers, zeros: Numbers | int = 0) -> Tensor:
    wide = scales.repeat(numbers.shape[1] // scales.shape[1], axis=1)
    below = zeros if isinstance(zeros, int) else zeros.repeat(numbers.shape[1] // zeros.shape[1], axis=1)
    return torch.from_numpy(((numbers - below) * wide).astype(np.float32))


def _tensor(numbers: Numbers, dtype: torch.dtype | None = None) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(dtype or torch.from_numpy(numbers[:0]).dtype)


def _gptq(weight: Tensor) -> Written:
    numbers, zeros, scales = _asymmetric(weight)
    tensors = {
        "qweight": _tensor(words_of(numbers).T),
        "qzeros": _tensor(words_of((zeros - 1).T)),
        "scales": _tensor(scales.T, torch.float16),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return Written(tensors, _meant(numbers, scales, zeros))


def _gptq_symmetric(weight: Tensor) -> Written:
    numbers, scales = _symmetric(weight, 4, GROUP)
    zeros = np.full(scales.T.shape, 7)
    tensors = {
        "qweight": _tensor(words_of(numbers + 8).T),
        "qzeros": _tensor(words_of(zeros)),
        "scales": _tensor(scales.T, torch.float16),
    }
    return Written(tensors, _meant(numbers, scales))


def _awq(weight: Tensor) -> Written:
    numbers, zeros, scales = _asymmetric(weight)
    tensors = {
        "qweight": _tensor(words_of(numbers.T, order=_AWQ)),
        "qzeros": _tensor(words_of(zeros.T, order=_AWQ)),
        "scales": _tensor(scales.T, torch.float16),
    }
    return Written(tensors, _meant(numbers, scales, zeros))


def _packed4(weight: Tensor) -> Written:
    numbers, scales = _symmetric(weight, 4, GROUP)
    tensors = {"weight_packed": _tensor(words_of(numbers + 8)), "weight_scale": _tensor(scales, torch.bfloat16)}
    return Written(tensors, _meant(numbers, tensors["weight_scale"].float().numpy()))


def _packed4_zeros(weight: Tensor) -> Written:
    numbers, zeros, scales = _asymmetric(weight)
    tensors = {
        "weight_packed": _tensor(words_of(numbers)),
        "weight_scale": _tensor(scales, torch.float16),
        "weight_zero_point": _tensor(words_of(zeros.T).T),
    }
    return Written(tensors, _meant(numbers, scales, zeros))


def _packed8(weight: Tensor) -> Written:
    numbers, scales = _symmetric(weight, 8, weight.shape[1])
    tensors = {"weight_packed": _tensor(words_of(numbers + 128, 8)), "weight_scale": _tensor(scales)}
    return Written(tensors, _meant(numbers, scales))


def _int8(weight: Tensor) -> Written:
    numbers, scales = _symmetric(weight, 8, weight.shape[1])
    return Written({"weight": _tensor(numbers, torch.int8), "weight_scale": _tensor(scales)}, _meant(numbers, scales))


def _fp8(weight: Tensor, scales: Tensor, wide: Tensor, name: str) -> Written:
    numbers = (weight / wide).to(torch.float8_e4m3fn)
    return Written({"weight": numbers, name: scales}, numbers.float() * wide)


def _fp8_channel(weight: Tensor) -> Written:
    scales = weight.abs().amax(1, keepdim=True) / 448
    return _fp8(weight, scales, scales, "weight_scale")


def _fp8_tensor(weight: Tensor) -> Written:
    scale = weight.abs().max() / 448
    return _fp8(weight, scale.view(1), scale, "weight_scale")


def _fp8_scalar(weight: Tensor) -> Written:
    scale = weight.abs().max() / 448
    return _fp8(weight, scale, scale, "weight_scale")


def _fp8_blocks(weight: Tensor, name: str = "weight_scale_inv") -> Written:
    blocks = [[part.abs().max() / 448 for part in rows.split(GROUP, dim=1)] for rows in weight.split(GROUP)]
    scales = torch.tensor(blocks)
    wide = scales.repeat_interleave(GROUP, 0)[: weight.shape[0]].repeat_interleave(GROUP, 1)[:, : weight.shape[1]]
    return _fp8(weight, scales, wide, name)


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


PUBLISHED: dict[str, tuple[dict[str, Any], Callable[[Tensor], Written]]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}, _gptq),
    "gptq symmetric": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True}, _gptq_symmetric),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, _awq),
    "W4A16": (_compressed("pack-quantized", num_bits=4, strategy="group", group_size=GROUP), _packed4),
    "W4A16 asymmetric": (
        _compressed("pack-quantized", num_bits=4, strategy="group", group_size=GROUP, symmetric=False),
        _packed4_zeros,
    ),
    "W8A16": (_compressed("pack-quantized", num_bits=8, strategy="channel"), _packed8),
    "W8A8": (_compressed("int-quantized", num_bits=8, strategy="channel"), _int8),
    "fp8 by channel": (_compressed("float-quantized", num_bits=8, strategy="channel", type="float"), _fp8_channel),
    "fp8 by tensor": (_compressed("float-quantized", num_bits=8, strategy="tensor", type="float"), _fp8_tensor),
    "fp8 by block": (
        _compressed("float-quantized", num_bits=8, strategy="block", type="float", block_structure=[GROUP, GROUP]),
        lambda weight: _fp8_blocks(weight, "weight_scale"),
    ),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "static"}, _fp8_scalar),
    "fp8 finegrained": ({"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]}, _fp8_blocks),
}
"""By a name for people: the quantization_config, and what writes a weight."""
