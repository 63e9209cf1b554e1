"""Whether a plan is one that a compile could have made, as far as its numbers and names tell.

What it says of shapes is checked with the artifacts' own interfaces at hand (bundle/run/check_artifacts.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

from piecework.bundle.format import artifact_digest
from piecework.bundle.plan import NativeCall, OpStep, PieceStep, Plan, PlanInput, PlanVariant, UniquePiece
from piecework.bundle.recipes import Concat, HeadProduct, HeadRows, Quantized, Source, Stack
from piecework.bundle.sizes import names_in, size_expression
from piecework.bundle.structures import check_arguments, check_structure
from piecework.errors import CorruptBundle

_MOST_TAKES: Final = 1_000_000
_MOST_GROWTH: Final = 64
"""How many times as many numbers a product may have as what it is made of."""


def check_plan(plan: Plan) -> None:
    """Raise CorruptBundle where a plan's indices, names, counts, sizes or slots don't go together."""
    try:
        _check_sizes(plan)
        _check_inputs(plan)
        _check_recipes(plan)
        _check_pieces(plan)
        _require(len({path.name for path in plan.forwards}) == len(plan.forwards), "two forwards of one name")
        for path in plan.forwards:
            _check_path(plan, path)
        for native in plan.natives:
            _check_native(native)
        unknown = check_structure(plan.structure, leaves=range(len(plan.output_slots))) - _given_sizes(plan)
        _require(not unknown, f"a number in the result of sizes that no input has: {sorted(unknown)}")
        if plan.arguments is not None:
            check_arguments(plan.arguments, count=sum(given.recipe is None for given in plan.inputs))
    except ValueError as error:
        raise lie(str(error)) from error


def lie(found: str) -> CorruptBundle:
    """Return the error for a plan that no compile makes."""
    return CorruptBundle(
        asked="read the plan of a bundle",
        found=f"plan.json says what no compile does: {found}",
        try_="get the bundle from where it was compiled, or compile the model again",
        file="plan.json",
    )


def artifact_for(piece: UniquePiece, low: int, high: int) -> str:
    """Return the name of a piece's artifact for a range of the primary size. Raises CorruptBundle where it has none."""
    for form in piece.ranges:
        if form.min <= low and high <= form.max:
            return form.artifact
    raise lie(f"piece {piece.fingerprint[:12]} has no artifact for {low} to {high}")


def forms(plan: Plan) -> list[tuple[int, int]]:
    """Return the ranges of the primary size that have artifacts of their own, in order."""
    bounds = sorted({(r.min, r.max) for p in plan.pieces for r in p.ranges})
    inner = [b for b in bounds if not any(b != o and b[0] <= o[0] and o[1] <= b[1] for o in bounds)]
    return inner or [plan.sizes.get(plan.primary, (0, 0))]


def _require(fine: object, found: str) -> None:
    if not fine:
        raise ValueError(found)


def _check_sizes(plan: Plan) -> None:
    for name in plan.sizes:
        _require(name.isidentifier() and name.isascii(), f"a size that is called {name!r}")
    _require(plan.primary in plan.sizes if plan.sizes else not plan.primary, f"the primary size {plan.primary!r}")
    _require(len({s.name for s in plan.states}) == len(plan.states), "two states of one name")
    for state in plan.states:
        for dim in state.shape:
            _check_expression(dim, plan)


def _check_expression(dim: int | str, plan: Plan) -> None:
    if isinstance(dim, str):
        size_expression(dim)
        unknown = names_in(dim) - plan.sizes.keys()
        _require(not unknown, f"a size {dim!r} of unknown sizes")


def _check_inputs(plan: Plan) -> None:
    _require(len({i.name for i in plan.inputs}) == len(plan.inputs), "two inputs of one name")
    for given in plan.inputs:
        _require((given.shape is None) != (given.size == ""), f"an input {given.name!r} that is no tensor and no size")
        if given.shape is None:
            _require(given.size in plan.sizes and not given.dtype, f"an input {given.name!r} of an unknown size")
        else:
            _check_tensor_input(given, plan)
        if given.recipe is not None:
            _check_held(given, plan)
    held = [given.recipe is not None for given in plan.inputs if given.shape is not None]
    _require(held == sorted(held), "buffers that are held before arguments")
    found = _given_sizes(plan)
    named = {name for path in plan.variants for name in path.where.names}
    named |= {plan.primary} if plan.primary else set()
    named |= {name for text in _expressions(plan) for name in names_in(text)}
    _require(named <= found, f"sizes that no input has: {sorted(named - found)}")


