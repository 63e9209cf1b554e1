"""Bundles are loaded while others write them and make room: none fails."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from benchmarks.common.launch import ROOT, CellError
from benchmarks.common.run import Run
from piecework.foundation.environment import child_variables

_KINDS: Final = {"eager": 6, "native": 2}
_LOADERS: Final = 3
_MAKE: Final = """
import sys
from pathlib import Path
import torch, piecework
from safetensors.torch import save_file
place, kind, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.manual_seed(number)
module = torch.nn.Sequential(torch.nn.Linear(16, 8 + number), torch.nn.SiLU(), torch.nn.Linear(8 + number, 4))
backend = piecework.BackendName.AOTI if kind == "native" else piecework.BackendName.EAGER
out = place / f"{kind}-{number}"
options = piecework.CompileOptions(backend=backend)
piecework.compile(module, (torch.ones(3, 16),), out=out, options=options)
weights = {**module.state_dict(), "expected": module(torch.ones(3, 16)).detach()}
save_file({name: tensor.contiguous() for name, tensor in weights.items()}, place / f"{out.name}.safetensors")
"""


def measure(run: Run, *, loads: int) -> None:
    """Make bundles of small modules, then load, write and collect them at once. Raises CellError."""
    caches = run.launcher.caches("loads", fresh=True)
    bundles = run.root / "bundles"
    bundles.mkdir()
    for kind, number in ((kind, number) for kind, most in _KINDS.items() for number in range(most)):
        command = [sys.executable, "-c", _MAKE, str(bundles), kind, str(number)]
        run.launcher.run(command, variables=caches.variables(), prints=False)
    store, over = caches.root / "traffic", run.root / "over"
    variables = child_variables({"OMP_NUM_THREADS": "1", **caches.variables()})

    def start(role: str, *more: str) -> subprocess.Popen[str]:
        words = ["-m", "benchmarks.cells.store_traffic", role, str(store), str(bundles), *more]
        command = [sys.executable, *words]
        return subprocess.Popen(command, env=variables, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    begun = time.monotonic()
    others = [start(role, "--until", str(over)) for role in ("write", "collect")]
    each = -(-loads // _LOADERS)
    loaders = [start("load", "--loads", str(each), "--seed", str(seed)) for seed in range(_LOADERS)]
    try:
        figures = [_figures(process) for process in loaders]
        over.touch()
        figures += [_figures(process) for process in others]
    finally:
        for process in (*loaders, *others):
            process.kill()
    _add(run, figures, wall_s=time.monotonic() - begun, store=store)


def _add(run: Run, figures: list[dict[str, Any]], *, wall_s: float, store: Path) -> None:
    from piecework.bundle import DirectoryStore

    part = {"system": "piecework", "part": "loads"}
    total = Counter[str]()
    for one in figures:
        total.update({name: value for name, value in one.items() if isinstance(value, int)})
    told = [text for one in figures for text in one["first_failures"]]
    for metric in ("loads", "native_loads", "misses", "writes", "collections", "removed"):
        run.add(total[metric], **part, metric=metric)
    run.add(wall_s, **part, metric="wall_s")
    run.add(total["failures"], **part, metric="failures", note=" / ".join(told[:3]))
    run.hold({**part, "metric": "failures"}, "failures", total["failures"], 0)
    damaged = len(DirectoryStore(store).damaged())
    run.add(damaged, **part, metric="invalid_entries")
    run.hold({**part, "metric": "invalid_entries"}, "invalid_entries", damaged, 0)


def _figures(process: subprocess.Popen[str]) -> dict[str, Any]:
    printed, _ = process.communicate()
    if process.returncode:
        raise CellError(asked="a part of the traffic", found=f"exit code {process.returncode}", try_="run it by hand")
    found = json.loads(printed.splitlines()[-1])
    assert isinstance(found, dict)
    return found
