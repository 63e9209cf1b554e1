"""Load a bundle: verify its facts and files, open its artifacts, bind weights. No compiler is imported."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from piecework.bundle.bundle import Bundle, open_bundle
from piecework.bundle.check_plan import artifact_for, check_plan, forms
from piecework.bundle.facts import Asked, option_facts, require
from piecework.bundle.format import CONSTANTS, MANIFEST
from piecework.bundle.manifest import corrupt
from piecework.bundle.plan import Plan
from piecework.bundle.record import Record
from piecework.bundle.run.check_artifacts import check_artifacts
from piecework.bundle.run.constants import TensorSource, as_source, make_constants, pack_constants
from piecework.bundle.run.eager import EagerRunner
from piecework.bundle.run.instances import Library, load_calls, open_instance, read_library
from piecework.bundle.run.model import LoadedModel, RangeForm
from piecework.bundle.run.natives import open_natives
from piecework.bundle.run.step_calls import Run
from piecework.bundle.sealed import SealedFiles
from piecework.bundle.signatures import read_trust
from piecework.errors import BundleError, CorruptBundle, OpError
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
        trust: a file of public keys of which a bundle that is named by its path needs a signature, or "require" for
            the default one; None takes `PIECEWORK_TRUST`'s, if that is set.

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
    plan = read_plan(opened)
    device = plan.pieces[0].device if plan.pieces else "cpu"
    copies = SealedFiles()

    def path_of(name: str) -> Path:
        # a library for CUDA looks for its kernels beside itself
        return opened.sealed(name, copies=copies) if device == "cpu" else opened.artifact_path(name)

    libraries = check_artifacts(plan, path_of, seed=opened.digest)
    order = _order(opened)
    phases["plan"] = _lap(begun)
    begun = time.perf_counter()
    source = as_source(weights)
    literals = _literals(opened, plan)
    names = {given.name for given in plan.inputs if given.recipe is not None}
    if names:  # of a buffer that no checkpoint has, the bundle knows the first value only
        own = {name: source.get(name) for name in names.intersection(source.names())}
        literals = {**literals, **own}
    constants = make_constants(plan.recipes, source=source, literals=literals, device=device)
    phases["weights"] = _lap(begun)
    begun = time.perf_counter()
    pack_constants(plan.recipes, constants)
    phases["pack"] = _lap(begun)
    return open_plan(
        plan, path_of=path_of, constants=constants, order=order, phases=phases, owned=opened, libraries=libraries
    )


def read_plan(bundle: Bundle) -> Plan:
    """Return a bundle's plan. Raises CorruptBundle where its numbers and names don't go together."""
    plan = Plan.from_json(bundle.plan())
    check_plan(plan)
    return plan


def open_plan(
    plan: Plan,
    *,
    path_of: Callable[[str], Path],
    constants: Sequence[torch.Tensor],
    order: ProviderOrder,
    phases: Mapping[str, float] | None = None,
    owned: object = None,
    libraries: Mapping[str, Library] | None = None,
) -> LoadedModel:
    """Open a plan's artifacts and bind constants to them.

    Args:
        plan: the plan.
        path_of: returns the file of an artifact.
        constants: what the plan's recipes make, packed.
        order: of providers, for what opaque ops call.
        phases: seconds of what came before.
        owned: what the model keeps alive.
        libraries: artifacts that were read already, by name.
    """
    begun = time.perf_counter()
    runners = _open_instances(plan, path_of, dict(libraries or {}))
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
    policy = read_trust(environment.keys_file(trust))
    return open_bundle(path, extract_root=environment.store_root, trust=policy)


def _lap(begun: float) -> float:
    return time.perf_counter() - begun


def _order(bundle: Bundle) -> ProviderOrder:
    """Return the order of providers that a bundle was compiled with. Raises CorruptBundle."""
    said = next((f.value for f in bundle.facts if (f.kind, f.name) == _ORDER), "native")
    try:
        return ProviderOrder.from_json(str(said))
    except OpError as error:
        raise corrupt(MANIFEST, bundle=str(bundle.path), found=f"names no order of providers: {error.found}") from error


def _literals(bundle: Bundle, plan: Plan) -> Mapping[str, torch.Tensor]:
    """Return the tensors that the bundle itself holds. Raises CorruptBundle where they aren't those of the plan."""
    data = bundle.constants()
    wanted = {recipe.name: recipe for recipe in plan.recipes if recipe.literal}
    if data is None and not wanted:
        return {}
    from safetensors import SafetensorError  # noqa: PLC0415  only models with computed buffers need it
    from safetensors.torch import load as load_bytes  # noqa: PLC0415

    try:
        made: dict[str, torch.Tensor] = load_bytes(data or b"")
    except (SafetensorError, ValueError, TypeError, LookupError, RuntimeError, OverflowError, MemoryError) as error:
        raise corrupt(CONSTANTS, bundle=str(bundle.path), found=f"can't be read: {error}") from error
    for name, recipe in wanted.items():
        if name not in made or tuple(made[name].shape) != recipe.shape or _name(made[name].dtype) != recipe.dtype:
            found = f"has no tensor {name!r} {recipe.dtype}{list(recipe.shape)}"
            raise corrupt(CONSTANTS, bundle=str(bundle.path), found=found)
    return made


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _open_instances(
    plan: Plan, path_of: Callable[[str], Path], libraries: dict[str, Library]
) -> dict[tuple[int, int], list[Any]]:
    """Open one runner per instance, for every range of the primary size."""
    opened: dict[tuple[int, int], list[Any]] = {}
    shared: dict[tuple[int, str], Any] = {}
    loaded: set[str] = set()
    for low, high in forms(plan):
        runners = []
        for number, instance in enumerate(plan.instances):
            name = artifact_for(plan.pieces[instance.piece], low, high)
            if (number, name) not in shared:
                if name not in libraries:
                    libraries[name] = read_library(path_of(name), name=name)
                if name not in loaded:
                    load_calls(libraries[name])
                    loaded.add(name)
                device = plan.pieces[instance.piece].device
                shared[number, name] = open_instance(libraries[name], device=device)
            runners.append(shared[number, name])
        opened[low, high] = runners
    return opened


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