def _given_sizes(plan: Plan) -> set[str]:
    """Return the sizes that a call says by its inputs."""
    return {d for i in plan.inputs for d in i.shape or () if isinstance(d, str) and d in plan.sizes} | {
        i.size for i in plan.inputs
    }


def _check_tensor_input(given: PlanInput, plan: Plan) -> None:
    shape = given.shape or ()
    _require(given.dtype and given.device, f"an input {given.name!r} of unknown dtype or device")
    for dim in shape:
        _check_expression(dim, plan)
    _require(given.stride is None or len(given.stride) == len(shape), f"strides of {given.name!r}")


def _check_held(given: PlanInput, plan: Plan) -> None:
    _require(given.recipe in range(len(plan.recipes)), f"a held buffer {given.name!r} that nothing makes")
    recipe = plan.recipes[given.recipe or 0]
    same = recipe.shape == given.shape and recipe.dtype == given.dtype and given.stride is None
    _require(same and not recipe.pack and recipe.source is None, f"a held buffer {given.name!r} that is made otherwise")


def _expressions(plan: Plan) -> Iterator[str]:
    for step in plan.all_steps:
        if isinstance(step, OpStep):
            yield from (argument["size"] for argument in _arguments(step) if "size" in argument)


def _arguments(step: OpStep) -> Iterator[Mapping[str, Any]]:
    """Yield an opaque op's arguments, and those in lists."""
    waiting = [*step.args, *step.kwargs.values()]
    while waiting:
        argument = waiting.pop()
        yield argument
        waiting.extend(argument.get("list", ()))


def _check_recipes(plan: Plan) -> None:
    total = 0
    for recipe in plan.recipes:
        _require(not (recipe.literal and recipe.source is not None), "a literal that is made of others")
        _check_packing(recipe.pack, recipe.shape, recipe.dtype)
        if recipe.source is not None:
            total += _num_takes(recipe.source)
            _check_growth(recipe.source)
    _require(total <= _MOST_TAKES, f"constants that are made of {total} tensors")


def _check_packing(pack: str, shape: Sequence[int], dtype: str) -> None:
    """Raise ValueError for a constant that can't be packed so (bundle/packings.py)."""
    if not pack:
        return
    rank = 3 if pack == "head_columns" else 2
    quantized = {"int8": 4, "float8_e4m3fn": 4, "int32": 1} if pack == "linear_columns" else {}
    numbers = {"float32": 1, "bfloat16": 2, "float16": 2, **quantized}
    fits = len(shape) == rank and dtype in numbers and all(shape)
    if pack == "linear_columns":
        fits = fits and shape[0] % 32 == 0 and shape[1] % numbers[dtype] == 0
    elif pack == "head_columns":
        fits = fits and shape[2] % 32 == 0 and shape[1] % 2 == 0
    _require(fits, f"a constant {dtype}{list(shape)} that is packed as {pack}")


def _num_takes(source: Source) -> int:
    match source:
        case Concat(parts):
            return sum(_num_takes(part) for part in parts)
        case Stack(of, count):
            return count * _num_takes(of)
        case HeadRows(of):
            return _num_takes(of)
        case HeadProduct(left, right):
            return _num_takes(left) + _num_takes(right)
        case Quantized(of=parts):
            return sum(_num_takes(part) for part in parts)
    return 1


