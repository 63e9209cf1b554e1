"""`piecework.eager_ops`: eager calls of IR ops run compiled bodies, made on first use and kept in the store."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, final

import torch

from piecework.bundle.record import Record, Recorder
from piecework.bundle.run.instances import load_calls, open_instance, read_library
from piecework.bundle.sealed import SealedFiles
from piecework.bundle.store.directory import DirectoryStore
from piecework.bundle.store.interface import Store
from piecework.compiler.artifacts import compile_artifacts
from piecework.compiler.backends.late import LateBackend
from piecework.compiler.eager_forms import call_forms
from piecework.compiler.natives import Native, native
from piecework.compiler.passes.lower import Lowering
from piecework.compiler.setup import CompileSetup
from piecework.errors import OpError
from piecework.foundation.environment import read_environment
from piecework.foundation.target import Target, read_target
from piecework.ops.ir.call_form import CallForm
from piecework.ops.ir.native_bodies import NativeBodies, NativeBody
from piecework.ops.ir.operator import SelectableOp
from piecework.ops.ir.provider_order import ProviderOrder, as_order
from piecework.ops.ir.selection import Choice, Selection, entering, leaving
from piecework.providers.discovery import load_providers
from piecework.spec.compile_options import CompileOptions

MOST_ROWS = 1 << 20


def eager_ops(
    *,
    compile: bool = True,
    providers: ProviderOrder | str | Sequence[str] | None = None,
    store: Store | str | Path | None = None,
) -> EagerOps:
    """Return a handle: inside `with` on it, eager calls of IR ops run bodies that are compiled on first use.

    A body serves all calls with the same dtypes, static sizes and other arguments; all sizes but the last of a tensor
    may differ from call to call, those of parameters (nn.Parameter) may not. It is looked up in the store first: what
    one process has compiled, others load. The handle owns the bodies: `close()`, or dropping it, frees them, and
    entering it again, in whatever thread or task, uses them again. Calls inside a region of `torch.compile` are traced
    into that region, as always; calls that autograd would record, and those under a mode of torch's, run uncompiled.

    Args:
        compile: False only selects the providers, as `piecework.providers` does.
        providers: the order of providers by which calls go; default: native.
        store: where compiled bodies live; default: this user's store.

    Raises OpError for rules that aren't any. A call raises CompileError where the C++ compiler fails, StoreError.

    Example:
        >>> import torch, piecework
        >>> from piecework.ops.norms import rms_norm
        >>> ops = piecework.eager_ops(compile=False)
        >>> with ops:
        ...     normed = rms_norm(torch.ones(2, 4))
        >>> ops.close()
    """
    order = as_order(providers)
    opened = DirectoryStore(Path(store)) if isinstance(store, (str, Path)) else store
    return EagerOps(order, absent=load_providers(order.names).absent, store=opened, compile=compile)


@final
class EagerOps:
    """A handle of bodies; see `eager_ops`."""

    def __init__(
        self,
        order: ProviderOrder,
        *,
        absent: Mapping[str, str],
        store: Store | None,
        compile: bool,
    ) -> None:
        self._recorder = Recorder()
        self._maker = _Maker(store, absent=absent, recorder=self._recorder)
        self._bodies = NativeBodies(order, missing=self._maker.make) if compile else None
        self._owner = object()
        self._selection = Selection(order, absent, self._bodies, owner=self._owner)
        self._mutex = threading.Lock()
        self._num_open = 0
        self._closed = False
        weakref.finalize(self, self._maker.close)

    @property
    def record(self) -> Record:
        """What happened so far: counts "compiled" and "store_hits", seconds, and notes on what can't be compiled."""
        return self._recorder.finish()

    @property
    def compiled(self) -> tuple[str, ...]:
        """The compiled bodies, for people: "silu_mul(bfloat16[s0, 64], bfloat16[s0, 64])"."""
        bodies = () if self._bodies is None else self._bodies.bodies
        return tuple(body.form.text() for body in bodies if body.compiled)

    @property
    def fallbacks(self) -> Mapping[str, int]:
        """How many calls ran uncompiled, by what they were."""
        return {} if self._bodies is None else self._bodies.fallbacks

    def __enter__(self) -> EagerOps:
        if self._closed:
            raise OpError(asked="enter a block of compiled operators", found="its handle is closed", try_="another one")
        with self._mutex:
            self._num_open += 1
        entering(self._selection)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        leaving(self._owner)
        with self._mutex:
            self._num_open -= 1
            if not self._num_open:
                self._maker.close()  # the compiler's processes need memory

    def close(self) -> None:
        """Free the bodies; calls in blocks that are still open run uncompiled."""
        self._closed = True
        if self._bodies is not None:
            self._bodies.clear()
        self._maker.close()


