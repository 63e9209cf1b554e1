"""Find the bundle of a model in the store; on a miss, start the compile as a process, by command."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from piecework.errors import CompileError, PieceworkError
from piecework.foundation.target import read_target
from piecework.models.bundle_key import DEFAULT_OPTIONS, bundle_key, expected_facts
from piecework.models.config import ModelConfig
from piecework.store.bundle import Bundle, open_bundle
from piecework.store.lookup import find_bundle
from piecework.store.stores import Store


@dataclass(frozen=True)
class FoundBundle:
    """An open bundle whose files and facts were checked.

    Attributes:
        bundle: the bundle.
        compiled: whether it was a miss.
        verify_s: seconds that checking files and facts took (of the last check).
    """

    bundle: Bundle
    compiled: bool
    verify_s: float


def find_or_compile(
    config: ModelConfig, *, dtype: str, max_tokens: int, device: str, store: Store, on_note: Callable[[str], None]
) -> FoundBundle:
    """Return the model's bundle from the store, or compile it there.

    Args:
        config: the model directory's.
        dtype: type of weights and activations.
        max_tokens: most tokens in one forward pass.
        device: device type to run on, "cpu" or "cuda".
        store: the local store, which the compile's process uses as well.
        on_note: is told why a bundle was not used, and that one is being compiled.

    Raises what the compile fails with, as CompileError where it says no more.
    """
    begun = time.perf_counter()
    options = {**DEFAULT_OPTIONS, "device": device}
    expected = expected_facts(config, dtype=dtype, max_tokens=max_tokens, options=options)
    target = read_target()
    found = find_bundle(store, bundle_key(expected, target=target), report=on_note, expected=expected, target=target)
    if found is not None:
        return FoundBundle(found, compiled=False, verify_s=time.perf_counter() - begun)
    on_note("no bundle of this model in the store: compiling one")
    path = _compile(config.path, dtype=dtype, max_tokens=max_tokens, device=device)
    begun = time.perf_counter()
    return FoundBundle(open_bundle(path), compiled=True, verify_s=time.perf_counter() - begun)


def _compile(model_dir: Path, *, dtype: str, max_tokens: int, device: str) -> Path:
    command = [sys.executable, "-m", "piecework", "compile", str(model_dir), "--weights", "none"]
    command += ["--dtype", dtype, "--max-tokens", str(max_tokens), "--device", device, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {}
    if done.returncode == 0 and "bundle" in answer:
        return Path(answer["bundle"])
    raise _failed(answer)


def _failed(answer: dict[str, str]) -> PieceworkError:
    return CompileError(
        asked=answer.get("asked", "compile the model"),
        found=answer.get("found", "the compile's process failed"),
        try_=answer.get("try", "run `piecework compile MODEL --debug`"),
    )
