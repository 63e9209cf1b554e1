"""The plan of a bundle: the ordered calls of one forward pass, and how their constants are made. Data only."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from piecework.bundle.recipes import Concat, Source, Take, label, renamed, source_from_json, source_to_json, takes
from piecework.errors import CorruptBundle
from piecework.ops.ir.call_form import CallForm

Dim = int | str


@dataclass(frozen=True)
class PlanInput:
    """An argument of the forward: a tensor whose shape may name sizes, or (shape None) the size `size` as an integer.

    With neither it is an object that opaque ops take. `stride` (in elements) is None where the tensor is contiguous;
    a `written` tensor is changed by the forward, so that no copy may take its place.
    """

    name: str
    shape: tuple[Dim, ...] | None = None
    dtype: str = ""
    device: str = ""
    size: str = ""
    stride: tuple[int, ...] | None = None
    written: bool = False


@dataclass(frozen=True)
class State:
    """A tensor that opaque ops read and write between calls; the runtime allocates it."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str
    device: str


@dataclass(frozen=True)
class Recipe:
    """How one constant is made: take tensor `name` from the checkpoint (or the bundle's literals), cast, pack.

    With a `source` it is made of several tensors, or of a part of one, and `name` only names it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    literal: bool = False
    pack: str = ""
    source: Source | None = None

    @property
    def takes(self) -> tuple[Take, ...]:
        """The tensors that it is made of."""
        return (Take(self.name, self.shape),) if self.source is None else tuple(takes(self.source))


@dataclass(frozen=True)
class ShapeRange:
    """One compiled form of a piece: for min <= size <= max, the artifact's file name, and its device type."""

    min: int
    max: int
    artifact: str


@dataclass(frozen=True)
class UniquePiece:
    """A structurally different piece: fingerprint, artifacts by range of the primary size, numbers for people.

    `merged` says for each constant which of the captured piece's constants it is made of; () where they are the same.
    """

    fingerprint: str
    ranges: tuple[ShapeRange, ...]
    num_ops: int
    num_constants: int
    device: str = "cpu"
    merged: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Instance:
    """A unique piece with one layer's constants (indices of recipes, in the order of the piece's constants)."""

    piece: int
    constants: tuple[int, ...]


@dataclass(frozen=True)
class NativeCall:
    """What serves the calls of an IR op inside opaque ops.

    Attributes:
        form: the calls.
        ops: the opaque ops that declare them, "namespace::name".
        provider: whose implementation it is.
        piece: the compiled body, without constants; None where the provider's function is called.
    """

    form: CallForm
    ops: tuple[str, ...]
    provider: str
    piece: UniquePiece | None = None

    @property
    def artifact(self) -> str:
        """The file name of its artifact, or "" where there is none."""
        return self.piece.ranges[0].artifact if self.piece is not None and self.piece.ranges else ""


@dataclass(frozen=True)
class PieceStep:
    """Run an instance on slots, put its results into slots."""

    instance: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class OpStep:
    """Call an opaque op.

    An argument is {"slot": i}, {"state": i}, {"recipe": i}, {"size": expression}, {"layer": name}, {"const": v},
    {"list": arguments}, or a float, dtype, device, layout or memory format as in programs (ops/ir/resolve.py).
    """

    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[int, ...]


Step = PieceStep | OpStep


