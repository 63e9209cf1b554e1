"""Load a bundle: verify its facts and files, open its artifacts, bind weights. No compiler is imported."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from piecework.bundle.bundle import Bundle, open_bundle
from piecework.bundle.facts import Asked, option_facts, require
from piecework.bundle.format import CONSTANTS
from piecework.bundle.manifest import corrupt
from piecework.bundle.plan import Plan, UniquePiece
from piecework.bundle.record import Record
from piecework.bundle.run.constants import TensorSource, as_source, make_constants, pack_constants
from piecework.bundle.run.eager import EagerRunner
from piecework.bundle.run.instances import open_instance, read_calls
from piecework.bundle.run.model import LoadedModel, RangeForm
from piecework.bundle.run.natives import open_natives
from piecework.bundle.run.step_calls import Run
from piecework.bundle.sealed import SealedFiles
from piecework.bundle.signatures import read_trust
from piecework.errors import BundleError, CorruptBundle
from piecework.foundation import torch_private
from piecework.foundation.environment import read_environment
from piecework.foundation.process import garbage_collection_off
from piecework.ops.ir.program import constant_name
from piecework.ops.ir.provider_order import ProviderOrder, as_order
from piecework.providers.libraries import open_kernel


@garbage_collection_off()
def load(
    bundle: str | Path | Bundle,
    *,
    weights: object,
    check_facts: bool = True,
    providers: ProviderOrder | str | Sequence[str] | None = None,
    trust: str | Path | None = None,
) -> LoadedModel:
    """Load a bundle and bind `weights` to it.

    Args:
        bundle: a bundle's directory or archive, or one that is open (its files, and who signed it, verified).
        weights: the module, a mapping of names to tensors, paths of safetensors files, or anything with `names()` and
            `get(name)`.
        check_facts: whether facts about the environment must hold (they should).
        providers: the order of providers that the bundle must have been compiled with; None takes what it has.
        trust: a file of public keys of which a bundle that is named by its path needs a signature; None takes
            `PIECEWORK_TRUST`'s, if that is set.

    Returns a model to call. Its `record` has the seconds of "verify", "plan", "weights", "pack", "open" and "bind".
    Raises CorruptBundle, StaleBundle, UntrustedBundle, WeightsError.
    """
    phases: dict[str, float] = {}
    begun = time.perf_counter()
    opened = bundle if isinstance(bundle, Bundle) else _open(Path(bundle), trust=trust)
    if providers is not None:
        wanted = option_facts({"providers": as_order(providers).text()})
        options = [f for f in opened.facts if f.kind == "option"]
        require(options, what=f"load {opened.path}", asked=Asked(wanted))
    if check_facts:
        require(opened.facts, what=f"load the bundle {opened.path}")
    phases["verify"] = _lap(begun)
    begun = time.perf_counter()
    plan = Plan.from_json(opened.plan())
    phases["plan"] = _lap(begun)
    begun = time.perf_counter()
    source = as_source(weights)
    literals = _literals(opened)
    device = plan.pieces[0].device if plan.pieces else "cpu"
    constants = make_constants(plan.recipes, source=source, literals=literals, device=device)
    phases["weights"] = _lap(begun)
    begun = time.perf_counter()
    pack_constants(plan.recipes, constants)
    phases["pack"] = _lap(begun)
    order = ProviderOrder.from_json(next((str(f.value) for f in opened.facts if (f.kind, f.name) == _ORDER), "native"))
    copies = SealedFiles()

    def path_of(name: str) -> Path:
        # a library for CUDA looks for its kernels beside itself
        return opened.sealed(name, copies=copies) if device == "cpu" else opened.artifact_path(name)

    return open_plan(plan, path_of=path_of, constants=constants, order=order, phases=phases, owned=opened)


def open_plan(
    plan: Plan,
    *,
    path_of: Callable[[str], Path],
    constants: Sequence[torch.Tensor],
    order: ProviderOrder,
    phases: Mapping[str, float] | None = None,
    owned: object = None,
) -> LoadedModel:
    """Open a plan's artifacts and bind constants to them.

    Args:
        plan: the plan.
        path_of: returns the file of an artifact.
        constants: what the plan's recipes make, packed.
        order: of providers, for what opaque ops call.
        phases: seconds of what came before.
        owned: what the model keeps alive.
    """
    begun = time.perf_counter()
    runners = _open_instances(plan, path_of)
    seconds = {**(phases or {}), "open": _lap(begun)}
    begun = time.perf_counter()
    forms = [_bind(plan, low, high, made, constants) for (low, high), made in runners.items()]
    seconds["bind"] = _lap(begun)
    kernels, notes = _open_kernels(plan, path_of)
    natives, missing = open_natives(plan, path_of, order=order)
    record = Record(phases=seconds, notes=(*notes, *missing))
    return LoadedModel(
        plan, forms=forms, constants=constants, record=record, kernels=kernels, natives=natives, owned=owned
    )


_ORDER = ("option", "providers")


def _open(path: Path, *, trust: str | Path | None) -> Bundle:
    environment = read_environment()
    policy = read_trust(environment.trust if trust is None else Path(trust))
    return open_bundle(path, extract_root=environment.store_root, trust=policy)


def _lap(begun: float) -> float:
    return time.perf_counter() - begun


def _literals(bundle: Bundle) -> Mapping[str, torch.Tensor]:
    data = bundle.constants()
    if data is None:
        return {}
    from safetensors import SafetensorError  # noqa: PLC0415  only models with computed buffers need it
    from safetensors.torch import load as load_bytes  # noqa: PLC0415

    try:
        made: dict[str, torch.Tensor] = load_bytes(data)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise corrupt(CONSTANTS, bundle=str(bundle.path), found=f"can't be read: {error}") from error
    return made


def _open_instances(plan: Plan, path_of: Callable[[str], Path]) -> dict[tuple[int, int], list[Any]]:
    """Open one runner per instance, for every range of the primary size."""
    bounds = sorted({(r.min, r.max) for p in plan.pieces for r in p.ranges})
    split = [b for b in bounds if not any(b != o and b[0] <= o[0] and o[1] <= b[1] for o in bounds)]
    opened: dict[tuple[int, int], list[Any]] = {}
    shared: dict[tuple[int, str], Any] = {}
    called: dict[str, str] = {}
    for low, high in split or [plan.sizes.get(plan.primary, (0, 0))]:
        runners = []
        for number, instance in enumerate(plan.instances):
            name = _artifact(plan.pieces[instance.piece], low, high)
            if (number, name) not in shared:
                path = path_of(name)
                if name not in called:
                    called[name] = read_calls(path, name=name)
                device = plan.pieces[instance.piece].device
                shared[number, name] = open_instance(path, name=name, device=device, calls=called[name])
            runners.append(shared[number, name])
        opened[low, high] = runners
    return opened


def _artifact(piece: UniquePiece, low: int, high: int) -> str:
    for form in piece.ranges:
        if form.min <= low and high <= form.max:
            return form.artifact
    raise CorruptBundle(
        asked=f"an artifact of piece {piece.fingerprint[:12]} for {low} to {high}",
        found="the plan has none",
        try_="compile the model again",
        file="plan.json",
    )


def _open_kernels(plan: Plan, path_of: Callable[[str], Path]) -> tuple[dict[str, Callable[..., Any]], tuple[str, ...]]:
    """Return native implementations of opaque ops, and why there are none where a kernel can't be opened."""
    kernels: dict[str, Callable[..., Any]] = {}
    notes: list[str] = []
    for name, artifact in plan.kernels.items():
        try:
            kernels.update(open_kernel(name, path_of(artifact)))
        except CorruptBundle:
            raise
        except BundleError as error:
            notes.append(f"no native kernel {name}, plain torch instead: {error.found}")
    return kernels, tuple(notes)


def _bind(plan: Plan, low: int, high: int, runners: Sequence[Any], constants: Sequence[torch.Tensor]) -> RangeForm:
    runs: list[Run] = []
    for instance, runner in zip(plan.instances, runners, strict=True):
        named = {constant_name(i): constants[c] for i, c in enumerate(instance.constants)}
        if isinstance(runner, EagerRunner):
            runner.bind(named)
        elif named:
            torch_private.bind_constants(runner, named)
        runs.append(runner.run)
    return RangeForm(low, high, tuple(runs))


__all__ = ["LoadedModel", "TensorSource", "load"]
