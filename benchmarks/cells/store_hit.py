"""A look-up of a model's bundle in the store: the facts alone, and with every file's digest, in milliseconds."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path


def main() -> None:
    """Run the cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", metavar="JSON", help="as ModelSpec.to_json writes it")
    parser.add_argument("store", type=Path)
    parser.add_argument("--facts", action="store_true", help="compare the facts only")
    args = parser.parse_args()
    from benchmarks.common.steps import emit
    from piecework.bundle import DirectoryStore
    from piecework.bundle.facts import check
    from piecework.engine.bundles import find
    from piecework.foundation.target import read_target
    from piecework.spec.model_spec import ModelSpec

    spec, store = ModelSpec.from_json(args.spec), DirectoryStore(args.store)
    begun = time.perf_counter()
    if args.facts:
        [key] = store.bundles(spec.key)
        bundle = store.get_bundle(key, verify=False)
        assert bundle is not None
        assert not check(bundle.facts, asked=spec.asked, target=read_target())
    else:
        found = find(spec, store=store, on_note=print)
        assert found is not None
        bundle = found.bundle
    ms = 1e3 * (time.perf_counter() - begun)
    heavy = {"torch", "transformers", "sympy"} & set(sys.modules)
    assert not heavy, heavy
    emit({"ms": ms, "facts": len(bundle.facts), "bytes": bundle.size_bytes})


if __name__ == "__main__":
    main()
