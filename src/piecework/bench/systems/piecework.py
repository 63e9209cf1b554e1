"""piecework, by the commands that a user types: `piecework compile`, then `piecework generate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, final

from piecework.bench.launch import Caches, Launcher, Ran
from piecework.bench.measurements import Sample
from piecework.bench.systems.base import Case, Phase, System

PROMPT: Final = "The for statement"
_IMPORT_TORCH: Final = "import torch; print('{}', flush=True)"
COLD_NOTE: Final = "wall time of the process `piecework compile`, its caches empty"
FIRST_TOKEN_NOTE: Final = "from outside: start of `piecework generate` to its first output, which follows the token"
LOAD_NOTE: Final = "verify + read the plan + open + bind after `import torch`; weights taken and packed apart"
RSS_NOTE: Final = (
    "peak resident memory of load and one prefill step, less that after `import torch`, less the resident part of the "
    "mapped checkpoint, less packed weights; KV cache of one block included"
)
IMPORT_NOTE: Final = "process start to `import torch` done, its end not counted; run just before each warm start"


@final
class Piecework(System):
    """Measures this package as it is installed here."""

    def __init__(self, launcher: Launcher, *, repeats: int, least_steps: int) -> None:
        super().__init__("piecework", rounds=dict.fromkeys(Phase, repeats))
        self._launcher = launcher
        self._least_steps = least_steps
        self._bundles: dict[Case, Path] = {}

    def warm_up(self, case: Case) -> None:
        """Compile once, so that torch, transformers and the C++ compiler are in the page cache."""
        self._compile(case, caches=self._launcher.caches("warm-up", fresh=True))

    def measure(self, phase: Phase, case: Case, *, batch: int) -> list[Sample]:
        """Measure a phase. Raises CellError."""
        match phase:
            case Phase.COLD:
                return self._cold(case)
            case Phase.WARM:
                return self._warm(case)
            case Phase.STEPS:
                figures = self._load(case, batch=batch, steps=self._least_steps)
                note = f"median of {figures['steps']} steps in each of n processes"
                return [self.sample(case, "step_ms", figures["step_ms"], batch=batch, note=note)]

    def _cold(self, case: Case) -> list[Sample]:
        wall_s, figures = self._compile(case, caches=self._caches(case, fresh=True))
        self._bundles[case] = Path(figures["bundle"])
        return [
            self.sample(case, "cold_s", wall_s, note=COLD_NOTE),
            self.sample(case, "capture_s", figures["capture_s"]),
            self.sample(case, "compile_s", figures["compile_s"]),
            self.sample(case, "pieces", figures["pieces"]),
            self.sample(case, "unique_pieces", figures["unique_pieces"]),
            self.sample(case, "bundle_mb", figures["bundle_bytes"] / 2**20),
        ]

    def _warm(self, case: Case) -> list[Sample]:
        importing = self._run(case, ["-c", _IMPORT_TORCH])
        words = ["-m", "piecework", "generate", str(case.model), "--prompt", PROMPT, "--max-new-tokens", "1", "--json"]
        generated = self._run(case, [*words, *_options(case)])
        loaded = self._load(case, batch=1, steps=0)
        return [
            self.sample(case, "import_torch_s", importing.first_output_s, note=IMPORT_NOTE),
            self.sample(case, "first_token_s", generated.first_output_s, note=FIRST_TOKEN_NOTE),
            self.sample(case, "load_ms", loaded["load_ms"], note=LOAD_NOTE),
            self.sample(case, "load_pack_ms", loaded["load_pack_ms"]),
            self.sample(case, "load_weights_ms", loaded["load_weights_ms"]),
            self.sample(case, "rss_mb", loaded["rss_mb"], note=RSS_NOTE),
        ]

    def _compile(self, case: Case, *, caches: Caches) -> tuple[float, Any]:
        words = ["-m", "piecework", "compile", str(case.model), "--json", *_options(case)]
        ran = self._launcher.run([sys.executable, *words], variables=caches.variables())
        return ran.wall_s, ran.figures

    def _load(self, case: Case, *, batch: int, steps: int) -> Any:
        words = ["-m", "piecework.bench.cells.load", str(case.model), "--bundle", str(self._bundles[case])]
        return self._run(case, [*words, "--batch", str(batch), "--steps", str(steps)]).figures

    def _run(self, case: Case, words: Sequence[str]) -> Ran:
        variables = self._caches(case, fresh=False).variables()
        return self._launcher.run([sys.executable, *words], variables=variables)

    def _caches(self, case: Case, *, fresh: bool) -> Caches:
        return self._launcher.caches(f"piecework/{case.layers}-{case.dtype}", fresh=fresh)


def _options(case: Case) -> list[str]:
    return ["--dtype", case.dtype, "--max-tokens", str(case.max_tokens)]