@final
class _Maker:
    """Compiles bodies; keeps none of those that it has made."""

    def __init__(self, store: Store | None, *, absent: Mapping[str, str], recorder: Recorder) -> None:
        self._given_store = store
        self._absent = absent
        self._recorder = recorder
        self._told: set[str] = set()
        self._lowerings: dict[ProviderOrder, Lowering] = {}
        self._target: Target | None = None
        self._backend: LateBackend | None = None
        self._mutex = threading.Lock()

    def make(self, op: SelectableOp, values: Sequence[Any], choice: Choice, order: ProviderOrder) -> NativeBody | None:
        """Return what serves calls with such arguments; see `ops.native_bodies.Missing`."""
        forms = call_forms(op, values, most=MOST_ROWS)
        if isinstance(forms, str):
            self._tell(f"{op.short_name} runs uncompiled: {forms}")
            return None
        if not choice.implementation.inlined:
            return NativeBody(forms[0], provider=choice.provider)
        why = ""
        for form in forms:
            with _untouched():
                made = self._lowered(form, order)
                if isinstance(made, str):
                    why = made
                elif made.piece is None or made.provider != choice.provider:
                    why = f"for some numbers of rows {choice.provider}, for others {made.provider}"
                else:
                    body = self._compiled(made, order)
                    if body is not None:
                        return body
                    why = "see above"
        self._tell(f"{forms[0].text()} runs uncompiled: {why}")
        return NativeBody(forms[0], provider=choice.provider)

    def close(self) -> None:
        """End the compiler's processes."""
        with self._mutex:
            backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def _tell(self, note: str) -> None:
        if note not in self._told:
            self._told.add(note)
            self._recorder.note(note)

    def _lowered(self, form: CallForm, order: ProviderOrder) -> Native | str:
        lowering = self._lowerings.setdefault(order, Lowering(order, self._absent))
        try:
            return native(form, ops=(), lowering=lowering)
        except OpError as error:
            return error.found
        except (RuntimeError, TypeError, ValueError, IndexError) as error:  # the call is wrong, or for such sizes
            return str(error).partition("\n")[0]

    def _compiled(self, made: Native, order: ProviderOrder) -> NativeBody | None:
        """Return the body, or None where its code would hold for a part of its sizes only."""
        assert made.piece is not None
        environment = read_environment()
        store = self._given_store or DirectoryStore(environment.store_root)
        self._target = self._target or read_target()
        device = made.program.inputs[0].device
        with self._mutex:
            if self._backend is None or self._backend.device != device:
                previous, self._backend = (
                    self._backend,
                    LateBackend(store, root=environment.toolchain_root, target=self._target, device=device),
                )
                if previous is not None:
                    previous.close()
            backend = self._backend
        options, overtake_s = CompileOptions(providers=order), environment.overtake_s
        setup = CompileSetup(options, backend, store, self._target, self._recorder, overtake_s=overtake_s)
        (found,) = compile_artifacts([made.piece], setup, declared=None, optional=1)
        for artifact in found.values():
            copies = SealedFiles()
            path = copies.path(artifact.path, digest=artifact.digest)
            library = read_library(path, name=artifact.name)
            load_calls(library)
            runner = open_instance(library, device=device)
            return NativeBody(made.form, provider=made.provider, run=runner.run)
        return None


@contextlib.contextmanager
def _untouched() -> Any:
    """Trace as if the caller had no settings of torch's: inference tensors can't be traced."""
    with torch.inference_mode(False), torch.no_grad():
        yield
