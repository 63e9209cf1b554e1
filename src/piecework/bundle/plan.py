"""The plan of a bundle: the ordered calls of one forward pass, and how their constants are made. Data only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from piecework.bundle.compact import Rename, compact, expand
from piecework.bundle.packings import PACKINGS
from piecework.bundle.recipes import Concat, Source, Take, label, renamed, source_from_json, source_to_json, takes
from piecework.bundle.where import Where, read_bounds
from piecework.errors import CorruptBundle
from piecework.foundation.digests import is_digest
from piecework.foundation.reading import fields, flag, items, mapping, one_of, text, whole, wholes
from piecework.ops.ir.call_form import CallForm
from piecework.ops.ir.program import DEVICES, DTYPES, check_constant, check_tagged

_REQUIRED: Final = (
    "sizes", "primary", "inputs", "states", "recipes", "pieces", "instances", "ops", "steps", "num_slots",
    "output_slots", "structure", "arguments",
)  # fmt: skip
_OPTIONAL: Final = ("kernels", "variants", "natives")
_MOST_NESTED: Final = 4

Dim = int | str


@dataclass(frozen=True)
class PlanInput:
    """An argument of the forward: a tensor whose shape may name sizes, or (shape None) the size `size` as an integer.

    A shape may have expressions over sizes as well, which other arguments have.

    With neither it is an object that opaque ops take. `stride` (in elements) is None where the tensor is contiguous;
    a `written` tensor is changed by the forward, so that no copy may take its place. One with a `recipe` is no argument
    but a buffer that the model holds between calls: what that recipe makes.
    """

    name: str
    shape: tuple[Dim, ...] | None = None
    dtype: str = ""
    device: str = ""
    size: str = ""
    stride: tuple[int, ...] | None = None
    written: bool = False
    recipe: int | None = None


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

    `program` is the digest of the program that its artifacts were made of, as they say themselves.
    `merged` says for each constant which of the captured piece's constants it is made of; () where they are the same.
    """

    fingerprint: str
    program: str
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
    """The forward of the batches of which `where` is true, and that come to no variant before it."""

    name: str
    where: Where
    steps: tuple[Step, ...]
    num_slots: int
    output_slots: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Everything a runtime needs besides artifacts and weights.

    Slots 0 … len(inputs) - 1 hold the arguments. `output_slots` are the flat results, `structure` how they make up the
    module's result (capture/structure.py), `arguments` how a caller's arguments map to inputs. `kernels` are the native
    kernels of opaque ops (providers/libraries.py): their name, and the artifact's file name. `variants` are forwards
    for some kinds of batches, the first that fits; `steps` are for all the others. `natives` serve calls of IR ops
    inside opaque ops.
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
    def rest(self) -> PlanVariant:
        """The forward of the batches that come to no variant; it has no name."""
        return PlanVariant("", Where(), self.steps, self.num_slots, self.output_slots)

    @property
    def forwards(self) -> tuple[PlanVariant, ...]:
        """The variants, and the rest."""
        return (*self.variants, self.rest)

    @property
    def all_steps(self) -> tuple[Step, ...]:
        """The steps of all variants, and then those of the rest."""
        return tuple(step for forward in self.forwards for step in forward.steps)

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
            "states": compact([_without_defaults(asdict(s)) for s in self.states]),
            "recipes": compact([_recipe_to_json(r) for r in self.recipes]),
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
        except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
            raise CorruptBundle(
                asked="read the plan of a bundle",
                found=f"it is malformed: {type(error).__name__} {error}",
                try_="compile the model again",
                file="plan.json",
            ) from error


