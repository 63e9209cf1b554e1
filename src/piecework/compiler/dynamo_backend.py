"""`torch.compile(model, backend="piecework")`: each different piece of what Dynamo captures, compiled once.

Registered with torch by this package's entry point, so nothing needs to be imported. Dynamo guards, recompiles and
breaks graphs as for any backend; this file is called with each of its graphs.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch

from piecework.bundle.record import Recorder
from piecework.capture.dynamo_whole import why_whole
from piecework.compiler.dynamo_graph import CompiledGraph, compile_graph
from piecework.compiler.jit_options import JitBackendName, parse_options
from piecework.compiler.jit_pieces import InUse, PieceSource
from piecework.errors import BackwardError, PieceworkError
from piecework.foundation.torch_private import stock_inductor

_LOG = logging.getLogger("piecework")
_AGAIN = 4
"""The hint about names is given when a graph has been traced this often."""


@final
class DynamoBackend:
    """A backend of torch.compile. Knows the pieces that are in use, so that graphs of one process share them."""

    def __init__(self) -> None:
        self._in_use: weakref.WeakValueDictionary[str, InUse] = weakref.WeakValueDictionary()
        self._seen: Counter[str] = Counter()
        self._kernels: Callable[[], object] | None = None
        self.__name__ = "piecework"

    def __call__(
        self,
        module: torch.fx.GraphModule,
        inputs: Sequence[Any],
        *,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
    ) -> Callable[..., Any]:
        """Compile one graph of Dynamo's for inference.

        What a user did wrong is raised as it is when the compiled function is called; torch would wrap what is raised
        here.
        """
        try:
            chosen = parse_options(options, mode=mode)
            recorder = chosen.recorder or Recorder()
            whole = why_whole(module.graph)
            if whole is not None:
                recorder.count("graphs")
                recorder.note(f"a graph is left whole: {whole}")
                eager = chosen.backend is JitBackendName.EAGER
                return module.forward if eager else stock_inductor(module, inputs)
            source = PieceSource(chosen, recorder, self._in_use, kernels=self._kernel_directory())
            compiled = compile_graph(module, options=chosen, recorder=recorder, source=source)
        except PieceworkError as error:
            return _raising(error)
        self._hint(compiled, recorder)
        _LOG.info("compiled a graph: %s", ", ".join(f"{n} {c}" for n, c in recorder.finish().counts.items()))
        if torch.is_grad_enabled() and any(compiled.needs_grad):
            return _without_backward(compiled.calls, compiled.needs_grad)
        return compiled.calls

    def reset(self) -> None:
        """Forget what is in use; torch calls this in `torch._dynamo.reset()`."""
        self._in_use.clear()
        self._seen.clear()
        if self._kernels is not None:
            self._kernels()
            self._kernels = None

    def _kernel_directory(self) -> Path:
        """Return a directory that goes with this backend, or at the end of the process."""
        if self._kernels is None:
            made = tempfile.mkdtemp(prefix="piecework-kernels-")
            self._kernels = weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
            self._kernel_path = Path(made)
        return self._kernel_path

    def _hint(self, compiled: CompiledGraph, recorder: Recorder) -> None:
        """Say what to do where Dynamo traces the same graph again and again, because a name in it is another."""
        if compiled.shape is None:
            return
        self._seen[compiled.shape] += 1
        if self._seen[compiled.shape] > 1:
            recorder.count("traced_again")
        if self._seen[compiled.shape] == _AGAIN:
            text = (
                f"Dynamo has traced the same graph {_AGAIN} times; its pieces are shared, but tracing takes time and "
                "torch stops at its recompile limit. Where blocks are compiled one by one and differ in the name or "
                "number that an operator takes, make that a piecework.LayerName."
            )
            recorder.note(text)
            _LOG.warning(text)


def _raising(error: PieceworkError) -> Callable[..., Any]:
    def compiled(*_inputs: Any) -> Any:
        raise error

    return compiled


class _NoBackward(torch.autograd.Function):
    """Lets results look like those of recorded operations; a backward pass through them is refused."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, made: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise BackwardError(
            asked="a backward pass through a model that piecework compiled",
            found='torch.compile(backend="piecework") compiles for inference only',
            try_="train with another backend, or detach the result",
        )


def _without_backward(compiled: Callable[..., tuple[Any, ...]], needs_grad: Sequence[bool]) -> Callable[..., Any]:
    """Let results require gradients where they would in eager mode; a backward pass says why there are none."""

    def call(*inputs: Any) -> tuple[Any, ...]:
        outputs = compiled(*inputs)
        anchor = torch.empty((), requires_grad=True)
        given = {id(i) for i in inputs}
        places = [
            i for i, (o, wanted) in enumerate(zip(outputs, needs_grad, strict=True)) if wanted and id(o) not in given
        ]
        if not places:
            return outputs
        passed: Any = _NoBackward.apply(anchor, [outputs[i] for i in places])  # type: ignore[no-untyped-call]
        changed = dict(zip(places, passed, strict=True))
        return tuple(changed.get(i, o) for i, o in enumerate(outputs))

    return call


backend = DynamoBackend()
"""What the entry point `torch_dynamo_backends: piecework` names."""
