"""`piecework.explain`: which pieces are shared by which layers, and where two layers first differ.

Of a bundle it is read; a module, or a model that has none in the store, is captured and split, and nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from piecework.bundle.bundle import Bundle, open_bundle
from piecework.bundle.facts import check
from piecework.bundle.format import MANIFEST
from piecework.bundle.store.directory import DirectoryStore
from piecework.bundle.store.interface import Store
from piecework.errors import BundleError, CaptureError, UnsupportedModelError
from piecework.foundation.environment import Environment, read_environment
from piecework.foundation.target import read_target
from piecework.report.explain import ExplainReport, bundle_subject, explain_bundle, explain_subject
from piecework.report.subject import ExplainedPlan
from piecework.spec.model_spec import ModelSpec
from piecework.spec.source import model_directory

if TYPE_CHECKING:
    from torch import nn

    from piecework.capture.request import CaptureRequest, Dim

CAPTURED: Final = "a capture: nothing was compiled"
_NO_OPTIONS: Final[Mapping[str, Any]] = {}


def explain(
    target: str | Path | Bundle | nn.Module,
    example_args: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    layers: tuple[int, int] | None = None,
    dynamic: Mapping[str, Dim] | None = None,
    opaque: Iterable[object] = (),
    states: Mapping[str, tuple[int | str, ...]] | None = None,
) -> ExplainReport:
    """Return which pieces are shared by which layers, and the first difference between those that aren't.

    Args:
        target: a bundle (opened, or its directory or ".pwb" file), a model's directory, or a module.
        example_args: for a module, as for `piecework.compile`; so are `example_kwargs`, `dynamic`, `opaque`, `states`.
        example_kwargs: see there.
        layers: two layers' numbers, to compare these two piece by piece.
        dynamic: see there.
        opaque: see there.
        states: see there.

    Raises PieceworkError where the layers don't exist, BundleError, StoreError, UnsupportedModelError, CaptureError,
    ShapeContractError.

    Example:
        >>> import torch, piecework
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 4))
        >>> report = piecework.explain(mlp, (torch.randn(3, 8),), dynamic={"rows": piecework.Dim(1, 64)})
        >>> report.num_pieces
        1
    """
    if isinstance(target, Bundle):
        return explain_bundle(target, layers=layers)
    if isinstance(target, str | Path):
        if example_args is None and example_kwargs is None:
            return explain_path(Path(target), environment=read_environment(), layers=layers)
        raise _no_module(f"the path {target} with example arguments")
    if example_args is None and example_kwargs is None:
        raise _no_module(f"a {type(target).__name__} without example arguments")
    from piecework.compiler.api import module_request  # noqa: PLC0415  a bundle is explained without a compiler

    request, arguments = module_request(
        target,
        example_args or (),
        example_kwargs or {},
        dynamic=dynamic or {},
        opaque=opaque,
        states=states or {},
    )
    return explain_subject(
        captured_subject(request, name=type(target).__qualname__, arguments=arguments), layers=layers
    )


def explain_path(
    path: Path,
    *,
    environment: Environment,
    options: Mapping[str, Any] = _NO_OPTIONS,
    layers: tuple[int, int] | None = None,
) -> ExplainReport:
    """Explain a bundle, or the model of a directory.

    Args:
        path: the bundle's directory or archive, or the model's directory or Hub id.
        environment: where the store is.
        options: what a model's bundle was or would be compiled with, as `ModelSpec.of` takes them.
        layers: see `explain`.

    Raises as `explain`.
    """
    path = model_directory(path)
    if not _is_model(path):
        return explain_bundle(open_bundle(path, extract_root=environment.store_root, verify=False), layers=layers)
    return explain_model(ModelSpec.of(path, **options), store=DirectoryStore(environment.store_root), layers=layers)


def _is_model(path: Path) -> bool:
    if not path.is_dir() or (path / MANIFEST).exists():
        return False
    if not (path / "config.json").exists():
        raise UnsupportedModelError(
            asked=f"explain {path}",
            found=f"a directory with neither {MANIFEST}, as a bundle has, nor config.json, as a model has",
            try_="give a bundle (a directory or a .pwb file) or a model's directory",
        )
    return True


def explain_model(spec: ModelSpec, *, store: Store, layers: tuple[int, int] | None = None) -> ExplainReport:
    """Explain the stored bundle of a model; where there is none that holds here, capture the model.

    Args:
        spec: which model, compiled how.
        store: where its bundle may be; nothing is written to it.
        layers: see `explain`.

    Raises as `explain`.
    """
    target = read_target()
    try:
        found = (store.get_bundle(key) for key in store.bundles(spec.key))
        bundle = next((b for b in found if b is not None and not check(b.facts, asked=spec.asked, target=target)), None)
        if bundle is None:
            note = "the store has no bundle of it with these options"
        else:
            subject = bundle_subject(bundle)
            if subject.explanation is not None:
                return explain_subject(subject, layers=layers)
            note = "its bundle in the store was compiled without explanations"
    except BundleError as error:
        note = f"its bundle in the store can't be used: {error.found}"
    from piecework.models.adapter import build_request  # noqa: PLC0415  imports transformers

    request = build_request(spec)
    return explain_subject(captured_subject(request, name=str(spec.source), notes=(note,)), layers=layers)


def captured_subject(
    request: CaptureRequest, *, name: str, arguments: Any = None, notes: Sequence[str] = ()
) -> ExplainedPlan:
    """Capture, split and dedupe; return what is to be explained. Raises CaptureError, ShapeContractError."""
    # a bundle is explained without a compiler
    from piecework.compiler.deduplicate import Forward, deduplicate  # noqa: PLC0415
    from piecework.compiler.driver import capture_variants, fallbacks  # noqa: PLC0415
    from piecework.compiler.explanations import explain_pieces  # noqa: PLC0415
    from piecework.compiler.planning import make_plan  # noqa: PLC0415
    from piecework.compiler.split import split  # noqa: PLC0415

    paths = [Forward(captured, split(captured), variant) for captured, variant in capture_variants(request)]
    pieces = deduplicate(paths)
    return ExplainedPlan(
        name=name,
        origin=CAPTURED,
        plan=make_plan(paths, pieces, artifacts=[()] * len(pieces.unique), arguments=arguments),
        explanation=explain_pieces(paths, pieces),
        notes=(*notes, *fallbacks(paths)),
    )


def _no_module(found: str) -> CaptureError:
    return CaptureError(
        asked="explain a bundle, a model's directory, or a module with example arguments",
        found=found,
        try_="piecework.explain(module, (x,), dynamic={...}), with what piecework.compile would be given",
    )
