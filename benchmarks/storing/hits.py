"""What a warm start spends in the store: comparing facts, and the whole look-up with every file's digest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.launch import Caches
from benchmarks.common.models import LlamaShape, RandomModel
from benchmarks.common.run import Run
from piecework.spec.model_spec import ModelSpec

_LIMIT_MS = 20.0


@dataclass(frozen=True)
class Deep:
    """A deep model's bundle in a store."""

    spec: ModelSpec
    store: Path
    caches: Caches


def deep_bundle(run: Run, layers: int) -> Deep:
    """Compile a deep model with native code, once. Raises CellError."""
    caches = run.launcher.caches("deep", fresh=False)
    model = run.root / "deep"
    if not caches.warm:
        RandomModel("llama", layers, LlamaShape(64, 2, 128, 1024)).write(model, dtype="float32")
        run.launcher.piecework("compile", str(model), caches=caches)
    return Deep(ModelSpec.of(model), caches.root / "piecework", caches)


def measure(run: Run, *, layers: int, repeats: int) -> None:
    """Look the bundle of a deep model up in new processes. Raises CellError."""
    deep = deep_bundle(run, layers)
    spec, store = deep.spec.to_json(), str(deep.store)
    part: dict[str, Any] = {"system": "piecework", "part": "hits", "layers": layers}
    for _ in range(repeats):
        for metric, words in (("fact_check_ms", ["--facts"]), ("local_hit_ms", [])):
            figures = run.launcher.cell("store_hit", spec, store, *words, caches=deep.caches).figures
            note = f"{figures['facts']} facts, {figures['bytes']} bytes, in a new process without torch"
            run.add(figures["ms"], **part, metric=metric, note=note)
    key = {**part, "metric": "fact_check_ms"}
    run.hold(key, "fact_check_ms", run.value(key) or 0.0, _LIMIT_MS)
