"""Cold and warm starts of models shaped like DeepSeek-V3: with depth, and at the true shapes of published ones.

  python benchmarks/deepseek.py --configs DIR --out benchmarks/deepseek.json

Models of 4 and 60 layers (hidden 256, 4 heads, kv_lora_rank 128, 8 experts; the first one, or three, dense) of random
weights are compiled cold, loaded, and started warm to the first token. Every config.json under --configs whose model
type is deepseek_v2 or deepseek_v3 is compiled cold at its own shape, without weights. Each is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from piecework.bench.launch import Launcher
from piecework.bench.machine import commit, machine, versions
from piecework.bench.synthetic import BOS, EOS, write_tokenizer, write_weights
from piecework.bench.systems.piecework import PROMPT
from piecework.bundle.bundle import open_bundle
from piecework.bundle.plan import Plan

MAX_TOKENS = 256
VOCAB = 1024
FAMILIES = ("deepseek_v2", "deepseek_v3")
LIMITS = {"load_ms": 80.0, "cold_ratio": 1.15, "true_shape_s": 90.0, "true_shape_rss_mb": 6 * 1024.0}

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


def main() -> None:
    """Measure, print, and write the figures where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 60], metavar="N", help="default: 4 60")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--configs", type=Path, metavar="DIR", help="directories with a config.json each")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures to FILE as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="piecework-bench-") as directory:
        report = measure(Path(directory), layers=args.layers, repeats=args.repeats, configs=args.configs)
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(root: Path, *, layers: list[int], repeats: int, configs: Path | None) -> dict[str, Any]:
    """Return the report; everything that is written lies under `root`."""
    launcher = Launcher(root)
    models = {n: root / f"deepseek-{n}" for n in layers}
    for n, model in models.items():
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config(n)))
        write_tokenizer(model, vocab=VOCAB)
    samples: dict[tuple[str, str], list[float]] = {}

    def note(model: str, metric: str, value: float) -> None:
        samples.setdefault((model, metric), []).append(value)
        print(f"{model:<24} {metric:<18} {value:.2f}", flush=True)

    warm_up = launcher.caches("warm-up", fresh=True).variables()
    launcher.run(_compile(models[layers[0]], root / "warm-up"), variables=warm_up)
    for repeat in range(repeats):
        for n, model in models.items():
            _cold(launcher, model, root / f"deepseek_v3-{n}", note, max_tokens=MAX_TOKENS)
            if repeat == 0:
                _write_weights(model, root / f"deepseek_v3-{n}")
        for n, model in models.items():
            _warm(launcher, model, f"deepseek_v3-{n}", note)
    for found in sorted(configs.glob("*/config.json")) if configs is not None else ():
        if json.loads(found.read_text())["model_type"] in FAMILIES:
            _cold(launcher, found.parent, root / found.parent.name, note, max_tokens=2048)
    rows = [
        {
            "system": "piecework",
            "model": model,
            "metric": metric,
            "value": round(statistics.median(values), 3),
            "n": len(values),
            "min": round(min(values), 3),
            "max": round(max(values), 3),
        }
        for (model, metric), values in samples.items()
    ]
    goals = _goals(rows, layers=layers)
    print(*goals, sep="\n")
    about = {"machine": machine(), "versions": versions(), "commit": commit()}
    return {**about, "settings": {"config": config(layers[-1]), "max_tokens": MAX_TOKENS}, "rows": rows, "goals": goals}


def _compile(model: Path, out: Path, *, max_tokens: int = MAX_TOKENS) -> list[str]:
    command = [sys.executable, "-m", "piecework", "compile", str(model), "--weights", "none", "--json"]
    options = ["--dtype", "bfloat16", "--max-tokens", str(max_tokens), "--out", str(out)]
    return [sys.executable, "-c", _MEASURED, *command, *options]


def _cold(launcher: Launcher, model: Path, out: Path, note: Any, *, max_tokens: int) -> None:
    name = out.name
    shutil.rmtree(out, ignore_errors=True)
    caches = launcher.caches(name, fresh=True)
    ran = launcher.run(_compile(model, out, max_tokens=max_tokens), variables=caches.variables())
    note(name, "cold_s", ran.wall_s)
    for metric in ("pieces", "unique_pieces", "capture_s"):
        note(name, metric, ran.figures[metric])
    note(name, "bundle_mb", ran.figures["bundle_bytes"] / 2**20)
    note(name, "compile_rss_mb", ran.figures["peak_mb"])


def _write_weights(model: Path, bundle: Path) -> None:
    plan = Plan.from_json(open_bundle(bundle).plan())
    shapes = {take.name: take.shape for recipe in plan.recipes if not recipe.literal for take in recipe.takes}
    write_weights(model, shapes=shapes, dtype="bfloat16")


def _warm(launcher: Launcher, model: Path, name: str, note: Any) -> None:
    variables = launcher.caches(name, fresh=False).variables()
    bundle = str(model.parent / name)
    importing = launcher.run([sys.executable, "-c", "import torch; print('{}', flush=True)"], variables=variables)
    note(name, "import_torch_s", importing.first_output_s)
    command = ["-m", "piecework", "generate", str(model), "--bundle", bundle, "--prompt", PROMPT]
    options = ["--max-new-tokens", "1", "--max-tokens", str(MAX_TOKENS), "--json"]
    ran = launcher.run([sys.executable, *command, *options], variables=variables)
    note(name, "first_token_s", ran.first_output_s)
    loaded = launcher.run([sys.executable, "-c", _LOAD, bundle, str(model / "model.safetensors")], variables=variables)
    note(name, "load_ms", loaded.figures["load_ms"])


def _goals(rows: list[dict[str, Any]], *, layers: list[int]) -> list[dict[str, Any]]:
    value = {(row["model"], row["metric"]): row["value"] for row in rows}
    first, last = f"deepseek_v3-{layers[0]}", f"deepseek_v3-{layers[-1]}"
    ratio = value[last, "cold_s"] / value[first, "cold_s"]
    found = [
        (f"cold_s, {layers[-1]} layers to {layers[0]}", ratio, LIMITS["cold_ratio"]),
        (f"load_ms, {layers[-1]} layers", value[last, "load_ms"], LIMITS["load_ms"]),
    ]
    for model, metric in value:
        if not model.startswith("deepseek_v3-") and metric == "cold_s":
            found.append((f"cold_s, {model}", value[model, metric], LIMITS["true_shape_s"]))
            found.append((f"compile_rss_mb, {model}", value[model, "compile_rss_mb"], LIMITS["true_shape_rss_mb"]))
    return [{"what": what, "value": round(v, 3), "limit": limit, "met": v <= limit} for what, v, limit in found]


if __name__ == "__main__":
    main()
