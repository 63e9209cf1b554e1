"""Whether a checkpoint has what a model needs: names, shapes and types, from its files' headers, without torch.

Names may be others than the model's, as they may be for transformers: without the first part (`model.`) where the base
model alone was saved, with one more where it was part of a larger one, and the head's in place of the embedding's
where the two are tied. Old checkpoints have their own names for the weights of norms.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from safetensors import SafetensorError, safe_open

from piecework.bundle.plan import Plan
from piecework.bundle.recipes import Source, Take, castable, resolved, stored_takes, takes
from piecework.errors import WeightsError
from piecework.spec.weight_files import WeightFiles, damaged

if TYPE_CHECKING:
    from torch import Tensor

    from piecework.capture.request import CaptureRequest

DTYPES: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""The types of safetensors' headers that torch's tensors have, by their names there."""

HEADS: Final = ("lm_head.weight", "embed_out.weight")
_OLD_NAMES: Final = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


@dataclass(frozen=True)
class Wanted:
    """A constant of a model: how it is made of a checkpoint's tensors, and its type, such as "float32"."""

    source: Source
    dtype: str


@dataclass(frozen=True)
class TensorHeader:
    """What a file's header says of a tensor; the type is one of DTYPES' names, or safetensors' own for others."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Names:
    """Under which names a checkpoint has what is wanted.

    Attributes:
        renamed: the checkpoint's name of each that is called otherwise there.
        untied: names of a head that is there and not wanted, and of the tensors wanted that it must be the same as.
    """

    renamed: Mapping[str, str]
    untied: tuple[str, ...] = ()


def wanted_by(plan: Plan) -> tuple[Wanted, ...]:
    """Return what a plan's constants are made of."""
    return tuple(Wanted(r.source or Take(r.name, r.shape), r.dtype) for r in plan.recipes if not r.literal)


def wanted_by_module(request: CaptureRequest) -> tuple[Wanted, ...]:
    """Return what a module's parameters are made of, and those of its buffers that checkpoints have.

    A plan may want less: what the forward doesn't read.
    """
    saved, states = request.module.state_dict(keep_vars=True), request.states
    tensors: dict[str, Tensor] = dict(request.module.named_parameters())
    tensors |= {n: b for n, b in request.module.named_buffers() if n in saved and b.is_floating_point()}
    return tuple(
        Wanted(request.sources.get(n, Take(n, tuple(t.shape))), str(t.dtype).removeprefix("torch."))
        for n, t in tensors.items()
        if n not in states
    )


def read_headers(files: WeightFiles) -> dict[str, TensorHeader]:
    """Return what the files say of their tensors. Raises WeightsError where one can't be read, or lacks a tensor."""
    found: dict[str, TensorHeader] = {}
    for path, prefix in files.prefixes.items():
        with open_file(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  a file is no mapping
                piece = file.get_slice(name)
                code = piece.get_dtype()
                found[f"{prefix}{name}"] = TensorHeader(tuple(piece.get_shape()), DTYPES.get(code, code))
    for name in files.names:
        if name not in found:
            raise missing([name], files)
    return found


def open_file(path: Path, *, framework: str) -> Any:
    """Open a safetensors file. Raises WeightsError where it is missing or damaged."""
    try:
        return safe_open(path, framework=framework)
    except FileNotFoundError as error:
        raise WeightsError(
            asked=f"weights from {path}",
            found="no such file",
            try_="download the checkpoint again, with all its shards",
        ) from error
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error


def find_wanted(files: WeightFiles, wanted: Sequence[Wanted]) -> Names:
    """Return under which names a checkpoint has what is wanted. Tensors that nobody wants are ignored.

    Raises WeightsError where a tensor is missing, or has another shape, or a type that isn't cast to what is wanted.
    """
    headers = read_headers(files)
    old = _old_names(headers)
    headers |= {name: headers[there] for name, there in old.items()}
    renamed = _with_other_first_part(wanted, headers)
    names = headers.keys() | renamed.keys()
    found = [taken for w in wanted for taken in stored_takes(resolved(w.source, names), castable(w.dtype))]
    needed = {take.name: (take.shape, may_be) for take, may_be in found}
    head = next((head for head in HEADS if head in headers and head not in needed), None)
    alike = [] if head is None else [n for n, (shape, _) in needed.items() if shape == headers[head].shape]
    tied = {} if head is None else {name: head for name in alike if name not in names}
    renamed |= tied
    gone = [name for name in needed if name not in headers and name not in renamed]
    if gone:
        raise missing(gone, files)
    for name, (shape, may_be) in needed.items():
        _check(name, headers[renamed.get(name, name)], shape=shape, may_be=may_be)
    renamed = {**old, **{name: old.get(there, there) for name, there in renamed.items()}}
    return Names(renamed, untied=() if head is None or tied or not alike else (head, *alike))


def missing(names: Sequence[str], files: WeightFiles) -> WeightsError:
    """Return the error about tensors that are in none of the files."""
    more = f", nor {len(names) - 1} others that are needed" if len(names) > 1 else ""
    places = ", ".join(path.name for path in files.paths[:3]) + (", …" if len(files.paths) > 3 else "")
    is_head = len(names) == 1 and names[0] in HEADS
    return WeightsError(
        asked=f"tensor {names[0]}",
        found=f"no such tensor in {places}{more}",
        try_='"tie_word_embeddings": true in config.json, if the head is the embedding; else another checkpoint'
        if is_head
        else "use the checkpoint that belongs to this config.json",
    )


def _old_names(names: Collection[str]) -> dict[str, str]:
    """Return today's names for tensors that checkpoints converted from TensorFlow have under others."""
    new = {name.replace(before, after): name for name in names for before, after in _OLD_NAMES if before in name}
    return {name: there for name, there in new.items() if name not in names}


def _with_other_first_part(wanted: Iterable[Wanted], names: Collection[str]) -> dict[str, str]:
    """Return new names for a checkpoint's tensors where they lack the first part of those wanted, or have one more."""
    needed = {take.name for w in wanted for take in takes(resolved(w.source, names))}.difference(names)
    lacking = {part for part, _, rest in (name.partition(".") for name in needed) if rest in names}
    more = {part for part, _, rest in (name.partition(".") for name in names) if rest in needed}
    renamed: dict[str, str] = {}
    if len(lacking) == 1:
        renamed = {f"{part}.{name}": name for part in lacking for name in names}
    elif len(more) == 1:
        renamed = {rest: name for name in names for part, _, rest in (name.partition("."),) if part in more}
    return {name: there for name, there in renamed.items() if name not in names}


def _check(name: str, header: TensorHeader, *, shape: tuple[int, ...], may_be: frozenset[str]) -> None:
    """Raise WeightsError where a tensor isn't what is wanted."""
    if header.shape != shape:
        raise WeightsError(
            asked=f"tensor {name} with shape {shape}",
            found=f"shape {header.shape}",
            try_="use the checkpoint that belongs to this config.json",
        )
    if header.dtype not in may_be:
        raise WeightsError(
            asked=f"tensor {name} as {' or '.join(sorted(may_be))}",
            found=f"{header.dtype}, as quantized checkpoints have it",
            try_="use the checkpoint that it was quantized from",
        )
