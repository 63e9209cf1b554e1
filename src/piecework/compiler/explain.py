"""`piecework.explain`: which pieces are shared by which layers, and where two layers first differ.

Of a bundle it is read; a module, or a model that has none in the store, is captured and split, and nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piecework.bundle.bundle import Bundle, open_bundle
from piecework.bundle.facts import require
from piecework.bundle.format import MANIFEST
from piecework.bundle.store.directory import DirectoryStore
from piecework.bundle.store.interface import Store
from piecework.compiler.options import CompileOptions
from piecework.errors import BundleError, CaptureError, UnsupportedModelError
from piecework.foundation.environment import read_environment
from piecework.foundation.target import read_target
from piecework.models.bundle_key import DEFAULT_MAX_TOKENS, bundle_key, expected_facts
from piecework.models.config import ModelConfig, read_config
from piecework.models.latent_config import DEFAULT_KV_CACHE_DTYPE, DEFAULT_MLA
from piecework.report.explain import ExplainReport, bundle_subject, explain_bundle, explain_subject
from piecework.report.subject import Subject

if TYPE_CHECKING:
    from torch import nn

    from piecework.capture.request import CaptureRequest, Dim

CAPTURED = "a capture: nothing was compiled"


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
            return explain_path(Path(target), layers=layers)
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
    dtype: str | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    options: CompileOptions | None = None,
    mla: str = DEFAULT_MLA,
    kv_cache_dtype: str = DEFAULT_KV_CACHE_DTYPE,
    layers: tuple[int, int] | None = None,
) -> ExplainReport:
    """Explain a bundle, or the model of a directory.

    Args:
        path: the bundle's directory or archive, or the model's directory.
        dtype: of a model's weights; default: the config's.
        max_tokens: most tokens in one forward pass of a model.
        options: what a model's bundle was or would be compiled with.
        mla: the same, for models with latent attention: "exposed" or "opaque".
        kv_cache_dtype: the same: "auto", or "fp8" for these models.
        layers: see `explain`.

    Raises as `explain`.
    """
    environment = read_environment()
    if not _is_model(path):
        return explain_bundle(open_bundle(path, extract_root=environment.store_root, verify=False), layers=layers)
    config = read_config(path)
    return explain_model(
        config,
        dtype=dtype or config.dtype,
        max_tokens=max_tokens,
        options=options or CompileOptions(),
        store=DirectoryStore(environment.store_root),
        mla=mla,
        kv_cache_dtype=kv_cache_dtype,
        layers=layers,
    )


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


def explain_model(
    config: ModelConfig,
    *,
    dtype: str,
    max_tokens: int,
    options: CompileOptions,
    store: Store,
    mla: str = DEFAULT_MLA,
    kv_cache_dtype: str = DEFAULT_KV_CACHE_DTYPE,
    layers: tuple[int, int] | None = None,
) -> ExplainReport:
    """Explain the stored bundle of a model; where there is none that holds here, capture the model.

    Args:
        config: the model directory's.
        dtype: type of weights and activations.
        max_tokens: most tokens in one forward pass.
        options: what the bundle was or would be compiled with.
        store: where its bundle may be; nothing is written to it.
        mla: for models with latent attention, "exposed" or "opaque".
        kv_cache_dtype: "auto", or "fp8" for these models.
        layers: see `explain`.

    Raises as `explain`.
    """
    target = read_target()
    latent = {"mla": mla, "kv_cache_dtype": kv_cache_dtype}
    expected = expected_facts(config, dtype=dtype, max_tokens=max_tokens, options=options.facts(), **latent)
    try:
        bundle = store.get_bundle(bundle_key(expected, target=target))
        if bundle is None:
            note = "the store has no bundle of it with these options"
        else:
            require(bundle.facts, asked=f"explain the bundle {bundle.path}", expected=expected, target=target)
            subject = bundle_subject(bundle)
            if subject.explanation is not None:
                return explain_subject(subject, layers=layers)
            note = "its bundle in the store was compiled without explanations"
    except BundleError as error:
        note = f"its bundle in the store can't be used: {error.found}"
    from piecework.models.adapter import build_causal_lm  # noqa: PLC0415  imports transformers

    request = build_causal_lm(config.path, dtype=dtype, max_tokens=max_tokens, device=options.device, **latent)
    return explain_subject(captured_subject(request, name=str(config.path), notes=(note,)), layers=layers)


def captured_subject(
    request: CaptureRequest, *, name: str, arguments: Any = None, notes: Sequence[str] = ()
) -> Subject:
    """Capture, split and dedupe; return what is to be explained. Raises CaptureError, ShapeContractError."""
    # a bundle is explained without a compiler
    from piecework.compiler.deduplicate import Forward, deduplicate  # noqa: PLC0415
    from piecework.compiler.driver import capture_variants  # noqa: PLC0415
    from piecework.compiler.explanations import explain_pieces  # noqa: PLC0415
    from piecework.compiler.planning import make_plan  # noqa: PLC0415
    from piecework.compiler.split import split  # noqa: PLC0415

    paths = [Forward(captured, split(captured), variant) for captured, variant in capture_variants(request)]
    pieces = deduplicate(paths)
    known = dict.fromkeys(note for path in paths for note in path.captured.stacks.notes)
    return Subject(
        name=name,
        origin=CAPTURED,
        plan=make_plan(paths, pieces, artifacts=[()] * len(pieces.unique), arguments=arguments),
        explanation=explain_pieces(paths, pieces),
        notes=(*notes, *known),
    )


def _no_module(found: str) -> CaptureError:
    return CaptureError(
        asked="explain a bundle, a model's directory, or a module with example arguments",
        found=found,
        try_="piecework.explain(module, (x,), dynamic={...}), with what piecework.compile would be given",
    )
