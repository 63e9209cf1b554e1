"""One of several processes on a store: loads bundles, writes them, or makes room; prints what it did.

Its bundles are those of a directory, eager and native ones. A writer stores those again that are gone; a collector
removes all that isn't in use at the moment.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

_FEW_NATIVE = 50  # an opened library stays mapped: one load in so many


def main() -> None:
    """Run the cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=("load", "write", "collect"))
    parser.add_argument("store", type=Path)
    parser.add_argument("bundles", type=Path, help="directory with bundles, and with their weights beside each")
    parser.add_argument("--loads", type=int, default=100, metavar="N", help="how many loads (default: 100)")
    parser.add_argument("--until", type=Path, metavar="FILE", help="write or collect until it exists")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from benchmarks.common.steps import emit
    from piecework.bundle import DirectoryStore

    store = DirectoryStore(args.store)
    done: Counter[str] = Counter()
    failures: list[str] = []
    step = {"load": _load, "write": _write, "collect": _collect}[args.role](args, store, done, failures)
    begun = time.perf_counter()
    while not args.until.exists() if args.until else done["loads"] < args.loads:
        try:
            step()
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}"[:500])
    seconds = time.perf_counter() - begun
    emit({"seconds": seconds, **done, "failures": len(failures), "first_failures": failures[:3]})


def _load(args: argparse.Namespace, store: Any, done: Counter[str], failures: list[str]) -> Any:
    import torch
    from safetensors.torch import load_file

    from piecework.bundle import find_bundle
    from piecework.bundle.run import load

    draw = random.Random(args.seed)
    names = {kind: sorted(path.name for path in args.bundles.glob(f"{kind}-*") if path.is_dir()) for kind in KINDS}
    weights = {path.stem: load_file(path) for path in args.bundles.glob("*.safetensors")}
    x = torch.ones(3, 16)

    def step() -> None:
        kind = "native" if done["loads"] % _FEW_NATIVE == _FEW_NATIVE - 1 else "eager"
        name = draw.choice(names[kind])
        with store.in_use():
            bundle = find_bundle(store, name, report=failures.append)
            if bundle is None:
                done["misses"] += 1
                time.sleep(0.002)
                return
            given = {key: value for key, value in weights[name].items() if key != "expected"}
            made = load(bundle, weights=given)(x)
        torch.testing.assert_close(made, weights[name]["expected"])
        done["loads"] += 1
        done[f"{kind}_loads"] += 1

    return step


def _write(args: argparse.Namespace, store: Any, done: Counter[str], _failures: list[str]) -> Any:
    from piecework.bundle import BundleContent, open_bundle
    from piecework.bundle.store.interface import bundle_key

    draw = random.Random(args.seed)
    bundles = {path.name: open_bundle(path) for path in sorted(args.bundles.iterdir()) if path.is_dir()}

    def step() -> None:
        name = draw.choice(sorted(bundles))
        bundle = bundles[name]
        with store.in_use():
            artifacts = {}
            for number, file in enumerate(bundle.artifacts):
                stored = store.put_artifact(f"{name}-{number}", content=bundle.artifact_path(file))
                artifacts[stored.name] = stored.path
            content = BundleContent(
                bundle.plan(), artifacts, bundle.facts, bundle.record(), bundle.constants(), bundle.identity
            )
            store.put_bundle(bundle_key(name, bundle.facts), content=content)
        done["writes"] += 1

    return step


def _collect(_args: argparse.Namespace, store: Any, done: Counter[str], _failures: list[str]) -> Any:
    def step() -> None:
        done["removed"] += len(store.collect(max_bytes=0, grace_s=0.0))
        done["collections"] += 1
        time.sleep(0.02)

    return step


KINDS = ("eager", "native")

if __name__ == "__main__":
    main()
