"""What is chosen for an engine beside its model's spec: sizes, weights and a given bundle. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from piecework.engine.profile_options import ProfileOptions
from piecework.errors import RequestError
from piecework.spec.option import Declared, at_least_one, declared_options, option, read_options

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?)[bB]?")


class WhileCompiling(Enum):
    """What a start does while a bundle is compiled: run with the eager backend, or wait."""

    EAGER = "eager"
    WAIT = "wait"


def parse_size(text: str | int) -> int:
    """Return the bytes of "500MB" (powers of 1000), "4GiB", "4G" (powers of 1024), or a number. Raises ValueError."""
    given = str(text).strip()
    found = _SIZE.fullmatch(given)
    if found is None:
        raise ValueError(f"{text!r} is no size, such as 500MB or 4GiB")
    number, unit, binary = found.groups()
    decimal = unit and not binary and given[-1] in "bB"
    size = int(float(number) * (1000 if decimal else 1024) ** " kmgt".index(unit.lower() or " "))
    if size < 1:
        raise ValueError(f"{text!r} is no byte at all")
    return size


def _fraction(text: str | float) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{value} is not above 0 and at most 1")
    return value


@dataclass(frozen=True)
class EngineOptions:
    """What is chosen for an engine.

    Attributes:
        max_seqs: most sequences in one forward pass; None for the most that the bundle takes.
        max_model_len: the longest sequence in tokens; None for the model's.
        kv_cache_memory: bytes of the KV cache; None for `memory_fraction`.
        memory_fraction: the KV cache's share of the memory that is free once the model is loaded; None for 0.5 of the
            host's or 0.9 of a GPU's.
        prefix_caching: whether a prompt's beginning is taken from the KV cache where it is there.
        while_compiling: what is done without a bundle until there is one.
        bundle: use this one instead of the store's.
        trust: the file of public keys of which a bundle that wasn't compiled into the store needs a signature, or
            "require" for the default one; None for the environment's.
        random_weights: a seed for random weights; the directory then needs no safetensors.
        chat_template: a file with the template of conversations; None for the model's.
        threads: how many threads of this process compute; None for `OMP_NUM_THREADS`, else the physical cores within
            the CPU quota of its control groups.
        kv_cache_tokens: the KV cache holds one sequence of so many tokens, whatever memory there is.
        profile: write a torch profiler trace of some forwards, with pieces and layers by name.
    """

    max_seqs: int | None = option(
        None,
        "most sequences in one forward pass",
        metavar="N",
        default_text="what the bundle takes",
        read=at_least_one,
    )
    max_model_len: int | None = option(
        None,
        "the longest sequence, prompt and continuation together, in tokens",
        metavar="N",
        default_text="the model's",
        read=at_least_one,
    )
    kv_cache_memory: int | None = option(
        None,
        "the KV cache's size, such as 4GiB",
        flag="--kv-memory",
        metavar="SIZE",
        default_text="--memory-fraction",
        read=parse_size,
    )
    memory_fraction: float | None = option(
        None,
        "the KV cache's part of the memory that weights leave free",
        metavar="F",
        default_text="0.5; cuda: 0.9",
        read=_fraction,
    )
    prefix_caching: bool = option(
        True,
        "compute every prompt from its beginning",
        flag="--no-prefix-caching",
        default_text="take what the KV cache holds",
    )
    while_compiling: WhileCompiling = option(
        WhileCompiling.WAIT,
        "without a bundle: serve more slowly meanwhile, or let clients wait",
        choices=tuple(way.value for way in WhileCompiling),
        read=WhileCompiling,
        write=lambda way: way.value,
    )
    bundle: Path | None = option(
        None, "use this bundle instead of the store's", metavar="BUNDLE", default_text="the store's", read=Path
    )
    trust: Path | None = option(
        None,
        "use no bundle from elsewhere that isn't signed with a key of this file, or of the default one with `require`",
        metavar="FILE",
        default_text="$PIECEWORK_TRUST",
        read=Path,
    )
    random_weights: int | None = option(
        None,
        "use random weights; the directory needs no safetensors",
        metavar="SEED",
        default_text="the directory's",
        read=int,
    )
    chat_template: Path | None = option(
        None, "a chat template in Jinja, instead of the model's", metavar="FILE", default_text="the model's", read=Path
    )
    threads: int | None = option(
        None,
        "how many threads compute",
        metavar="N",
        default_text="$OMP_NUM_THREADS, else the physical cores within the CPU quota",
        read=at_least_one,
    )
    kv_cache_tokens: int | None = None
    profile: ProfileOptions | None = None


def engine_options(*names: str) -> tuple[Declared, ...]:
    """Return the options of an engine of these names, in this order; all of them where none is named."""
    declared = {d.name: d for d in declared_options(EngineOptions)}
    return tuple(declared[name] for name in names or declared)


def read_engine_options(
    given: Mapping[str, Any], *, kv_cache_tokens: int | None = None, profile: ProfileOptions | None = None
) -> EngineOptions:
    """Return the engine's options among `given`, as a command line or Python has them. Raises RequestError."""
    try:
        read = read_options(EngineOptions, given)
    except ValueError as error:
        raise RequestError(asked="an engine", found=str(error), try_="another value") from error
    return EngineOptions(**read, kv_cache_tokens=kv_cache_tokens, profile=profile)