def _check_growth(source: Source) -> None:
    """Raise ValueError for a product that is much larger than what it is made of."""
    match source:
        case Concat(parts):
            for part in parts:
                _check_growth(part)
        case Stack(of) | HeadRows(of):
            _check_growth(of)
        case HeadProduct(left, right):
            _check_growth(left)
            _check_growth(right)
            given = _numel(left.shape) + _numel(right.shape)
            _require(_numel(source.shape) <= _MOST_GROWTH * given, f"a product of shape {list(source.shape)}")
        case Quantized(of=parts):
            for part in parts:
                _check_growth(part)


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _check_pieces(plan: Plan) -> None:
    devices = {p.device for p in plan.pieces} | {s.device for s in plan.states}
    devices |= {given.device for given in plan.inputs if given.shape is not None}
    _require(len(devices) < 2, "tensors on several devices")
    low, high = plan.sizes.get(plan.primary, (0, 0))
    for piece in plan.pieces:
        for form in piece.ranges:
            _require(artifact_digest(form.artifact), f"an artifact that is called {form.artifact!r}"[:120])
        ranges = sorted((r.min, r.max) for r in piece.ranges)
        _require(ranges and ranges[0][0] == low and ranges[-1][1] == high, "a piece without artifacts for all sizes")
        _require(_follow(ranges), "a piece whose artifacts' ranges overlap or leave gaps")
        _check_merged(piece)
    for artifact in plan.kernels.values():
        _require(artifact_digest(artifact), f"a kernel that is called {artifact!r}"[:120])
    for instance in plan.instances:
        _require(instance.piece < len(plan.pieces), f"an instance of piece {instance.piece}")
        _require(
            all(c < len(plan.recipes) for c in instance.constants), "an instance with constants that are not there"
        )
        merged = plan.pieces[instance.piece].merged
        _require(not merged or len(merged) == len(instance.constants), "merged constants that are not there")
    edges = forms(plan)
    _require(_follow(edges), "ranges that overlap")
    for piece in plan.pieces:
        for first, last in edges:
            artifact_for(piece, first, last)


def _follow(ranges: Sequence[tuple[int, int]]) -> bool:
    """Whether each range begins where the one before it ended."""
    return all(after[0] == before[1] + 1 for before, after in pairwise(ranges))


def _check_merged(piece: UniquePiece) -> None:
    if piece.merged:
        numbers = sorted(n for constants in piece.merged for n in constants)
        as_many = len(numbers) == piece.num_constants  # which may be any number
        _require(as_many and numbers == list(range(len(numbers))), "constants that are merged twice, or not at all")


def _check_path(plan: Plan, path: PlanVariant) -> None:
    """Check that a forward's steps read what is there, and that nothing is missing at its end."""
    _require(path.where.names <= plan.sizes.keys(), f"a forward for batches where {path.where.text()}"[:120])
    for size, low, high in path.where.within:
        least, most = plan.sizes[size]
        _require(least <= low and high <= most, f"a forward for {size} from {low} to {high} of {least} to {most}")
    sizes = [slot for slot, given in enumerate(plan.inputs) if given.shape is None]  # steps take sizes by name
    written = set(range(len(plan.inputs))).difference(sizes)
    for number, step in enumerate(path.steps):
        where = f"step {number}" + (f" of the forward {path.name!r}" if path.name else "")
        read = step.inputs if isinstance(step, PieceStep) else _checked_arguments(step, plan, where)
        _require(written.issuperset(read), f"{where} reads a slot that holds nothing yet")
        if isinstance(step, PieceStep):
            _require(step.instance < len(plan.instances), f"{where} runs an instance that is not there")
        kept = [slot for slot in step.outputs if slot >= 0]
        _require(len(set(kept)) == len(kept), f"{where} puts two results into one slot")
        _require(all(len(plan.inputs) <= s < path.num_slots for s in kept), f"{where} writes to a slot of an input")
        written.update(kept)
    _require(written.issuperset(path.output_slots), "a result that is never computed")
    _require(len(path.output_slots) == len(plan.output_slots), "forwards with different numbers of results")
    used = len(written) + len(sizes)
    _require(path.num_slots == used, f"{path.num_slots} slots, of which {used} are used")


def _checked_arguments(step: OpStep, plan: Plan, where: str) -> list[int]:
    """Check the indices and sizes among an opaque op's arguments; returns the slots that it reads."""
    slots = []
    for argument in _arguments(step):
        ((kind, value),) = argument.items()
        if kind == "slot":
            slots.append(value)
        elif kind == "size":
            _check_expression(value, plan)
        elif kind in ("state", "recipe"):
            count = len(plan.states if kind == "state" else plan.recipes)
            _require(value < count, f"{where} takes {kind} {value} of {count}")
    return slots


def _check_native(native: NativeCall) -> None:
    if native.piece is not None:
        _require(len(native.piece.ranges) < 2, "a body with several artifacts")
        _require(not native.artifact or artifact_digest(native.artifact), "a body whose artifact has no digest")
