"""`LayerName`: a layer's handle, an argument of operators that never tells layers apart for a compiler.

An operator that keeps state per layer must be told which layer it runs for. As a string, the name becomes a constant of
the graph, and eighty layers that are equal otherwise become eighty graphs. As a `LayerName` it is an input of the
graph: torch guards it by its type and not by its value, so that one trace, one graph and one artifact serve all layers.

Where torch can't take objects as arguments, or `PIECEWORK_LAYERNAME=0`, a `LayerName` is a string and
`LayerNameType` is `str`: results are the same, and only `torch.compile` has more to compile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, final

from piecework.errors import OpError
from piecework.foundation.environment import read_environment
from piecework.foundation.torch_private import (
    ReferenceBase,
    has_reference_types,
    is_traced_object,
    register_reference_type,
)

IS_OBJECT = has_reference_types() and read_environment().layer_names
"""Whether a LayerName is an object that compilers lift; else it is a string."""


if TYPE_CHECKING or IS_OBJECT:

    @final
    class LayerName(ReferenceBase):  # type: ignore[misc]
        """The name of a layer, as an argument of operators. Immutable; equal where the names are.

        Make it when the module is built and keep it as an attribute: under `torch.compile` an object that is made in
        the forward ends the graph there, and with `fullgraph=True` it is an error.

        Args:
            value: the name, such as "model.layers.3.self_attn".
        """

        __slots__ = ("_value",)

        def __init__(self, value: str) -> None:
            object.__setattr__(self, "_value", str(value))

        @property
        def value(self) -> str:
            """The name."""
            name: str = self._value
            return name

        def __setattr__(self, name: str, value: Any) -> None:
            raise AttributeError("a LayerName can't be changed; make another one")

        def __eq__(self, other: object) -> bool:
            return type(other) is type(self) and other._value == self._value

        def __hash__(self) -> int:
            return hash(("LayerName", self._value))

        def __repr__(self) -> str:
            return f"LayerName({self._value!r})"

        def __copy__(self) -> LayerName:
            return self

        def __deepcopy__(self, memo: object) -> LayerName:
            return self

        def __reduce__(self) -> tuple[Any, ...]:
            return LayerName, (self._value,)

    LayerName = register_reference_type(LayerName)  # type: ignore[misc]
    LayerNameType: TypeAlias = LayerName

else:

    class LayerName(str):
        """The name of a layer, as an argument of operators: a string, because torch can't take more here."""

        __slots__ = ()

        @property
        def value(self) -> str:
            """The name."""
            return str(self)

        def __repr__(self) -> str:
            return f"LayerName({str(self)!r})"

    LayerNameType: TypeAlias = str


def resolve(layer: LayerNameType | str) -> str:
    """Return the name that an operator was called with, whether as LayerName or as a string.

    Raises OpError inside a trace, where the name is not known: a fake implementation must not depend on it.
    """
    if isinstance(layer, str):
        return str(layer)
    if is_traced_object(layer):
        raise OpError(
            asked="the name of a layer while a graph is traced",
            found="a graph that serves all layers, and so has no name of one",
            try_="make the fake implementation independent of it, or give the operator a `str` argument",
        )
    return layer.value


def encode(name: str) -> LayerNameType:
    """Return what an operator with a `LayerNameType` argument is called with for the layer `name`."""
    return LayerName(name)
