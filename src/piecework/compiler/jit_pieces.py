"""Where the compiled pieces of a Dynamo graph come from: in use already, in the store, or compiled now."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from piecework.bundle.record import Recorder
from piecework.bundle.store.directory import DirectoryStore
from piecework.bundle.store.interface import Kind, Store
from piecework.bundle.store.lookup import find_artifact
from piecework.capture.dynamo_module import SizeRange, piece_module, plain_module
from piecework.capture.dynamo_split import example
from piecework.capture.dynamo_text import DescribedPiece, runs_eagerly
from piecework.compiler.jit import JitPiece, compile_jit, jit_key, load_jit
from piecework.compiler.jit_options import JitBackendName, JitOptions
from piecework.errors import PieceworkError, StoreError
from piecework.foundation.environment import read_environment
from piecework.foundation.torch_private import holds, size_bounds

Run = Callable[..., Sequence[Any]]
"""Runs a piece: inputs, then lifted values."""


@dataclass(frozen=True)
class InUse:
    """A piece that some graph uses; the backend knows it weakly."""

    piece: JitPiece
    __weakref__: Any = None


@final
class PieceSource:
    """Gives the functions of one graph's pieces.

    Args:
        options: of the backend.
        recorder: is told counts, seconds and notes.
        in_use: pieces of this process's graphs, by key; added to.
        kernels: a directory for the kernels that pieces may have in common; added to.
    """

    def __init__(
        self,
        options: JitOptions,
        recorder: Recorder,
        in_use: weakref.WeakValueDictionary[str, InUse],
        *,
        kernels: Path,
    ) -> None:
        self._kernels = kernels
        self._options = options
        self._recorder = recorder
        self._in_use = in_use
        self._store = _open_store(recorder) if options.store else None
        self._here: dict[str, Run] = {}

    def run(self, described: DescribedPiece) -> Run:
        """Return the function of a piece: one that is in use, or in the store, or made now."""
        self._recorder.count("pieces")
        why_eager = runs_eagerly(described.piece)
        if why_eager is not None:
            self._recorder.note(f"a piece runs eagerly: it {why_eager}")
        eager = self._options.backend is JitBackendName.EAGER or why_eager is not None
        ranges = self._ranges(described)
        key = jit_key(described, {n: (r.low, r.high) for n, r in ranges.items()}, eager=eager)
        if key is not None and key in self._here:
            return self._here[key]
        if key is None:
            self._recorder.note(f"a piece is shared with no other: {described.why_not or 'Inductor has custom passes'}")
            self._recorder.count("unique_pieces")
            return self._made(described, ranges=ranges, key=None, eager=eager).run
        shared = self._in_use.get(key)
        if shared is not None:
            self._recorder.count("in_use")
        else:
            self._recorder.count("unique_pieces")
            stored = self._stored(key) if described.is_storable and not eager else None
            shared = InUse(stored or self._made(described, ranges=ranges, key=key, eager=eager))
            self._in_use[key] = shared
        if not self._applies(shared.piece, described):
            self._recorder.note("a piece that is there already does not hold for these sizes")
            return self._made(described, ranges=ranges, key=None, eager=eager).run
        return self._here.setdefault(key, _holding(shared))

    def _ranges(self, described: DescribedPiece) -> dict[str, SizeRange]:
        bounds: dict[str, tuple[int, int, int]] = {}
        for node in described.piece.inputs:
            value = example(node)
            sizes = [*value.shape, *value.stride()] if isinstance(value, torch.Tensor) else [value]
            for size in sizes:
                if isinstance(size, torch.SymInt):
                    bounds.update(size_bounds(size))
        return {ours: SizeRange(*bounds[theirs]) for theirs, ours in described.symbols.items()}

    def _stored(self, key: str) -> JitPiece | None:
        if self._store is None:
            return None
        try:
            artifact = find_artifact(self._store, key, report=self._recorder.note)
        except StoreError as error:
            self._give_up(error)
            return None
        if artifact is None:
            return None
        try:
            with self._recorder.phase("load"):
                found = load_jit(artifact.path)
        except PieceworkError as error:
            if "InvalidCxxCompiler" in error.found:  # torch asks for it to name its files; the artifact is good
                self._recorder.note("torch loads no stored piece without a C++ compiler")
                return None
            self._store.set_aside(Kind.ARTIFACT, key, reason=error.found)
            self._recorder.note(f"set aside the artifact {key}: {error.found}")
            return None
        self._recorder.count("store_hits")
        return found

    def _give_up(self, error: StoreError) -> None:
        """Go on without a store."""
        self._store = None
        self._recorder.note(f"the store can't be used: {error.found}")

    def _made(
        self, described: DescribedPiece, *, ranges: Mapping[str, SizeRange], key: str | None, eager: bool
    ) -> JitPiece:
        self._recorder.count("compiled")
        if eager:
            return JitPiece(plain_module(described), ())
        made = piece_module(described, ranges=ranges)
        store = self._store if described.is_storable else None
        piece = compile_jit(made, described, kernels=self._kernels, store=store, key=key, report=self._recorder.note)
        self._applies(piece, described)  # the frame is guarded by what the code relies on
        return piece

    def _applies(self, piece: JitPiece, described: DescribedPiece) -> bool:
        """Whether the conditions of a compiled piece hold here; the frame is guarded by them."""
        if not piece.conditions:
            return True
        sizes: dict[str, torch.SymInt] = {}
        for node in described.piece.inputs:
            value = example(node)
            for size in [*value.shape, *value.stride()] if isinstance(value, torch.Tensor) else [value]:
                if isinstance(size, torch.SymInt) and str(size.node.expr) in described.symbols:
                    sizes[described.symbols[str(size.node.expr)]] = size
        return all(holds(condition, sizes) for condition in piece.conditions)


def _open_store(recorder: Recorder) -> Store | None:
    try:
        return DirectoryStore(read_environment().store_root)
    except StoreError as error:
        recorder.note(f"there is no store: {error.found}")
        return None


def _holding(shared: InUse) -> Run:
    """Return the piece's function, which keeps `shared` alive."""
    run = shared.piece.run

    def call(*args: Any, _shared: InUse = shared) -> Sequence[Any]:
        return run(*args)

    return call
