"""A bundle through a real registry: pushed, and pulled over a link with and without latency."""

from __future__ import annotations

import shutil
import time
from typing import Any

from benchmarks.common.launch import CellError
from benchmarks.common.run import Run
from benchmarks.common.servers import registry, registry_command, slow_link
from benchmarks.storing.hits import deep_bundle
from piecework.bundle import DirectoryStore
from piecework.bundle.store.travel import open_remote, pull, push

LATENCY_MS = 20.0
_MOST_ROUND_TRIPS = 10


def measure(run: Run, *, layers: int, repeats: int) -> None:
    """Push a deep model's bundle, and pull it into empty stores. Raises CellError."""
    command = registry_command()
    if command is None:
        raise CellError(asked="a registry", found="no docker-registry", try_="apt-get install docker-registry")
    deep = deep_bundle(run, layers)
    here = DirectoryStore(deep.store)
    [key] = here.bundles(deep.spec.key)
    part: dict[str, Any] = {"system": "piecework", "part": "remotes", "layers": layers}
    (run.root / "registry").mkdir()
    with registry(run.root / "registry", command=command) as port:
        for number in range(repeats):
            with open_remote(f"oci://127.0.0.1:{port}/bench/model{number}") as remote:
                begun = time.perf_counter()
                push(remote, key, store=here)
                run.add(time.perf_counter() - begun, **part, metric="push_s", note="to Debian's docker-registry")
        for late_ms in (0.0, LATENCY_MS):
            with slow_link(port, round_trip_ms=late_ms, log=run.root / "link") as link:
                for _ in range(repeats):
                    run.add(
                        _pull_s(run, f"oci://127.0.0.1:{link}/bench/model0", key),
                        **part,
                        latency_ms=late_ms,
                        metric="pull_s",
                    )
    fast = run.value({**part, "latency_ms": 0.0, "metric": "pull_s"}) or 0.0
    slow = run.value({**part, "latency_ms": LATENCY_MS, "metric": "pull_s"}) or 0.0
    note = "what the latency adds, divided by it; a connection's start is one"
    run.add((slow - fast) / LATENCY_MS * 1e3, **part, metric="round_trips", note=note)
    trips = {**part, "metric": "round_trips"}
    run.hold(trips, "round_trips", run.value(trips) or 0.0, _MOST_ROUND_TRIPS)


def _pull_s(run: Run, url: str, key: str) -> float:
    place = run.root / "pulled"
    shutil.rmtree(place, ignore_errors=True)
    store = DirectoryStore(place)
    begun = time.perf_counter()
    with open_remote(url) as remote:
        pull(remote, key, store=store)
    return time.perf_counter() - begun
