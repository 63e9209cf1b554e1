"""A graph of Dynamo's as a function of its inputs: its plan is run, and its results are put together."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch

from piecework.bundle.run.following import FollowingModel
from piecework.bundle.sizes import Size, size_expression
from piecework.capture.dynamo import Carrier, Computed, DynamoGraph, Fixed, Given, SizeResult
from piecework.capture.request import TensorInput
from piecework.errors import BackwardError


@final
class GraphFunction:
    """Runs a graph for inference; results require gradients where they would in eager mode.

    Args:
        graph: how inputs and results map to the plan's.
        model: the plan, on the weights of each call.
        weights: the weights' names, in the order in which `model` takes them.
        device: device type of the graph.
        records: whether a backward pass may be asked for.
    """

    def __init__(
        self, graph: DynamoGraph, model: FollowingModel, *, weights: Sequence[str], device: str, records: bool
    ) -> None:
        self._model = model
        self._weights = [graph.weights[name] for name in weights]
        self._inputs = [(name, _reader(source, device)) for name, source in graph.inputs.items()]
        self._results = [_result(result) for result in graph.results]
        asks = any(isinstance(result, SizeResult) for result in graph.results)
        self._sizes = _size_places(graph) if asks else {}
        wanted = [isinstance(result, Computed) and result.needs_grad for result in graph.results]
        self._needs_grad = [i for i, needs in enumerate(wanted) if needs and records]

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Return what Dynamo's graph returns."""
        with torch.no_grad():
            values = {name: read(inputs) for name, read in self._inputs}
            computed = self._model.run(values, [inputs[i] for i in self._weights])
            sizes = {name: read(inputs) for name, read in self._sizes.items()}
            results = tuple(result(inputs, computed, sizes) for result in self._results)
        return _without_backward(results, inputs, self._needs_grad) if self._needs_grad else results


_Reader = Callable[[Sequence[Any]], Any]


def _reader(source: Given | Carrier | Fixed, device: str) -> _Reader:
    if isinstance(source, Fixed):
        value = source.value
        return lambda inputs: value
    position = source.position
    if isinstance(source, Given):
        return operator.itemgetter(position)
    carrier = torch.zeros(1, dtype=torch.uint8, device=device)
    return lambda inputs: carrier.expand(inputs[position])


def _size_places(graph: DynamoGraph) -> Mapping[str, _Reader]:
    """Return where each size is found among the inputs of a call."""
    places: dict[str, _Reader] = {}
    for given in graph.request.inputs:
        source = graph.inputs[given.name]
        if not isinstance(source, Given):
            continue
        if isinstance(given, TensorInput):
            places.update((d, _axis(source.position, axis)) for axis, d in enumerate(given.shape) if isinstance(d, str))
        else:
            places[given.size] = operator.itemgetter(source.position)
    return places


def _axis(position: int, axis: int) -> _Reader:
    return lambda inputs: inputs[position].shape[axis]


def _result(
    result: Given | Fixed | Computed | SizeResult,
) -> Callable[[Sequence[Any], Sequence[torch.Tensor], Mapping[str, int]], Any]:
    match result:
        case Given(position):
            return lambda inputs, computed, sizes: inputs[position]
        case Computed(position):
            return lambda inputs, computed, sizes: computed[position]
        case Fixed(value):
            return lambda inputs, computed, sizes: value
        case SizeResult(expression):
            size: Size = size_expression(expression)
            return lambda inputs, computed, sizes: size(sizes)


class _NoBackward(torch.autograd.Function):
    """Lets results look like those of recorded operations; a backward pass through them is refused."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, made: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise BackwardError(
            asked="a backward pass through a model that piecework compiled",
            found='torch.compile(backend="piecework") compiles for inference only',
            try_="train with another backend, or detach the result",
        )


def _without_backward(results: tuple[Any, ...], inputs: Sequence[Any], places: Sequence[int]) -> tuple[Any, ...]:
    """Let the results in `places` require gradients; a backward pass says why there are none."""
    given = {id(i) for i in inputs}
    made = [i for i in places if id(results[i]) not in given]
    if not made:
        return results
    anchor = torch.empty((), requires_grad=True)
    passed: Any = _NoBackward.apply(anchor, [results[i] for i in made])  # type: ignore[no-untyped-call]
    changed = dict(zip(made, passed, strict=True))
    return tuple(changed.get(i, result) for i, result in enumerate(results))
