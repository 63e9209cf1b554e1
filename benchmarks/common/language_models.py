"""Language models with random weights, one family for each kind of layer, as they are served and in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from benchmarks.common.launch import CellError
from benchmarks.common.run import Run

_COMPILE: Final = "wall time of the process `piecework compile`, its caches empty"
_SAME: Final = 1e-4  # of the sum of all logits' sizes

_EXPERTS: Final[dict[str, Any]] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
_DELTA: Final[dict[str, Any]] = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "shared_expert_intermediate_size": 512,
}

FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "qwen3": {},
    "gemma2": {"sliding_window": 512, "query_pre_attn_scalar": 64},
    "qwen3_moe": _EXPERTS,
    "qwen3_next": {**_EXPERTS, **_DELTA},
}
"""Dense, with sliding windows in every second layer, experts, and gated delta nets with attention in every fourth."""


def write_language_model(directory: Path, family: str, layers: int) -> None:
    """Write a checkpoint in float32 with hidden size 512 to a directory that exists."""
    import torch  # for who measures only
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **FAMILIES[family],
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)


class ServedModel:
    """A language model of one family, in float32 with random weights."""

    def __init__(self, run: Run, family: str, *, steps: int) -> None:
        self.family = family
        self._run = run
        self._steps = steps
        self._sums: dict[int, float] = {}

    def compile(self, layers: int) -> None:
        """Compile cold. Raises CellError."""
        caches = self._run.launcher.caches(f"piecework/{self.family}-{layers}", fresh=True)
        model = self._model(layers)
        words = [str(model), "--dtype", "float32", "--out", str(caches.root / "bundle")]
        ran = self._run.launcher.piecework("compile", *words, caches=caches)
        self._add("piecework", "cold_s", ran.wall_s, layers=layers, note=_COMPILE)
        for metric in ("pieces", "unique_pieces"):
            self._add("piecework", metric, ran.figures[metric], layers=layers)

    def steps(self, system: str, batch: int, *, layers: int) -> None:
        """Time decode steps, whose logits must be the same in all systems. Raises CellError."""
        bundle = self._run.launcher.caches(f"piecework/{self.family}-{layers}", fresh=False).root / "bundle"
        caches = self._run.launcher.caches(f"{system}/{self.family}-steps-{batch}", fresh=True)
        words = [system, str(self._model(layers)), "--bundle", str(bundle), "--batch", str(batch)]
        figures = self._run.launcher.cell("decode_step", *words, "--steps", str(self._steps), caches=caches).figures
        self._add(system, "step_ms", figures["step_ms"], layers=layers, batch=batch)
        sums = self._sums.setdefault(batch, figures["logits"])
        if abs(sums - figures["logits"]) > _SAME * sums:
            raise CellError(
                asked=f"a step of {self.family}, batch {batch}", found="other logits", try_="a look at them"
            )

    def _model(self, layers: int) -> Path:
        made = self._run.launcher.caches(f"models/{self.family}-{layers}", fresh=False).root
        if not (made / "config.json").exists():
            write_language_model(made, self.family, layers)
        return made

    def _add(
        self, system: str, metric: str, value: float, *, layers: int, batch: int | None = None, note: str = ""
    ) -> None:
        key = {"model": self.family, "layers": layers, "batch": batch}
        self._run.add(value, system=system, metric=metric, note=note, **key)