@dataclass(frozen=True)
class PlanVariant:
    """The forward of batches in which each pair of sizes (or a size and a number) in `equal` is equal."""

    name: str
    equal: tuple[tuple[str, str | int], ...]
    steps: tuple[Step, ...]
    num_slots: int
    output_slots: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Everything a runtime needs besides artifacts and weights.

    Slots 0 … len(inputs) - 1 hold the arguments. `output_slots` are the flat results, `structure` how they make up the
    module's result (capture/structure.py), `arguments` how a caller's arguments map to inputs. `kernels` are the native
    kernels of opaque ops (providers/libraries.py): their name, and the artifact's file name. `variants` are forwards
    for
    some kinds of batches, the first that fits; `steps` are for all the others. `natives` serve calls of IR ops inside
    opaque ops.
    """

    sizes: Mapping[str, tuple[int, int]]
    primary: str
    inputs: tuple[PlanInput, ...]
    states: tuple[State, ...]
    recipes: tuple[Recipe, ...]
    pieces: tuple[UniquePiece, ...]
    instances: tuple[Instance, ...]
    steps: tuple[Step, ...]
    num_slots: int
    output_slots: tuple[int, ...]
    structure: Any
    arguments: Any = None
    kernels: Mapping[str, str] = field(default_factory=dict)
    variants: tuple[PlanVariant, ...] = ()
    natives: tuple[NativeCall, ...] = ()

    @property
    def all_steps(self) -> tuple[Step, ...]:
        """The steps of all variants, and then those of the rest."""
        return tuple(step for variant in self.variants for step in variant.steps) + self.steps

    def captured_constants(self, instance: Instance) -> tuple[Recipe, ...]:
        """Return the constants of an instance's piece as it was captured: those that were merged are apart again."""
        bound = [self.recipes[index] for index in instance.constants]
        merged = self.pieces[instance.piece].merged
        if not merged:
            return tuple(bound)
        apart: dict[int, Recipe] = {}
        for recipe, constants in zip(bound, merged, strict=True):
            if len(constants) == 1:
                apart[constants[0]] = recipe
            elif isinstance(recipe.source, Concat):
                for constant, part in zip(constants, recipe.source.parts, strict=True):
                    apart[constant] = dataclasses.replace(recipe, name=label(part), shape=part.shape, source=part)
        return tuple(apart[index] for index in sorted(apart))

    def to_json(self) -> dict[str, Any]:
        """Return compact JSON: runs of recipes and states that differ in a layer's number only are written once."""
        ops = sorted({s.op for s in self.all_steps if isinstance(s, OpStep)})
        return {
            "sizes": {n: list(r) for n, r in self.sizes.items()},
            "primary": self.primary,
            "inputs": [_without_defaults(asdict(i)) for i in self.inputs],
            "states": _compact([_without_defaults(asdict(s)) for s in self.states]),
            "recipes": _compact([_recipe_to_json(r) for r in self.recipes]),
            "pieces": [_without_defaults(asdict(p)) for p in self.pieces],
            "instances": [[i.piece, list(i.constants)] for i in self.instances],
            "ops": ops,
            "steps": [_step_to_json(s, ops) for s in self.steps],
            "num_slots": self.num_slots,
            "output_slots": list(self.output_slots),
            "structure": self.structure,
            "arguments": self.arguments,
            **({"kernels": dict(self.kernels)} if self.kernels else {}),
            **({"variants": [_variant_to_json(v, ops) for v in self.variants]} if self.variants else {}),
            **({"natives": [_native_to_json(n) for n in self.natives]} if self.natives else {}),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """Read what `to_json` wrote. Raises CorruptBundle where it is no plan."""
        try:
            return _plan(data)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CorruptBundle(
                asked="read the plan of a bundle",
                found=f"it is malformed: {type(error).__name__} {error}",
                try_="compile the model again",
                file="plan.json",
            ) from error


def _plan(data: Mapping[str, Any]) -> Plan:
    return Plan(
        sizes={n: (int(lo), int(hi)) for n, (lo, hi) in data["sizes"].items()},
        primary=data["primary"],
        inputs=tuple(_plan_input(i) for i in data["inputs"]),
        states=tuple(State(**{**s, "shape": tuple(s["shape"])}) for s in _expand(data["states"])),
        recipes=tuple(_recipe_from_json(r) for r in _expand(data["recipes"])),
        pieces=tuple(_piece_from_json(p) for p in data["pieces"]),
        instances=tuple(Instance(int(piece), tuple(constants)) for piece, constants in data["instances"]),
        steps=tuple(_step_from_json(s, data["ops"]) for s in data["steps"]),
        num_slots=int(data["num_slots"]),
        output_slots=tuple(data["output_slots"]),
        structure=data["structure"],
        arguments=data["arguments"],
        kernels={str(name): str(artifact) for name, artifact in dict(data.get("kernels", {})).items()},
        variants=tuple(_variant_from_json(v, data["ops"]) for v in data.get("variants", ())),
        natives=tuple(_native_from_json(n) for n in data.get("natives", ())),
    )


def _recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    fields = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}
    if recipe.source is not None:
        fields["source"] = source_to_json(recipe.source)
    return _without_defaults(fields)


def _recipe_from_json(data: Mapping[str, Any]) -> Recipe:
    made = Recipe(**{**data, "shape": tuple(data["shape"]), "source": None})
    if "source" not in data:
        return made
    source = source_from_json(data["source"])
    if source.shape != made.shape:
        raise ValueError(f"a recipe of shape {made.shape} from a source of shape {source.shape}")
    return dataclasses.replace(made, source=source)


