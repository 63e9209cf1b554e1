"""A module's weights, buffers and states as inputs of the graph that is being traced, made when they are first needed.

A template's tensors become fake tensors that the trace follows. A sibling's never do: they only get a placeholder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from piecework.capture.request import TensorInput
from piecework.foundation.torch_private import Tracer, plain_tensors


class NamedTensors:
    """Parameters and buffers of a module by identity; a tensor with several names goes by its first.

    Args:
        module: the module that is captured.
        states: declared shapes of buffers that are states, by name.
        sizes: symbolic sizes by name.
        fake_mode: makes the fake tensors.
        device: device type of the weights when the compiled model runs.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        states: Mapping[str, TensorInput],
        sizes: Mapping[str, Any],
        fake_mode: Any,
        device: str,
    ) -> None:
        self.by_name = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.nodes: dict[str, torch.fx.Node] = {}
        self._names = {id(t): n for n, t in self.by_name.items()}
        self._states = states
        self._sizes = sizes
        self._fake_mode = fake_mode
        self._device = device
        self._fakes: dict[str, torch.Tensor] = {}
        self._name_of_fake: dict[int, str] = {}
        self._swapped: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        self._tracer: Tracer | None = None

    @property
    def device(self) -> torch.device:
        """Where the model will run."""
        return torch.device(self._device)

    def begin(self, tracer: Tracer) -> None:
        """Say which trace the tensors are inputs of."""
        self._tracer = tracer

    def is_known(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is one of the module's own (not a fake one)."""
        return id(tensor) in self._names

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """Return the name of a tensor of the module, or of the fake that stands for it."""
        return self._names.get(id(tensor)) or self._name_of_fake.get(id(tensor))

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the fake tensor that stands for a tensor of the module; its placeholder is made with it."""
        assert self._tracer is not None
        name = self._names[id(tensor)]
        if name not in self._fakes:
            with plain_tensors(), self._tracer.paused(), self._fake_mode:
                self._take(name, self._make(name, tensor))
        return self._fakes[name]

    def _take(self, name: str, fake: torch.Tensor) -> None:
        assert self._tracer is not None
        self._fakes[name] = fake
        self._name_of_fake[id(fake)] = name
        self._tracer.attach(fake, self.node(name, like=fake), new_sizes=name in self._states)

    def node(self, name: str, *, like: torch.Tensor) -> torch.fx.Node:
        """Return the placeholder of a tensor of the module; `like` has the metadata it is to have in the graph."""
        assert self._tracer is not None
        if name not in self.nodes:
            graph = self._tracer.graph
            with graph.inserting_before(next(iter(graph.nodes), None)):
                self.nodes[name] = graph.placeholder(f"tensor_{len(self.nodes)}")
            self.nodes[name].meta["val"] = like
        return self.nodes[name]

    def adopt(self, name: str, value: torch.Tensor, *, node: torch.fx.Node) -> None:
        """Take in a tensor that is none of the module's parameters and buffers, with its placeholder."""
        self.by_name[name] = value
        self.nodes[name] = node

    def same_metadata(self, a: str, b: str) -> bool:
        """Whether two tensors of the module have equal shape, stride, dtype and role."""
        if (a in self._states) != (b in self._states):
            return False
        if a in self._states:
            return (self._states[a].shape, self._states[a].dtype) == (self._states[b].shape, self._states[b].dtype)
        x, y = self.by_name[a], self.by_name[b]
        return x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride()

    def swap(self, modules: Iterable[nn.Module]) -> None:
        """Put fakes in place of the tensors of `modules` until `restore`."""
        assert self._tracer is not None
        found: list[tuple[Any, str, torch.Tensor]] = [
            (table, name, tensor)
            for part in modules
            for table in (part._parameters, part._buffers)
            for name, tensor in table.items()
            if tensor is not None and self.is_known(tensor)
        ]
        self._swapped += found
        with plain_tensors(), self._tracer.paused(), self._fake_mode:
            for _, _, tensor in found:
                name = self._names[id(tensor)]
                if name not in self._fakes:
                    self._take(name, self._make(name, tensor))
        for table, name, tensor in found:
            table[name] = self._fakes[self._names[id(tensor)]]

    def replaced(self) -> list[str]:
        """Return the names of tensors in whose place the module has put another one since `swap`."""
        return [
            self._names[id(t)] for table, n, t in self._swapped if table.get(n) is not self._fakes[self._names[id(t)]]
        ]

    def assigned(self) -> list[tuple[str, torch.Tensor]]:
        """Return what the module has put in the place of its tensors since `swap`, each with the tensor's name."""
        found = [(self._names[id(t)], table.get(n)) for table, n, t in self._swapped]
        return [(name, value) for name, value in found if value is not self._fakes[name] and value is not None]

    def put_back(self, name: str) -> None:
        """Put the fake of a tensor where the module has put another one since `swap`."""
        for table, attribute, tensor in self._swapped:
            if self._names[id(tensor)] == name:
                table[attribute] = self._fakes[name]

    def restore(self) -> None:
        """Put the module's own tensors back."""
        for table, name, tensor in reversed(self._swapped):
            table[name] = tensor
        self._swapped = []

    def fresh_fake(self, name: str) -> torch.Tensor:
        """Return a new fake tensor like the one for `name`, known to no trace."""
        with self._fake_mode:
            return self._make(name, self.by_name[name])

    def _make(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in self._states:
            given = self._states[name]
            shape = [self._sizes[d] if isinstance(d, str) else d for d in given.shape]
            return torch.empty(shape, dtype=getattr(torch, given.dtype), device=self._device)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)  # the loader binds it contiguous
