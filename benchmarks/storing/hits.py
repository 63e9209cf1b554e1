"""What a warm start spends in the store: comparing facts, and the whole look-up with every file's digest."""

from __future__ import annotations

from typing import Any

from benchmarks.common.models import LlamaShape, RandomModel
from benchmarks.common.run import Run
from piecework.spec.model_spec import ModelSpec

_LIMIT_MS = 20.0


def measure(run: Run, *, layers: int, repeats: int) -> None:
    """Compile a deep model with native code, and look it up in new processes. Raises CellError."""
    caches = run.launcher.caches("hits", fresh=True)
    model = RandomModel("llama", layers, LlamaShape(64, 2, 128, 1024)).write(run.root / "deep", dtype="float32")
    run.launcher.piecework("compile", str(model), caches=caches)
    spec, store = ModelSpec.of(model).to_json(), str(caches.root / "piecework")
    part: dict[str, Any] = {"system": "piecework", "part": "hits", "layers": layers}
    for _ in range(repeats):
        for metric, words in (("fact_check_ms", ["--facts"]), ("local_hit_ms", [])):
            figures = run.launcher.cell("store_hit", spec, store, *words, caches=caches).figures
            note = f"{figures['facts']} facts, {figures['bytes']} bytes, in a new process without torch"
            run.add(figures["ms"], **part, metric=metric, note=note)
    key = {**part, "metric": "fact_check_ms"}
    run.hold(key, "fact_check_ms", run.value(key) or 0.0, _LIMIT_MS)
