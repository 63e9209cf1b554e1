"""Run what was compiled beside the module that it was made of, on random inputs, and say how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from piecework.bundle.run.constants import as_source, make_constants, pack_constants
from piecework.bundle.run.loading import open_plan
from piecework.bundle.run.model import LoadedModel
from piecework.capture.general import Called, random_weights
from piecework.capture.request import CaptureRequest
from piecework.compiler.check.inputs import points, random_inputs
from piecework.compiler.driver import Built
from piecework.errors import CheckError, PieceworkError
from piecework.ops.ir.provider_order import ProviderOrder

TOLERANCES: Final = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Of the greatest value of an output; of all other types nothing may differ."""

_FAILURES: Final = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError)
_SEED: Final = 20


@dataclass(frozen=True)
class Checked:
    """What was found.

    Attributes:
        tried: the sizes at which both were run, for people.
        errors: by output, the greatest difference, as a part of the greatest value of that output.
        not_tried: what could not be, and why.
    """

    tried: tuple[str, ...]
    errors: Mapping[str, float]
    not_tried: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return it for people."""
        found = [f"checked against the module at {'; '.join(self.tried)}"] if self.tried else []
        found += [f"output {name}: {error:.1e} of its greatest value" for name, error in self.errors.items()]
        return [*found, *(f"not checked {text}" for text in self.not_tried)]


def check_results(built: Built, *, order: ProviderOrder) -> Checked:
    """Compare a module with what was compiled of it, at the ends of the ranges of its sizes.

    Where a tensor would be larger than 64 MiB, smaller sizes are tried, and named. Weights are the module's own, or
    random where it has none. Raises CheckError where an output differs by more than its `TOLERANCES`.
    """
    request = built.paths[-1].captured.request
    no_values = any(p.is_meta for p in request.module.parameters())
    weights = random_weights(request.module) if no_values else _own_weights(request.module)
    if request.states or request.objects or weights is None:
        why = "states or objects" if weights is not None else "no weights, and more than fit"
        return Checked((), {}, (f"at all: the module has {why}",))
    model = _opened(built, {**weights, **_copies(request.module, weights)}, order=order)
    names = list(_labels(model.plan.structure, ""))
    tried, missed, errors = [], [], dict.fromkeys(names, 0.0)
    for sizes in points(built):
        text = " and ".join(f"{name} = {value}" for name, value in sizes.items()) or "the one size that it has"
        given = random_inputs(request, sizes)
        try:
            wanted = _eager(request, weights, given)
        except _FAILURES as error:
            first = str(error).strip().partition("\n")[0][:200]
            missed.append(f"at {text}: of random inputs the module raises {type(error).__name__}: {first}")
            continue
        for name, state in model.states.items():
            state.copy_(weights[name])
        found = _compiled(model, given, asked=text)
        tried.append(text)
        for name, apart in compared(names, wanted, found, where=text).items():
            errors[name] = max(errors[name], apart)
    return Checked(tuple(tried), errors if tried else {}, tuple(missed))


def compared(
    names: Sequence[str], wanted: Sequence[Tensor], found: Sequence[Tensor], *, where: str
) -> dict[str, float]:
    """Return how far each output is from what it should be, as a part of its greatest value.

    Args:
        names: of the outputs.
        wanted, found: the outputs.
        where: at which sizes, for people.

    Raises CheckError where that is more than its type's tolerance.
    """
    errors = {}
    for name, one, other in zip(names, wanted, found, strict=True):
        errors[name] = _apart(one, other)
        if errors[name] > (_allowed(one.dtype) or 0.0):
            raise _differs(name, one, errors[name], where=where)
    return errors


def _own_weights(module: torch.nn.Module) -> dict[str, Tensor] | None:
    """Return a module's tensors by name; None where a buffer has no values."""
    buffers = dict(module.named_buffers())
    if any(b.is_meta for b in buffers.values()):
        return None
    return {**{n: p.detach() for n, p in module.named_parameters(remove_duplicate=False)}, **buffers}


def _copies(module: torch.nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of a module's buffers, to which a forward may write."""
    return {name: weights[name].detach().clone() for name, _ in module.named_buffers()}


def _opened(built: Built, weights: Mapping[str, Tensor], *, order: ProviderOrder) -> LoadedModel:
    plan, files = built.plan, {artifact.name: artifact.path for artifact in built.artifacts}
    device = plan.pieces[0].device if plan.pieces else "cpu"
    literals = {name: tensor.clone() for path in built.paths for name, tensor in path.captured.literals.items()}
    constants = make_constants(plan.recipes, source=as_source(weights), literals=literals, device=device)
    pack_constants(plan.recipes, constants)
    return open_plan(plan, path_of=files.__getitem__, constants=constants, order=order)


def _eager(request: CaptureRequest, weights: Mapping[str, Tensor], given: Mapping[str, Any]) -> list[Tensor]:
    parameters = {n: weights[n] for n, _ in request.module.named_parameters()}  # of several names of one, the first
    named = {f"module.{n}": t for n, t in {**parameters, **_copies(request.module, weights)}.items()}
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(_SEED)
        found: list[Tensor] = torch.func.functional_call(Called(request), named, (dict(given),))
        return found


def _compiled(model: LoadedModel, given: Mapping[str, Any], *, asked: str) -> list[Tensor]:
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(_SEED)
            return model.run(given)
    except PieceworkError as error:
        raise CheckError(
            asked=f"run what was compiled at {asked}, as the module runs there",
            found=f"{type(error).__name__}: {error.found}",
            try_="report it: that is a bug of piecework's, or of an operator's",
        ) from error


def _apart(wanted: Tensor, found: Tensor) -> float:
    """Return the greatest difference, as a part of the greatest value; for numbers that are whole, 1 for any."""
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return math.inf
    if not wanted.is_floating_point():
        if wanted.is_complex():
            return _apart(torch.view_as_real(wanted), torch.view_as_real(found))
        return 0.0 if torch.equal(wanted, found) else 1.0
    one, other = wanted.double(), found.double()
    same = one == other  # infinite values among them
    same |= one.isnan() & other.isnan()
    finite = one[one.isfinite()].abs()
    if bool(same.all()):
        return 0.0
    apart = float((one - other)[~same].abs().max())
    return math.inf if math.isnan(apart) else apart / max(float(finite.max()) if finite.numel() else 0.0, 1e-30)


def _labels(structure: Any, where: str) -> Iterator[str]:
    """Yield a name for each of a result's tensors, such as "hidden" or "1.2"; "0" where it has no other."""
    kind, parts = next((kind, parts) for kind, parts in structure.items() if kind != "class")
    if kind == "leaf":
        yield where.removeprefix(".") or "0"
    elif kind in ("dict", "fields"):
        for name, part in parts:
            yield from _labels(part, f"{where}.{name}")
    elif kind in ("tuple", "list"):
        for number, part in enumerate(parts):
            yield from _labels(part, f"{where}.{number}")


def _allowed(dtype: torch.dtype) -> float | None:
    return TOLERANCES.get(dtype.to_real() if dtype.is_complex else dtype)


def _differs(name: str, wanted: Tensor, apart: float, *, where: str) -> CheckError:
    dtype = str(wanted.dtype).removeprefix("torch.")
    allowed = _allowed(wanted.dtype)
    return CheckError(
        asked=f"output {name} as the module computes it, at {where}",
        found=f"it differs by {apart:.1e} of its greatest value"
        + (f", in {dtype} {allowed:.0e} is allowed" if allowed is not None else f", in {dtype} nothing may"),
        try_="does the module draw random numbers, or divide by values near 0? Else report it",
    )
