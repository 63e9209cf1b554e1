"""The `jit` backend: pieces of a Dynamo graph, compiled by Inductor, kept in the store, run where they were asked for.

Unlike `aoti`, an artifact may call custom operators from inside a piece, and runs in this process only. It is a zip
file of the cache directory in which Inductor compiled the piece, with one member of ours, `piece.json`: the conditions
on sizes that the code relies on, and the lifted operators that it calls. Loading it lets torch unpickle its own
entries, so a store is for those who trust whoever writes to it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from piecework.bundle.facts import package_version
from piecework.bundle.store.interface import Store
from piecework.capture.dynamo_module import PieceModule
from piecework.capture.dynamo_text import DescribedPiece
from piecework.compiler.backends.toolchain import find_toolchain
from piecework.errors import CompileError, StoreError
from piecework.foundation.digests import digest_json
from piecework.foundation.environment import read_environment
from piecework.foundation.target import read_target
from piecework.foundation.torch_private import (
    ambient_mode,
    compile_standalone,
    inductor_settings,
    load_standalone,
    parse_operator,
    trusted_instructions,
    uses_custom_passes,
)
from piecework.ops.ir.lifted import lifted_operator

_META = "piece.json"
_KEPT = (".py", ".cubin", ".ptx", ".json")
_FORMAT = 1


@dataclass(frozen=True)
class JitPiece:
    """A compiled piece: what to call, and the conditions on sizes ("Ne(s0, 8)") under which it may be called."""

    run: Callable[..., Sequence[Any]]
    conditions: tuple[str, ...]


def jit_key(described: DescribedPiece, ranges: Mapping[str, Sequence[int]], *, eager: bool = False) -> str | None:
    """Return the key of a piece's artifact, or None where it can't be shared.

    Args:
        described: the piece.
        ranges: bounds of the text's sizes.
        eager: whether it is run operator by operator and not compiled.
    """
    if described.text is None:
        return None
    if eager:
        return "eager-" + digest_json(described.text)
    if uses_custom_passes():
        return None
    target = read_target()
    settings = {name: repr(value) for name, value in sorted(inductor_settings().items())}
    facts = {
        "format": _FORMAT,
        "torch": package_version("torch"),
        "isa": target.fact,
        "machine": target.machine,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "inductor": digest_json(settings),
        "mode": ambient_mode(),
    }
    return "jit-" + digest_json({"piece": described.text, "ranges": {n: list(r) for n, r in ranges.items()}, **facts})


def compile_jit(
    made: PieceModule,
    described: DescribedPiece,
    *,
    kernels: Path,
    store: Store | None,
    key: str | None,
    report: Callable[[str], None],
) -> JitPiece:
    """Compile a piece, and put it into the store.

    Args:
        made, described: the piece.
        kernels: a directory with the kernels of other pieces, which may have some in common with this one; its own are
            added.
        store, key: where to put the artifact; either may be None.
        report: is told of a piece that can't be stored.

    Raises CompileError.
    """
    with tempfile.TemporaryDirectory(prefix="piecework-jit-") as scratch:
        directory = Path(scratch)
        _link_libraries(kernels, into=directory)
        try:
            with _quick_inductor():
                compiled = compile_standalone(made.module, made.inputs, directory=directory, options=_OPTIONS)
        except Exception as error:
            raise CompileError(
                asked=f"compile a piece of {len(described.piece.nodes)} operators",
                found=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}",
                try_='options={"backend": "eager"} runs the pieces without compiling them',
            ) from error
        _link_libraries(directory, into=kernels)
        conditions = tuple(sorted({g.expr for g in made.session.narrowing_guards()}))
        if store is not None and key is not None:
            if compiled.is_saved:
                meta = {
                    "format": _FORMAT,
                    "conditions": list(conditions),
                    "lifted": [[str(c.overload), list(c.positions)] for c in described.lifted],
                }
                archive = directory / "artifact.zip"
                _pack(directory, meta, kernels=compiled.kernels, to=archive)
                try:
                    store.put_artifact(key, content=archive)
                except StoreError as error:
                    report(f"a piece can't be stored: {error.found}")
            else:
                report("a piece can't be stored: torch has no cache entry for it")
    return JitPiece(compiled.run, conditions)


def load_jit(path: Path) -> JitPiece:
    """Load a stored artifact, whose digest was checked. Raises CompileError where torch refuses it."""
    with tempfile.TemporaryDirectory(prefix="piecework-jit-") as scratch:
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(scratch)
            meta = json.loads((Path(scratch) / _META).read_text())
            for name, positions in meta["lifted"]:
                lifted_operator(parse_operator(name), positions)
            with _quick_inductor():
                run = load_standalone(Path(scratch), options=_OPTIONS)
            return JitPiece(run, tuple(meta["conditions"]))
        except Exception as error:
            raise CompileError(
                asked="load a compiled piece from the store", found=f"{type(error).__name__}: {error}"
            ) from error


_OPTIONS: Mapping[str, Any] = {"cpp_cache_precompile_headers": False}
"""Inductor settings; a piece has few kernels, and headers that are precompiled don't pay for those."""

_KNOWS_ALL = 11
"""The first version of g++ that knows the instructions of every CPU that Inductor generates for, but amx_fp16."""


@contextlib.contextmanager
def _quick_inductor() -> Iterator[None]:
    """Inside, Inductor doesn't try out what is known."""
    with trusted_instructions() if _trusts_compiler() else contextlib.nullcontext():
        yield


@functools.cache
def _trusts_compiler() -> bool:
    if read_target().isa == "baseline" or read_target().machine != "x86_64":
        return False
    try:
        version = find_toolchain(Path(), compiler=read_environment().compiler).version
    except CompileError:
        return False  # pieces that are stored don't need it
    major = re.search(r"(\d+)\.\d+(\.\d+)?$", version)
    return version.startswith("g++") and major is not None and int(major.group(1)) >= _KNOWS_ALL


def _link_libraries(source: Path, *, into: Path) -> None:
    """Give another directory the libraries of this one, under the same names."""
    for library in source.rglob("*.so"):
        target = into / library.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.link(library, target)


def _pack(directory: Path, meta: Mapping[str, Any], *, kernels: frozenset[str], to: Path) -> None:
    with zipfile.ZipFile(to, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_META, json.dumps(meta, sort_keys=True))
        for file in sorted(directory.rglob("*")):
            name = file.relative_to(directory)
            if file.is_file() and _is_kept(name, kernels=kernels):
                archive.write(file, str(name))


def _is_kept(name: Path, *, kernels: frozenset[str]) -> bool:
    if name.suffix == ".so":
        return name.name.partition(".")[0] in kernels
    return name.parts[0] in {"aotautograd", "fxgraph", "triton"} or name.suffix in _KEPT
