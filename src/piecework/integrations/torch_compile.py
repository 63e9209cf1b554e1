"""`torch.compile(model, backend="piecework")`: Dynamo's graphs through the same compile as any module.

Registered with torch by this package's entry point, so nothing needs to be imported. Dynamo guards, recompiles and
breaks graphs as for any backend; this file is called with each of its graphs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

import torch

from piecework.bundle.plan import PieceStep, Plan
from piecework.bundle.record import Recorder
from piecework.bundle.run.following import FollowingModel, OpenedPlan
from piecework.bundle.sealed import SealedFiles
from piecework.bundle.store.directory import DirectoryStore
from piecework.bundle.store.interface import MemoryStore, Store
from piecework.capture.capture import InputKind
from piecework.capture.dynamo import capture_dynamo
from piecework.capture.dynamo_limits import why_whole
from piecework.compiler.backends.backend import Backend, EagerBackend
from piecework.compiler.backends.late import LateBackend
from piecework.compiler.driver import build
from piecework.compiler.setup import CompileSetup
from piecework.errors import CaptureError, CompileError, PieceworkError, StoreError
from piecework.foundation import files
from piecework.foundation.digests import digest_json
from piecework.foundation.environment import read_environment
from piecework.foundation.target import Target, read_target
from piecework.foundation.torch_private import stock_inductor
from piecework.integrations.graph_function import GraphFunction
from piecework.integrations.torch_compile_options import TorchCompileOptions, parse_options
from piecework.spec.compile_options import BackendName, CompileOptions

_LOG = logging.getLogger("piecework")
_AGAIN: Final = 4
"""The hint about names is given when a graph has been traced this often."""

Compiled = Callable[..., Any]


@final
class DynamoBackend:
    """A backend of torch.compile."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()
        self._told: set[str] = set()
        self._memory: tuple[Path, MemoryStore] | None = None
        self._target: Target | None = None
        self.__name__ = "piecework"

    def __call__(
        self,
        module: torch.fx.GraphModule,
        inputs: Sequence[Any],
        *,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
    ) -> Compiled:
        """Compile one graph of Dynamo's for inference.

        What a user did wrong is raised as it is when the compiled function is called; torch would wrap what is raised
        here.
        """
        try:
            chosen = parse_options(options, mode=mode)
            recorder = chosen.recorder or Recorder()
            recorder.count("graphs")
            whole = why_whole(module.graph)
            if whole is None:
                try:
                    return self._in_pieces(module, inputs, options=chosen, recorder=recorder)
                except (CaptureError, CompileError) as error:
                    whole = error.found
        except PieceworkError as error:
            return _raising(error)
        self._tell(recorder, f"a graph is left to Inductor whole: {whole}", once=whole)
        return module.forward if chosen.backend is BackendName.EAGER else stock_inductor(module, inputs)

    def reset(self) -> None:
        """Forget what was compiled; torch calls this in `torch._dynamo.reset()`."""
        self._seen.clear()
        self._told.clear()
        self._memory = None

    def _in_pieces(
        self,
        module: torch.fx.GraphModule,
        inputs: Sequence[Any],
        *,
        options: TorchCompileOptions,
        recorder: Recorder,
    ) -> Compiled:
        records = torch.is_grad_enabled()
        with recorder.phase("capture"):
            graph, captured = capture_dynamo(module, inputs, cut=frozenset(options.cut))
        chosen = CompileOptions(backend=options.backend, device=captured.request.device)
        store, toolchain = self._places(options, recorder)
        self._target = self._target or read_target()
        overtake_s = read_environment().overtake_s
        with store.scratch() as scratch:
            backend: Backend = LateBackend(store, root=toolchain, target=self._target, device=captured.request.device)
            if options.backend is BackendName.EAGER:
                backend = EagerBackend(scratch=scratch)
            try:
                setup = CompileSetup(chosen, backend, store, self._target, recorder, overtake_s=overtake_s)
                built = build([(captured, None)], setup)
            finally:
                backend.close()
        self._hint(built.plan, recorder)
        artifacts, copies = {artifact.name: artifact for artifact in built.artifacts}, SealedFiles()

        def path_of(name: str) -> Path:
            return copies.path(artifacts[name].path, digest=artifacts[name].digest)

        opened = OpenedPlan(built.plan, path_of, chosen.providers, captured.literals)
        weights = [i.name for i in captured.inputs if i.kind is InputKind.WEIGHT and i.name in graph.weights]
        model = FollowingModel(opened, weights)
        return GraphFunction(graph, model, weights=weights, device=captured.request.device, records=records)

    def _places(self, options: TorchCompileOptions, recorder: Recorder) -> tuple[Store, Path]:
        """Return the user's store, or one that lasts until `reset`, and the directory of the C++ toolchain."""
        home = read_environment().store_root
        usable = True
        try:
            store = DirectoryStore(home)
            with store.scratch():
                pass
            if options.store:
                return store, home / "toolchain"
        except StoreError as error:
            recorder.note(f"the store can't be used: {error.found}")
            usable = False
        if self._memory is None:
            place = home / "scratch" if usable else Path(tempfile.gettempdir()) / f"piecework-{os.getuid()}"
            files.remove_stale_scratch(place)
            stack = contextlib.ExitStack()
            root = stack.enter_context(files.scratch(place))
            self._memory = root, MemoryStore(root)
            weakref.finalize(self._memory[1], stack.close)
        root, memory = self._memory
        return memory, (home if usable else root) / "toolchain"

    def _tell(self, recorder: Recorder, text: str, *, once: str) -> None:
        recorder.note(text)
        if once not in self._told:
            self._told.add(once)
            _LOG.warning(text)

    def _hint(self, plan: Plan, recorder: Recorder) -> None:
        """Say what to do where Dynamo traces the same graph again and again, because a name in it is another."""
        of_step = (
            plan.pieces[plan.instances[s.instance].piece].fingerprint if isinstance(s, PieceStep) else s.op
            for s in plan.steps
        )
        shape = digest_json(list(of_step))
        self._seen[shape] += 1
        if self._seen[shape] > 1:
            recorder.count("traced_again")
        if self._seen[shape] == _AGAIN:
            text = (
                f"Dynamo has traced the same graph {_AGAIN} times; its pieces are shared, but tracing takes time and "
                "torch stops at its recompile limit. Where blocks are compiled one by one and differ in the name or "
                "number that an operator takes, make that a piecework.LayerName."
            )
            self._tell(recorder, text, once=text)


def _raising(error: PieceworkError) -> Compiled:
    def compiled(*_inputs: Any) -> Any:
        raise error

    return compiled


backend = DynamoBackend()
"""What the entry point `torch_dynamo_backends: piecework` names."""
