"""vLLM's CPU build as a peer: where it is installed, and the scripts and the cell that measure it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from benchmarks.common.chats import Chat, Outcome
from benchmarks.common.launch import Caches, Launcher
from benchmarks.common.run import Run

STARTUP_SCRIPT: Final = "vllm_compile.py"
THROUGHPUT_SCRIPT: Final = "vllm_throughput.py"
_CHATS_CELL: Final = Path(__file__).parents[1] / "cells" / "vllm_chats.py"
_PRELOADED: Final = ("deb/x/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4", "v/lib/libiomp5.so")
_VERSION: Final = (
    "from importlib.metadata import distributions\n"
    "print(next(d.version for d in distributions() if d.name.startswith('vllm')))"
)


def add_peers_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where vLLM and the scripts that measure it are."""
    for name, variable, text in (
        ("--peers", "PEERS_ROOT", "where vLLM is installed, as v/bin/python"),
        ("--peer-scripts", "PEERS_SCRIPTS", f"folder with {STARTUP_SCRIPT} and {THROUGHPUT_SCRIPT}"),
    ):
        given = os.environ.get(variable)
        default = Path(given) if given else None
        parser.add_argument(name, type=Path, metavar="DIR", default=default, help=f"{text} (default: ${variable})")


def find_vllm(args: argparse.Namespace, run: Run, *, script: str | None = None) -> Vllm | None:
    """Return the vLLM to measure, or None with a note where it isn't there, or lacks the script that it is for."""
    found = _find(args.peers, args.peer_scripts, run.launcher, script=script)
    if isinstance(found, str):
        run.notes.append(f"vllm is not measured: {found}")
        return None
    if not found.preload:
        run.notes.append("vllm runs without tcmalloc and iomp, which --peers doesn't have")
    return found


def _find(root: Path | None, scripts: Path | None, launcher: Launcher, *, script: str | None) -> Vllm | str:
    if root is None:
        return "neither --peers nor PEERS_ROOT is given"
    root = root.expanduser().absolute()
    python = root / "v" / "bin" / "python"
    if not python.exists():
        return f"no v/bin/python in {root.name}"
    if script is not None and (scripts is None or not (scripts / script).is_file()):
        return f"--peer-scripts names no folder with {script}"
    done = subprocess.run([str(python), "-c", _VERSION], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"no vllm package in {root.name}"
    libraries = tuple(root / path for path in _PRELOADED)
    preload = libraries if all(path.exists() for path in libraries) else ()
    return Vllm(root, python, done.stdout.strip(), preload, None if scripts is None else scripts.absolute(), launcher)


@final
@dataclass(frozen=True)
class Vllm:
    """An installed vLLM, run with random ("dummy") weights, bound to the cores of this process.

    Attributes:
        root, python, version: where it is, its Python, and its version.
        preload: the libraries that its CPU build wants preloaded (tcmalloc and iomp), or none where one is missing.
        scripts: the folder with the scripts.
        launcher: runs its processes.
    """

    root: Path
    python: Path
    version: str
    preload: tuple[Path, ...]
    scripts: Path | None
    launcher: Launcher

    def has(self, script: str) -> bool:
        """Whether there is a script."""
        return self.scripts is not None and (self.scripts / script).is_file()

    def warm_up(self) -> None:
        """Import it once. Raises CellError."""
        caches = self.launcher.caches("warm-up-vllm", fresh=True)
        command = [str(self.python), "-c", "from vllm import LLM"]
        self.launcher.run(command, variables=_variables(caches), prints=False)

    def start(self, model: Path, *, layers: int, dtype: str, caches: str, cold: bool = False) -> Mapping[str, Any]:
        """Start by the start-up script, piecewise, compiled code from its cache; return what it prints."""
        words = [STARTUP_SCRIPT, "--model", str(model), "--layers", str(layers), "--mode", "piecewise", "--aot", "1"]
        words += ["--dtype", dtype, *(["--cold"] if cold else [])]
        return self._script(words, self.launcher.caches(caches, fresh=cold))

    def throughput(self, model: Path, *, dtype: str, words: Sequence[str]) -> Mapping[str, Any]:
        """Run the throughput script with vLLM's own defaults; return what it prints."""
        caches = self.launcher.caches("vllm", fresh=False)
        for name in ("deb", "v"):  # where the script looks for the libraries to preload
            link = caches.root / name
            if not link.exists() and (self.root / name).exists():
                link.symlink_to(self.root / name)
        command = [THROUGHPUT_SCRIPT, "--model", str(model), "--dtype", dtype, "--mode", "default", *words]
        return self._script([*command, "--bind", cores(), "--preload", str(int(bool(self.preload)))], caches)

    def chats(self, model: Path, chats: Sequence[Chat], *, dtype: str, max_length: int) -> list[Outcome]:
        """Send chats through its asynchronous engine, all at once."""
        caches = self.launcher.caches("vllm-serving", fresh=False)
        requests = caches.root / "requests.json"
        requests.write_text(json.dumps(chats))
        command = [str(self.python), str(_CHATS_CELL), str(requests), "--model", str(model)]
        command += ["--dtype", dtype, "--max-length", str(max_length)]
        own = {"VLLM_CPU_OMP_THREADS_BIND": cores(), "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_USE_AOT_COMPILE": "1"}
        own |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CACHE_ROOT": str(caches.root / "vllm")}
        own |= {"VLLM_CONFIG_ROOT": str(caches.root / "vllm_config"), "HF_HOME": str(caches.root / "hf")}
        if self.preload:
            own["LD_PRELOAD"] = ":".join(map(str, self.preload))
        found = self.launcher.run(command, variables={**_variables(caches), **own}).figures["outcomes"]
        return [
            Outcome(each["begin_s"], tuple(each["token_s"]), output)
            for each, (_, output) in zip(found, chats, strict=True)
        ]

    def _script(self, words: Sequence[str], caches: Caches) -> Mapping[str, Any]:
        assert self.scripts is not None
        command = [str(self.python), str(self.scripts / words[0]), *words[1:]]
        return self.launcher.run(command, variables=_variables(caches)).figures


def cores() -> str:
    """Return the cores that this process may use, as vLLM takes them: "0-1", or "0,2"."""
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if len(mine) > 1 and mine[-1] - mine[0] == len(mine) - 1:
        return f"{mine[0]}-{mine[-1]}"
    return ",".join(map(str, mine))


def _variables(caches: Caches) -> dict[str, str | None]:
    """Return the variables that let all that vLLM caches lie in `caches`, and its packages be its own."""
    return {**caches.variables(), "PEERS_ROOT": str(caches.root), "PYTHONPATH": None}
