"""A warm start from a bundle: milliseconds of loading, memory over torch and weights, then decode steps.

Only what runs a bundle and reads checkpoints is imported, as in `piecework generate`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_MAPPINGS = Path("/proc/self/smaps")


def main() -> None:
    """Run the cell."""
    import torch  # noqa: F401  its memory is measured alone, before anything else is imported

    after_torch = status_bytes("VmRSS:")
    args = _parser().parse_args()
    measure(args, after_torch=after_torch)


def measure(args: argparse.Namespace, *, after_torch: int) -> None:
    """Load a bundle, run one prefill step, then time decode steps; `after_torch` is resident memory in bytes."""
    import torch

    from benchmarks.common.steps import emit, time_steps
    from piecework.bundle.run import load
    from piecework.models.checkpoint import open_checkpoint
    from piecework.models.sample_batches import Batch, batch_inputs

    model = load(args.bundle, weights=open_checkpoint(args.model))
    with torch.inference_mode():
        model.make_states({"blocks": 1, "state_slots": 1})
        model.run(batch_inputs(Batch(prompts=1, prompt_tokens=args.prompt_tokens)))
        figures = _load_ms(model.record.phases)
        figures |= _memory(model, args.model / "model.safetensors", after_torch=after_torch)
        if args.steps:
            batch = Batch(decode=args.batch, decode_context=args.context)
            model.make_states({"blocks": batch.num_blocks, "state_slots": batch.num_seqs})
            inputs = batch_inputs(batch)
            (times,) = time_steps([lambda: model.run(inputs)], least_steps=args.steps, least_seconds=args.seconds)
            figures |= times.to_json()
    emit(figures)


def _load_ms(phases: Any) -> dict[str, Any]:
    ms = {name: 1e3 * seconds for name, seconds in phases.items()}
    return {
        "load_ms": round(sum(ms.values()) - ms["weights"] - ms["pack"], 3),
        "load_pack_ms": round(ms["pack"], 3),
        "load_weights_ms": round(ms["weights"], 3),
    }


def _memory(model: Any, weights: Path, *, after_torch: int) -> dict[str, Any]:
    """Return the peak of resident memory so far, in MiB, less that after `import torch` and the weights' own.

    The peak is not taken from `getrusage`, whose `ru_maxrss` survives `exec` and so may be the parent process's.
    """
    import torch

    def num_bytes(shape: tuple[int, ...], dtype: str) -> int:
        made: torch.dtype = getattr(torch, dtype)
        return made.itemsize * torch.Size(shape).numel()

    packed = sum(num_bytes(r.shape, r.dtype) for r in model.plan.recipes if r.pack)
    over_torch = status_bytes("VmHWM:") - after_torch
    return {"rss_mb": round((over_torch - mapped_file_bytes(weights) - packed) / 2**20, 2)}


def status_bytes(name: str, status: Path = _STATUS) -> int:
    """Return a field of /proc/self/status, in bytes. Raises LookupError where the system doesn't say."""
    for line in status.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    raise LookupError(f"{status} has no {name}")


def mapped_file_bytes(path: Path, *, mappings: Path = _MAPPINGS) -> int:
    """Return how much of a file is resident in this process through mappings of it, in bytes."""
    ending = f" {path.resolve()}"
    total, inside = 0, False
    for line in mappings.read_text().splitlines():
        words = line.split(maxsplit=1)
        if not words[0].endswith(":"):  # a mapping begins: "7f00-7f01 r--s 00000000 fd:00 1234    /path"
            inside = line.endswith(ending)
        elif inside and words[0] == "Rss:":
            total += int(words[1].split()[0]) << 10
    return total


def _parser() -> argparse.ArgumentParser:
    from benchmarks.cells.torch_module import add_step_options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory with config.json and safetensors")
    parser.add_argument("--bundle", type=Path, required=True, metavar="BUNDLE", help="the model's bundle")
    add_step_options(parser)
    return parser


if __name__ == "__main__":
    main()