def _plan(given: object) -> Plan:
    data = fields(given, "the plan", required=_REQUIRED, optional=_OPTIONAL)
    ops = tuple(text(op, "an op") for op in items(data["ops"], "ops"))
    return Plan(
        sizes={text(n, "a size"): read_bounds(r, f"the size {n}") for n, r in mapping(data["sizes"], "sizes").items()},
        primary=text(data["primary"], "primary", empty=True),
        inputs=tuple(_plan_input(i) for i in items(data["inputs"], "inputs")),
        states=expand(data["states"], "states", read=_state, renamed=_renamed_state),
        recipes=expand(data["recipes"], "recipes", read=_recipe_from_json, renamed=_renamed_recipe),
        pieces=tuple(_piece_from_json(p) for p in items(data["pieces"], "pieces")),
        instances=tuple(_instance(i) for i in items(data["instances"], "instances")),
        steps=tuple(_step_from_json(s, ops) for s in items(data["steps"], "steps")),
        num_slots=whole(data["num_slots"], "num_slots"),
        output_slots=wholes(data["output_slots"], "output_slots"),
        structure=data["structure"],
        arguments=data["arguments"],
        kernels={
            text(name, "a kernel"): text(artifact, "a kernel's artifact")
            for name, artifact in mapping(data.get("kernels", {}), "kernels").items()
        },
        variants=tuple(_variant_from_json(v, ops) for v in items(data.get("variants", []), "variants")),
        natives=tuple(_native_from_json(n) for n in items(data.get("natives", []), "natives")),
    )


def _dims(value: object, what: str) -> tuple[Dim, ...]:
    found = items(value, what, most=64)
    return tuple(d if type(d) is int and d >= 0 else text(d, what, most=256) for d in found)


def _state(given: object) -> State:
    data = fields(given, "a state", required=("name", "shape", "dtype", "device"))
    return State(
        name=text(data["name"], "a state's name"),
        shape=_dims(data["shape"], "a state's shape"),
        dtype=one_of(data["dtype"], "a state's dtype", DTYPES),
        device=one_of(data["device"], "a state's device", DEVICES),
    )


def _renamed_state(state: State, change: Rename) -> State:
    return State(change(state.name), state.shape, state.dtype, state.device)


def _renamed_recipe(recipe: Recipe, change: Rename) -> Recipe:
    source = None if recipe.source is None else renamed(recipe.source, change)
    return Recipe(change(recipe.name), recipe.shape, recipe.dtype, recipe.literal, recipe.pack, source)


def _instance(given: object) -> Instance:
    piece, constants = items(given, "an instance", length=2)
    return Instance(whole(piece, "an instance's piece"), wholes(constants, "an instance's constants"))


def _recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    made = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}
    if recipe.source is not None:
        made["source"] = source_to_json(recipe.source)
    return _without_defaults(made)


def _recipe_from_json(given: object) -> Recipe:
    optional = ("literal", "pack", "source")
    data = fields(given, "a recipe", required=("name", "shape", "dtype"), optional=optional)
    shape = wholes(data["shape"], "a recipe's shape", most=1 << 40)
    source = source_from_json(data["source"]) if "source" in data else None
    if source is not None and source.shape != shape:
        raise ValueError(f"a recipe of shape {shape} from a source of shape {source.shape}")
    return Recipe(
        name=text(data["name"], "a recipe's name", most=1 << 16),
        shape=shape,
        dtype=one_of(data["dtype"], "a recipe's dtype", DTYPES),
        literal=flag(data.get("literal", False), "literal"),
        pack=one_of(data["pack"], "a recipe's pack", PACKINGS) if "pack" in data else "",
        source=source,
    )


def _piece_from_json(given: object) -> UniquePiece:
    required = ("fingerprint", "program", "ranges", "num_ops", "num_constants", "device")
    data = fields(given, "a piece", required=required, optional=("merged",))
    return UniquePiece(
        fingerprint=_digest(data["fingerprint"], "a piece's fingerprint"),
        program=_digest(data["program"], "a piece's program"),
        ranges=tuple(_range(r) for r in items(data["ranges"], "a piece's ranges")),
        num_ops=whole(data["num_ops"], "num_ops"),
        num_constants=whole(data["num_constants"], "num_constants"),
        device=one_of(data["device"], "a piece's device", DEVICES),
        merged=tuple(wholes(m, "merged") for m in items(data.get("merged", []), "merged")),
    )


def _range(given: object) -> ShapeRange:
    data = fields(given, "a piece's range", required=("min", "max", "artifact"))
    low, high = read_bounds([data["min"], data["max"]], "a piece's range")
    return ShapeRange(low, high, text(data["artifact"], "an artifact's name"))


def _digest(value: object, what: str) -> str:
    if not is_digest(text(value, what)):
        raise ValueError(f"{what} is no digest")
    return str(value)


