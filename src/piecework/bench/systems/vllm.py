"""vLLM's CPU build with its piecewise path forced, by the script `vllm_compile.py` of a folder that the user names."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from piecework.bench.launch import Caches, Launcher
from piecework.bench.measurements import Sample
from piecework.bench.systems.base import Case, Phase, System

SCRIPT: Final = "vllm_compile.py"
COLD_NOTE: Final = "vLLM's own compilation_time, all its caches and TMPDIR empty"
FIRST_COLD_NOTE: Final = "process start to first token, cold"
LOAD_NOTE: Final = "vLLM's own compilation_time of a warm start (AOT artifacts loaded)"
FIRST_TOKEN_NOTE: Final = "process start to first token, warm, engine in the process"
NOT_PRELOADED: Final = "vllm runs without tcmalloc and iomp, which PEERS_ROOT doesn't have"
_PRELOADED: Final = ("deb/x/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4", "v/lib/libiomp5.so")
_VERSION: Final = (
    "from importlib.metadata import distributions\n"
    "print(next(d.version for d in distributions() if d.name.startswith('vllm')))"
)


@dataclass(frozen=True)
class Peers:
    """An installed vLLM: its Python, its version, the script that measures it, and where all of it lies."""

    python: Path
    version: str
    script: Path
    root: Path


def find_peers(root: Path, *, scripts: Path, name: str = SCRIPT) -> Peers | str:
    """Return the vLLM under `root` (`v/bin/python`), measured by a script of a folder, or why there is none."""
    script, python = scripts / name, root / "v" / "bin" / "python"
    if not script.is_file():
        return f"no {name} in {scripts.name or scripts}"
    if not python.exists():
        return "not installed where PEERS_ROOT says; setup.sh beside the scripts installs it"
    done = subprocess.run([str(python), "-c", _VERSION], capture_output=True, text=True, check=False)
    if done.returncode:
        return "PEERS_ROOT has no vllm package; setup.sh beside the scripts installs it"
    return Peers(python, done.stdout.strip(), script.resolve(), root)


@final
class Vllm(System):
    """Measures vLLM with random ("dummy") weights, in one dtype."""

    def __init__(self, launcher: Launcher, peers: Peers, *, rounds: Mapping[Phase, int], dtype: str) -> None:
        super().__init__("vllm", rounds=rounds, dtypes=(dtype,))
        self._launcher = launcher
        self._peers = peers

    def warm_up(self, case: Case) -> None:
        """Import vLLM once."""
        caches = self._launcher.caches("warm-up-vllm", fresh=True)
        command = [str(self._peers.python), "-c", "from vllm import LLM"]
        self._launcher.run(command, variables=vllm_variables(caches), prints=False)

    def measure(self, phase: Phase, case: Case, *, batch: int) -> list[Sample]:
        """Measure a phase. Raises CellError."""
        cold = phase is Phase.COLD
        caches = self._launcher.caches(f"vllm/{case.layers}-{case.dtype}", fresh=cold)
        command = [str(self._peers.python), str(self._peers.script), "--model", str(case.model)]
        command += ["--layers", str(case.layers), "--mode", "piecewise", "--aot", "1", "--dtype", case.dtype]
        figures = self._launcher.run(
            [*command, *(["--cold"] if cold else [])], variables=vllm_variables(caches)
        ).figures
        if cold:
            return self._cold(case, figures)
        return [
            self.sample(case, "load_ms", 1e3 * figures["compilation_time_s"], note=LOAD_NOTE),
            self.sample(case, "first_token_s", figures["marks"]["first_token"], note=FIRST_TOKEN_NOTE),
        ]

    def _cold(self, case: Case, figures: Mapping[str, Any]) -> list[Sample]:
        counters = figures["counters"]
        return [
            self.sample(case, "cold_s", figures["compilation_time_s"], note=COLD_NOTE),
            self.sample(case, "cold_first_token_s", figures["marks"]["first_token"], note=FIRST_COLD_NOTE),
            self.sample(case, "pieces", counters.get("num_piecewise_capturable_graphs_seen", 0)),
            self.sample(case, "unique_pieces", counters.get("num_compiled_artifacts_saved", 0)),
            self.sample(case, "bundle_mb", figures["cache_mb"], note="all its caches on disk"),
        ]


def preloaded(peers: Peers) -> tuple[Path, ...]:
    """Return the libraries that vLLM's CPU build wants preloaded (tcmalloc and iomp), or none where one is missing."""
    libraries = tuple(peers.root / path for path in _PRELOADED)
    return libraries if all(path.exists() for path in libraries) else ()


def engine_variables(peers: Peers, caches: Caches) -> dict[str, str | None]:
    """Return the variables under which vLLM's own engine uses all cores of this process, as its scripts set them."""
    own = {"VLLM_CPU_OMP_THREADS_BIND": cores(), "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_USE_AOT_COMPILE": "1"}
    own |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CACHE_ROOT": str(caches.root / "vllm")}
    own |= {"VLLM_CONFIG_ROOT": str(caches.root / "vllm_config"), "HF_HOME": str(caches.root / "hf")}
    libraries = preloaded(peers)
    if libraries:
        own["LD_PRELOAD"] = ":".join(map(str, libraries))
    return vllm_variables(caches) | own


def cores() -> str:
    """Return the cores that this process may use, as vLLM takes them: "0-1", or "0,2"."""
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if len(mine) > 1 and mine[-1] - mine[0] == len(mine) - 1:
        return f"{mine[0]}-{mine[-1]}"
    return ",".join(map(str, mine))


def vllm_variables(caches: Caches) -> dict[str, str | None]:
    """Return the variables that let all that vLLM caches lie in `caches`, and its packages be its own."""
    return {**caches.variables(), "PEERS_ROOT": str(caches.root), "PYTHONPATH": None}
