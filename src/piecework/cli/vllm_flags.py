"""vLLM's flags at `piecework serve`: taken as ours where they mean the same, refused with ours where they don't."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

ALIASES: Final[Mapping[str, str]] = {
    "--max-num-seqs": "--max-seqs",
    "--max-num-batched-tokens": "--max-tokens",
    "--kv-cache-memory-bytes": "--kv-memory",
    "--no-enable-prefix-caching": "--no-prefix-caching",
}
"""Flags of another name."""

NEEDLESS: Final = frozenset(
    {
        "--enable-auto-tool-choice",
        "--enable-chunked-prefill",
        "--enable-prefix-caching",
        "--disable-log-requests",
        "--no-enable-log-requests",
        "--disable-log-stats",
    }
)
"""Flags without a value that ask for what the server does anyway."""

VALUES: Final[Mapping[str, Mapping[str, str | None]]] = {
    "--dtype": {"auto": None, "half": "float16", "float": "float32"},
    "--tensor-parallel-size": {"1": None},
    "--pipeline-parallel-size": {"1": None},
    "--data-parallel-size": {"1": None},
}
"""Values of flags that are spelt otherwise here, or are what happens without the flag (None)."""

UNUSED: Final = frozenset({"--reasoning-parser"})
"""Flags with a value that follows from something else here."""

REFUSED: Final[Mapping[str, str]] = {
    "--gpu-memory-utilization": "use --memory-fraction (the KV cache's part of what weights leave free) or --kv-memory",
    "--tensor-parallel-size": "one process computes a model",
    "--pipeline-parallel-size": "one process computes a model",
    "--data-parallel-size": "start several servers behind a proxy",
    "--trust-remote-code": "no code of a checkpoint is run",
    "--enforce-eager": "use --backend eager",
    "--quantization": "weights are taken as the checkpoint has them",
    "--tokenizer": "the model directory's is used",
    "--enable-log-requests": "use --log-requests",
    "--ssl-keyfile": "put a proxy that does TLS before the server",
    "--ssl-certfile": "put a proxy that does TLS before the server",
    "--task": "what a model does follows from its config.json",
    "--runner": "what a model does follows from its config.json",
}
"""Flags that mean nothing here, and what to do instead."""


class RefusedFlag(ValueError):
    """A flag of vLLM's that has no counterpart; its text says what to do."""


def as_ours(arguments: Sequence[str]) -> list[str]:
    """Return arguments of `serve` with vLLM's flags as ours. Raises RefusedFlag.

    `--model MODEL` becomes MODEL.
    """
    made: list[str] = []
    left = list(arguments)
    while left:
        word = left.pop(0)
        flag, equals, value = word.partition("=")
        if flag in VALUES.keys() | UNUSED and not equals and left:
            value = left.pop(0)
        if flag == "--model":
            made += [value] if equals else []
        elif flag in NEEDLESS | UNUSED:
            continue
        elif flag in VALUES:
            made += _with_value(flag, value)
        elif flag in REFUSED:
            raise RefusedFlag(f"{flag}: {REFUSED[flag]}")
        else:
            made += [ALIASES.get(flag, flag) + equals + value]
    return made


def _with_value(flag: str, value: str) -> list[str]:
    """Return a flag with its value as ours, nothing where it is what happens anyway. Raises RefusedFlag."""
    ours = VALUES[flag].get(value, value)
    if ours is None:
        return []
    if flag in REFUSED:
        raise RefusedFlag(f"{flag} {value}: {REFUSED[flag]}")
    return [flag, ours] if value else [flag]
