"""A torch profiler trace of some of an engine's steps, in which every step of the plan has its piece and its layers.

Chrome's chrome://tracing and https://ui.perfetto.dev show such a file.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from piecework.bundle.run import LoadedModel
from piecework.engine.engine import Runner
from piecework.engine.profile_options import ProfileOptions
from piecework.foundation import torch_private
from piecework.foundation.files import as_store_error
from piecework.report.step_labels import step_labels


def profiled(model: LoadedModel, options: ProfileOptions, *, on_note: Callable[[str], None]) -> Runner:
    """Return what an engine runs to be profiled; `on_note` is told of the file.

    Raises StoreError where the directory can't be made.
    """
    try:
        options.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise as_store_error(error, asked=f"write a profile into {options.directory}") from error
    return ProfiledRunner(model, options, on_note=on_note)


@final
class ProfiledRunner:
    """Runs a model, and writes a trace of some of its forwards. Costs a call per forward before and after them.

    What goes wrong with the trace is told to `on_note` and stops nothing else.
    """

    def __init__(self, model: LoadedModel, options: ProfileOptions, *, on_note: Callable[[str], None]) -> None:
        self._model = model
        self._options = options
        self._on_note = on_note
        self._num_run = 0
        self._profiler: Any = None
        self._over = False

    def make_states(self, sizes: Mapping[str, int]) -> None:
        """See `Runner`."""
        self._model.make_states(sizes)

    def run(self, inputs: Mapping[str, Tensor | int]) -> list[Tensor]:
        """See `Runner`."""
        if self._over:
            return self._model.run(inputs)
        if self._num_run == self._options.skip:
            self._begin()
        with self._label(inputs):
            results = self._model.run(inputs)
        self._num_run += 1
        if self._num_run == self._options.skip + self._options.steps:
            self._end()
        return results

    def close(self) -> None:
        """Write what there is, if the steps aren't over yet, and close the model. Any thread may call it."""
        self._end()
        self._model.close()

    def _begin(self) -> None:
        self._model.label_steps(step_labels(self._model.plan))
        self._profiler = torch_private.thread_wide_profiler()
        self._profiler.start()

    def _label(self, inputs: Mapping[str, Tensor | int]) -> AbstractContextManager[Any]:
        if self._profiler is None:
            return nullcontext()
        tokens = inputs["input_ids"]
        count = len(tokens) if isinstance(tokens, Tensor) else 0
        label = f"forward {self._num_run + 1}: {count} tokens, {inputs['num_decode_tokens']} of them decoding"
        return torch.profiler.record_function(label)

    def _end(self) -> None:
        profiler, self._profiler, self._over = self._profiler, None, True
        if profiler is None:
            return
        steps = self._num_run - self._options.skip
        self._model.label_steps(None)
        profiler.stop()
        path = _free_path(self._options.directory)
        try:
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            self._on_note(f"no profile: {error}")
            return
        # torch tells only its log where it can't write
        self._on_note(f"profile of {steps} forwards: {path}" if path.exists() else f"no profile: {path} is not there")


def _free_path(directory: Path) -> Path:
    paths = (directory / f"trace-{number}.json" for number in itertools.count(1))
    return next(path for path in paths if not path.exists())
