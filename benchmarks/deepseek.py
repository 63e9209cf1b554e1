"""Cold and warm starts of models shaped like DeepSeek-V3, by depth.

Models of 4 and 60 layers (hidden 256, 4 heads, kv_lora_rank 128, 8 experts; the first one, or three, dense) of random
weights are compiled cold, loaded, and started warm to the first token. Each is a process of its own.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.common.main import Benchmark, add_option, numbers
from benchmarks.common.models import BOS, EOS, write_config, write_weights
from benchmarks.common.run import Run
from benchmarks.startup import IMPORT_TORCH, PROMPT
from piecework.bundle.bundle import open_bundle
from piecework.bundle.plan import Plan

MAX_TOKENS: Final = 256
VOCAB: Final = 1024
SMALL: Final = "deepseek_v3-"
_COLD_RATIO, _LOAD_MS = 1.15, 80.0

# prints the most memory that any process of a command held, its own and its children's
_MEASURED = (
    "import json, resource, subprocess, sys; ran = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, check=True); "
    "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss; "
    "print(json.dumps({**json.loads(ran.stdout), 'peak_mb': peak / 1024}))"
)
_LOAD = """
import json, statistics, sys
import torch
import piecework
times = []
for _ in range(5):
    phases = piecework.load(sys.argv[1], weights=sys.argv[2]).record.phases
    times.append(1e3 * sum(seconds for name, seconds in phases.items() if name not in ("weights", "pack")))
print(json.dumps({"load_ms": statistics.median(times), "all": times}))
"""


def config(layers: int) -> dict[str, Any]:
    """Return the config.json of a small model."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "num_hidden_layers": layers,
        "first_k_dense_replace": min(3, layers // 4),
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 128,
        "q_lora_rank": 96,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "dtype": "bfloat16",
    }


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_option(parser, "--layers", (4, 60), "numbers of layers", type_=numbers, metavar="N,…")


def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Measure everything."""
    models = {n: run.root / f"deepseek-{n}" for n in args.layers}
    for n, model in models.items():
        write_config(model, config(n))
    run.progress("warming up")
    warm_up = run.launcher.caches("warm-up", fresh=True).variables()
    run.launcher.run(_compile(models[args.layers[0]], run.root / "warm-up"), variables=warm_up)
    for repeat in range(args.repeats):
        for n, model in models.items():
            run.progress(f"cold: {n} layers")
            _cold(run, model, f"{SMALL}{n}")
            if repeat == 0:
                _write_weights(model, run.root / f"{SMALL}{n}")
        for n, model in models.items():
            run.progress(f"warm: {n} layers")
            _warm(run, model, f"{SMALL}{n}")
    check_goals(run, args.layers)
    return {"config": config(args.layers[-1]), "max_tokens": MAX_TOKENS}


def check_goals(run: Run, layers: Sequence[int]) -> None:
    """Hold growth with depth, and what a load takes, against the goals."""
    deep = f"{SMALL}{layers[-1]}"
    for key in run.find():
        value = run.value(key) or 0.0
        if key["metric"] == "cold_s" and key["model"] == deep:
            run.compare(key, _COLD_RATIO, model=f"{SMALL}{layers[0]}")
        elif key["metric"] == "load_ms" and key["model"] == deep:
            run.hold(key, "load_ms", value, _LOAD_MS)


def _compile(model: Path, out: Path) -> list[str]:
    command = [sys.executable, "-m", "piecework", "compile", str(model), "--weights", "none", "--json"]
    options = ["--dtype", "bfloat16", "--max-tokens", str(MAX_TOKENS), "--out", str(out)]
    return [sys.executable, "-c", _MEASURED, *command, *options]


def _cold(run: Run, model: Path, name: str) -> None:
    out = run.root / name
    shutil.rmtree(out, ignore_errors=True)
    variables = run.launcher.caches(name, fresh=True).variables()
    ran = run.launcher.run(_compile(model, out), variables=variables)
    figures: dict[str, Any] = {"cold_s": ran.wall_s}
    figures |= {metric: ran.figures[metric] for metric in ("pieces", "unique_pieces", "capture_s")}
    figures |= {"bundle_mb": ran.figures["bundle_bytes"] / 2**20, "compile_rss_mb": ran.figures["peak_mb"]}
    for metric, value in figures.items():
        run.add(value, system="piecework", model=name, metric=metric)


def _write_weights(model: Path, bundle: Path) -> None:
    plan = Plan.from_json(open_bundle(bundle).plan())
    sizes = {take.name: take.shape for recipe in plan.recipes if not recipe.literal for take in recipe.takes}
    write_weights(model, sizes=sizes, dtype="bfloat16")


def _warm(run: Run, model: Path, name: str) -> None:
    caches, bundle = run.launcher.caches(name, fresh=False), str(run.root / name)
    importing = run.launcher.run([sys.executable, "-c", IMPORT_TORCH], variables=caches.variables())
    words = ["generate", str(model), "--bundle", bundle, "--prompt", PROMPT, "--max-new-tokens", "1"]
    generated = run.launcher.piecework(*words, "--max-tokens", str(MAX_TOKENS), caches=caches)
    loading = [sys.executable, "-c", _LOAD, bundle, str(model / "model.safetensors")]
    loaded = run.launcher.run(loading, variables=caches.variables())
    figures = {"import_torch_s": importing.first_output_s, "first_token_s": generated.first_output_s}
    for metric, value in {**figures, "load_ms": loaded.figures["load_ms"]}.items():
        run.add(value, system="piecework", model=name, metric=metric)


BENCHMARK: Final = Benchmark(__doc__, measure, repeats=3, options=options)

if __name__ == "__main__":
    BENCHMARK.main()
