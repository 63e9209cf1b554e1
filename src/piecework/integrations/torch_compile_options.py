"""What `torch.compile(model, backend="piecework", options={...})` takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from piecework.bundle.record import Recorder
from piecework.errors import CompileError
from piecework.spec.compile_options import BackendName


@dataclass(frozen=True)
class TorchCompileOptions:
    """Options of the torch.compile backend.

    Attributes:
        backend: "aoti" compiles the pieces, "eager" runs them operator by operator, for debugging.
        cut: operators of torch's own at which graphs are cut as well, "namespace::name".
        store: whether artifacts are looked up in the store and put there.
        recorder: is told counts ("graphs", "pieces", "unique_pieces", "compiled", "store_hits", "traced_again"),
            seconds and notes.
    """

    backend: BackendName = BackendName.AOTI
    cut: tuple[str, ...] = ()
    store: bool = True
    recorder: Recorder | None = None


def parse_options(given: Mapping[str, Any] | None, *, mode: str | None) -> TorchCompileOptions:
    """Return checked options. Raises CompileError for an unknown name, a wrong value, or a mode."""
    known = {f.name for f in fields(TorchCompileOptions)}
    if mode is not None:
        raise _refused(f"mode={mode!r}", "the backend has no modes", "leave it out")
    values: dict[str, Any] = {}
    for name, value in (given or {}).items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(sorted(known))}"
            raise _refused(f"the option {name!r}", "no such option", hint)
        values[name] = _checked(name, value)
    return TorchCompileOptions(**values)


def _checked(name: str, value: Any) -> Any:
    if name == "backend":
        names = [b.value for b in BackendName]
        if value not in names and not isinstance(value, BackendName):
            raise _refused(f"backend={value!r}", "no such backend", f"one of {', '.join(names)}")
        return BackendName(value)
    if name == "cut":
        if isinstance(value, str) or not all(isinstance(v, str) and "::" in v for v in value):
            raise _refused(f"cut={value!r}", "no list of operators", 'for example ["mylib::attention"]')
        return tuple(value)
    if name == "recorder":
        if value is not None and not isinstance(value, Recorder):
            raise _refused(
                f"a recorder of type {type(value).__name__}", "no piecework.Recorder", "piecework.Recorder()"
            )
        return value
    if not isinstance(value, bool):
        raise _refused(f"{name}={value!r}", f"a {type(value).__name__}", "True or False")
    return value


def _refused(asked: str, found: str, try_: str) -> CompileError:
    return CompileError(asked=f'torch.compile(backend="piecework") with {asked}', found=found, try_=try_)
