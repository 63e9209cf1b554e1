"""What `load` does once torch is imported. Only runtime and checkpoint are imported, as in `piecework generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from piecework.bench.cells.forward import decode_inputs, emit, make_parser, num_blocks, prefill_inputs, time_steps
from piecework.bench.memory import mapped_file_bytes, peak_rss_bytes
from piecework.bundle.run import LoadedModel, load
from piecework.models.checkpoint import open_checkpoint


def measure(*, after_torch: int) -> None:
    """Load a bundle, run one prefill step, then time decode steps; `after_torch` is resident memory in bytes."""
    parser = make_parser("piecework.bench.cells.load", description="Load a bundle, and step it.")
    parser.add_argument("--bundle", type=Path, required=True, metavar="BUNDLE", help="the model's bundle")
    parser.add_argument("--prompt-tokens", type=int, default=8, metavar="N", help="the prompt's tokens (default: 8)")
    args = parser.parse_args()
    model = load(args.bundle, weights=open_checkpoint(args.model))
    with torch.inference_mode():
        model.make_states({"blocks": 1})
        model.run(prefill_inputs(args.prompt_tokens))
        figures = _load_figures(model) | _memory(model, args.model / "model.safetensors", after_torch=after_torch)
        if args.steps:
            model.make_states({"blocks": num_blocks(args.batch)})
            inputs = decode_inputs(args.batch)
            times = time_steps(lambda: model.run(inputs), least_steps=args.steps, least_seconds=args.seconds)
            figures |= times.to_json()
    emit(figures)


def _load_figures(model: LoadedModel) -> dict[str, Any]:
    ms = {name: 1e3 * seconds for name, seconds in model.record.phases.items()}
    return {
        "load_ms": round(sum(ms.values()) - ms["weights"] - ms["pack"], 3),
        "load_pack_ms": round(ms["pack"], 3),
        "load_weights_ms": round(ms["weights"], 3),
    }


def _memory(model: LoadedModel, weights: Path, *, after_torch: int) -> dict[str, Any]:
    """Return the peak of resident memory so far, in MiB, and its parts; see `RSS_NOTE` in systems/piecework.py."""

    def num_bytes(shape: tuple[int, ...], dtype: str) -> int:
        made: torch.dtype = getattr(torch, dtype)
        return made.itemsize * torch.Size(shape).numel()

    packed = sum(num_bytes(r.shape, r.dtype) for r in model.plan.recipes if r.pack)
    mapped = mapped_file_bytes(weights)
    peak = peak_rss_bytes()
    return {
        "rss_mb": round((peak - after_torch - mapped - packed) / 2**20, 2),
        "peak_rss_mb": round(peak / 2**20, 2),
        "torch_rss_mb": round(after_torch / 2**20, 2),
        "mapped_weights_mb": round(mapped / 2**20, 2),
        "packed_weights_mb": round(packed / 2**20, 2),
    }