def _piece_from_json(data: Mapping[str, Any]) -> UniquePiece:
    ranges = tuple(ShapeRange(**r) for r in data.get("ranges", ()))
    merged = tuple(tuple(int(i) for i in constants) for constants in data.get("merged", ()))
    return UniquePiece(**{**data, "ranges": ranges, "merged": merged})


def _native_to_json(native: NativeCall) -> dict[str, Any]:
    return {
        **native.form.to_json(),
        "ops": list(native.ops),
        "provider": native.provider,
        **({"piece": _without_defaults(asdict(native.piece))} if native.piece is not None else {}),
    }


def _native_from_json(data: Mapping[str, Any]) -> NativeCall:
    return NativeCall(
        form=CallForm.from_json(data),
        ops=tuple(str(op) for op in data["ops"]),
        provider=str(data["provider"]),
        piece=_piece_from_json(data["piece"]) if "piece" in data else None,
    )


def _variant_to_json(variant: PlanVariant, ops: Sequence[str]) -> dict[str, Any]:
    return {
        "name": variant.name,
        "equal": [list(pair) for pair in variant.equal],
        "steps": [_step_to_json(s, ops) for s in variant.steps],
        "num_slots": variant.num_slots,
        "output_slots": list(variant.output_slots),
    }


def _variant_from_json(data: Mapping[str, Any], ops: Sequence[str]) -> PlanVariant:
    return PlanVariant(
        name=str(data["name"]),
        equal=tuple((str(size), other if isinstance(other, int) else str(other)) for size, other in data["equal"]),
        steps=tuple(_step_from_json(s, ops) for s in data["steps"]),
        num_slots=int(data["num_slots"]),
        output_slots=tuple(data["output_slots"]),
    )


def _plan_input(data: Mapping[str, Any]) -> PlanInput:
    tuples = {k: tuple(data[k]) for k in ("shape", "stride") if data.get(k) is not None}
    return PlanInput(**{**data, **tuples})


def _step_to_json(step: Step, ops: Sequence[str]) -> list[Any]:
    if isinstance(step, PieceStep):
        return [step.instance, list(step.inputs), list(step.outputs)]
    return [ops.index(step.op), list(step.args), dict(step.kwargs), list(step.outputs)]


def _step_from_json(data: Sequence[Any], ops: Sequence[str]) -> Step:
    if len(data) == 3:
        instance, inputs, outputs = data
        return PieceStep(int(instance), tuple(inputs), tuple(outputs))
    op, args, kwargs, outputs = data
    return OpStep(ops[op], tuple(args), kwargs, tuple(outputs))


def _without_defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items() if not _is_default(k, v)}


def _is_default(name: str, value: Any) -> bool:
    return value is None or value is False or value == "" or (name == "merged" and value == ())


_NUMBER = re.compile(r"\.(0|[1-9]\d*)\.")


def _compact(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write items whose names count up, "a.0.b", "a.1.b" …, as one item with `name` "a.#.b" and `run` [0, n]."""
    out: list[dict[str, Any]] = []
    for item in items:
        match = _NUMBER.search(item["name"])
        if match is None or "#" in item["name"]:
            out.append(item)
            continue
        number, numbered = int(match.group(1)), match.group(0)
        pattern = _renamed(item, old=numbered, new=".#.")
        if _renamed(pattern, old=".#.", new=numbered) != item:
            out.append(item)
            continue
        if out and "run" in out[-1]:
            start, end = out[-1]["run"]
            if number == end and {**out[-1], "run": None} == {**pattern, "run": None}:
                out[-1] = {**pattern, "run": [start, end + 1]}
                continue
        out.append({**pattern, "run": [number, number + 1]})
    return out


def _expand(items: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for item in items:
        rest = {k: v for k, v in item.items() if k != "run"}
        if "run" not in item:
            out.append(rest)
            continue
        start, end = item["run"]
        if not 0 <= end - start <= 1_000_000:
            raise ValueError(f"a run of {end - start} items")
        out.extend(_renamed(rest, old="#", new=str(i)) for i in range(start, end))
    return out


def _renamed(item: Mapping[str, Any], *, old: str, new: str) -> dict[str, Any]:
    """Return an item with the first `old` in its name, and in those of the tensors that it is made of, replaced."""
    made = {**item, "name": item["name"].replace(old, new, 1)}
    if "source" in item:
        source = renamed(source_from_json(item["source"]), lambda name: name.replace(old, new, 1))
        made["source"] = source_to_json(source)
    return made
