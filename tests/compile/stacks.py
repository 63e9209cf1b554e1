"""Run a stack of layers that name themselves under torch.compile, in this process or in one of its own.

python -m tests.compile.stacks KIND NUM_LAYERS ... prints the counts of each as JSON, with "worst": the largest
difference from eager mode.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from piecework.bundle.record import Recorder
from piecework.ops.ir.forward_context import ForwardContext
from tests.unit.names.kinds import KINDS
from tests.unit.names.models import forwards, make_stack, make_states

FAMILY = "KV update"


@torch.no_grad()
def run_compiled(kind: str, *, num_layers: int) -> dict[str, float]:
    """Return what the backend counted for two forwards of different lengths, and the difference from eager mode."""
    model, recorder = make_stack(FAMILY, kind, num_layers=num_layers), Recorder()
    run = torch.compile(model, backend="piecework", options={"recorder": recorder}, dynamic=True, fullgraph=True)
    pairs = zip(run_steps(run, kind, num_layers=num_layers), run_steps(model, kind, num_layers=num_layers), strict=True)
    worst = max(float((made - wanted).abs().max()) for made, wanted in pairs)
    return {"compiled": 0, "store_hits": 0, **recorder.finish().counts, "worst": worst}


def run_steps(run: Callable[[Tensor], Tensor], kind: str, *, num_layers: int) -> list[Tensor]:
    """Return the forwards' results, then the layers' caches as they are afterwards."""
    states = make_states(FAMILY, num_layers=num_layers)
    context = ForwardContext({KINDS[kind](index): state for index, state in enumerate(states)})
    results = []
    for batch, x in forwards():
        with context.running(batch):
            results.append(run(x))
    return [*results, *(state.kv_cache for state in states)]


if __name__ == "__main__":
    asked = zip(sys.argv[1::2], sys.argv[2::2], strict=True)
    print(json.dumps([run_compiled(kind, num_layers=int(count)) for kind, count in asked]))
