"""See every call of torch's functions while a model is traced, and pass it on to the block that is being looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

from piecework.capture.replay import Replay
from piecework.capture.tape import Writer, written
from piecework.capture.tensors import NamedTensors

_DEVICE: Final = torch.Tensor.device.__get__


class Calls(TorchFunctionMode):
    """While active, calls go to the innermost block that runs; the model's own tensors are replaced by fake ones.

    Attributes:
        is_inside: whether one of torch's functions is running, so that calls inside it aren't seen.
    """

    def __init__(self, tensors: NamedTensors) -> None:
        super().__init__()
        self.is_inside = False
        self._tensors = tensors
        self._running: list[Writer | Replay] = []

    @property
    def innermost(self) -> Writer | Replay | None:
        """The block whose forward is running, None outside of all."""
        return self._running[-1] if self._running else None

    @contextlib.contextmanager
    def run(self, block: Writer | Replay) -> Iterator[None]:
        """Inside, calls go to `block`."""
        self._running.append(block)
        try:
            yield
        finally:
            self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run, write down or compare a call."""
        top = self.innermost
        if func == _DEVICE and self._tensors.is_known(args[0]):
            return self._tensors.device  # of the fake one, which doesn't ask torch for it
        if isinstance(top, Replay):
            return top.call(func, args, kwargs or {})
        args, kwargs = written((args, kwargs or {}), self._fake)
        self.is_inside = True
        try:
            return func(*args, **kwargs) if top is None else top.call(func, args, kwargs)
        finally:
            self.is_inside = False

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._tensors.fake(tensor) if self._tensors.is_known(tensor) else tensor