def _native_to_json(native: NativeCall) -> dict[str, Any]:
    return {
        **native.form.to_json(),
        "ops": list(native.ops),
        "provider": native.provider,
        **({"piece": _without_defaults(asdict(native.piece))} if native.piece is not None else {}),
    }


def _native_from_json(given: object) -> NativeCall:
    required = ("op", "arguments", "sizes", "ops", "provider")
    data = fields(given, "a native", required=required, optional=("piece",))
    return NativeCall(
        form=CallForm.from_json({name: data[name] for name in ("op", "arguments", "sizes")}),
        ops=tuple(text(op, "an op of a native") for op in items(data["ops"], "a native's ops")),
        provider=text(data["provider"], "a provider"),
        piece=_piece_from_json(data["piece"]) if "piece" in data else None,
    )


def _variant_to_json(variant: PlanVariant, ops: Sequence[str]) -> dict[str, Any]:
    return {
        "name": variant.name,
        **variant.where.to_json(),
        "steps": [_step_to_json(s, ops) for s in variant.steps],
        "num_slots": variant.num_slots,
        "output_slots": list(variant.output_slots),
    }


def _variant_from_json(given: object, ops: Sequence[str]) -> PlanVariant:
    required = ("name", "steps", "num_slots", "output_slots")
    data = fields(given, "a variant", required=required, optional=("equal", "within"))
    return PlanVariant(
        name=text(data["name"], "a variant's name"),
        where=Where.from_json(data),
        steps=tuple(_step_from_json(s, ops) for s in items(data["steps"], "a variant's steps")),
        num_slots=whole(data["num_slots"], "num_slots"),
        output_slots=wholes(data["output_slots"], "output_slots"),
    )


def _plan_input(given: object) -> PlanInput:
    optional = ("shape", "dtype", "device", "size", "stride", "written", "recipe")
    data = fields(given, "an input", required=("name",), optional=optional)
    return PlanInput(
        name=text(data["name"], "an input's name"),
        shape=_dims(data["shape"], "an input's shape") if "shape" in data else None,
        dtype=one_of(data["dtype"], "an input's dtype", DTYPES) if "dtype" in data else "",
        device=one_of(data["device"], "an input's device", DEVICES) if "device" in data else "",
        size=text(data["size"], "an input's size") if "size" in data else "",
        stride=wholes(data["stride"], "an input's stride") if "stride" in data else None,
        written=flag(data.get("written", False), "written"),
        recipe=whole(data["recipe"], "an input's recipe") if "recipe" in data else None,
    )


def _step_to_json(step: Step, ops: Sequence[str]) -> list[Any]:
    if isinstance(step, PieceStep):
        return [step.instance, list(step.inputs), list(step.outputs)]
    return [ops.index(step.op), list(step.args), dict(step.kwargs), list(step.outputs)]


def _step_from_json(given: object, ops: Sequence[str]) -> Step:
    data = items(given, "a step")
    if len(data) == 3:
        instance, inputs, outputs = data
        return PieceStep(
            whole(instance, "a step's instance"), wholes(inputs, "a step's inputs"), wholes(outputs, "a step's outputs")
        )
    op, args, kwargs, outputs = data
    return OpStep(
        ops[whole(op, "a step's op")],
        tuple(_argument(a) for a in items(args, "a step's arguments")),
        {text(n, "an argument"): _argument(a) for n, a in mapping(kwargs, "a step's arguments by name").items()},
        wholes(outputs, "a step's outputs", least=-1),
    )


def _argument(given: object, *, depth: int = 0) -> Mapping[str, Any]:
    """Check an argument of an opaque op, and return it as it is."""
    if type(given) is not dict or len(given) != 1 or depth > _MOST_NESTED:
        raise ValueError("a step's argument that is no object of one key")
    ((kind, value),) = given.items()
    match kind:
        case "slot" | "state" | "recipe":
            whole(value, kind)
        case "size":
            text(value, "a size", most=1024)
        case "layer":
            text(value, "a layer's name", empty=True)
        case "list":
            for part in items(value, "a list", most=4096):
                _argument(part, depth=depth + 1)
        case "const":
            check_constant(value)
        case _:
            check_tagged(given)
    return given


def _without_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in given.items() if not _is_default(k, v)}


def _is_default(name: str, value: Any) -> bool:
    return value is None or value is False or value == "" or (name == "merged" and value == ())
