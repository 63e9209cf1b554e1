"""`piecework compile MODEL`: compile a model's different pieces into a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piecework.cli import console
from piecework.foundation.environment import let_torch_cache_in, read_environment
from piecework.foundation.process import garbage_collection_off, seconds_since_start
from piecework.spec.command_line import add_model, add_spec_options, spec_of
from piecework.spec.model_spec import ModelSpec

if TYPE_CHECKING:
    from piecework.bundle.bundle import Bundle
    from piecework.bundle.record import Recorder
    from piecework.compiler.model import CompiledModel


def add_parser(subparsers: Any) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "compile",
        help="compile a model's different pieces into a bundle",
        description="Compile the model of a directory in Hugging Face layout: each structurally different piece once. "
        "The bundle holds no weights. `generate`, `serve` and `LLM` find it with the same options.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    add_model(what, nargs="?")
    what.add_argument("--spec", metavar="JSON", help="the model and all of its options in one, as "
                      "piecework.ModelSpec.to_json writes them")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="BUNDLE", help="where to write the bundle: a directory, or an "
                        "archive if it ends in .pwb (default: the local store)")  # fmt: skip
    add_spec_options(parser)
    parser.add_argument("--weights", choices=("real", "none"), default="real",
                        help="real: check that the checkpoint holds what the model needs; none: only config.json is "
                        "needed (default: real)")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="run the bundle beside the module that it was compiled of "
                        "and print how far apart their logits are; weights: the checkpoint's, random ones with "
                        "--weights none")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object with every figure")


@garbage_collection_off()  # the process ends with the command
def run(args: argparse.Namespace) -> int:
    """Compile and print where the bundle is."""
    from piecework.bundle.record import Recorder  # noqa: PLC0415  `piecework --help` must not pay for these
    from piecework.bundle.store.directory import DirectoryStore  # noqa: PLC0415
    from piecework.compiler.model import compile_model  # noqa: PLC0415

    environment = read_environment()
    spec = ModelSpec.from_json(args.spec) if args.spec is not None else spec_of(args, weights=args.weights == "real")
    recorder = Recorder()
    store = DirectoryStore(environment.store_root)
    with store.scratch() as scratch, console.progress() as progress:
        let_torch_cache_in(scratch)
        compiled = compile_model(
            spec,
            store=store,
            environment=environment,
            check_weights=args.weights == "real",
            out=args.out,
            recorder=recorder,
            on_progress=lambda text, done, total: progress.update(text, done=done, total=total),
        )
    figures = _figures(compiled, recorder=recorder)
    if args.check:
        figures["check"] = _checked(spec, compiled.bundle, random_seed=None if args.weights == "real" else 0)
    if args.json:
        console.out_json(figures)
    else:
        _show(figures)
    return 0


def _checked(spec: ModelSpec, bundle: Bundle, *, random_seed: int | None) -> list[str]:
    from piecework.bundle.run.loading import read_plan  # noqa: PLC0415  as above
    from piecework.compiler.check.model import check_model  # noqa: PLC0415
    from piecework.engine.loading import open_weights  # noqa: PLC0415

    weights = open_weights(spec, read_plan(bundle), random_seed=random_seed)
    return check_model(spec, bundle, weights=weights).lines()


def _figures(compiled: CompiledModel, *, recorder: Recorder) -> dict[str, Any]:
    bundle = compiled.bundle
    record = bundle.record()
    now = recorder.finish()
    phases = {**record.phases, **now.phases}
    return {
        "bundle": str(bundle.path),
        "cached": compiled.cached,
        **bundle.identity,
        "pieces": record.counts.get("pieces", 0),
        "unique_pieces": record.counts.get("unique_pieces", 0),
        "blocks_traced": record.counts.get("blocks_traced", 0),
        "artifacts_compiled": 0 if compiled.cached else record.counts.get("compiled", 0),
        "import_s": round(phases.get("import", 0.0) + phases.get("build", 0.0), 3),
        "capture_s": round(phases.get("capture", 0.0) + phases.get("split", 0.0), 3),
        "compile_s": round(phases.get("compile", 0.0), 3),
        "seal_s": round(phases.get("plan", 0.0) + phases.get("seal", 0.0), 3),
        "cold_s": round(seconds_since_start(), 3),
        "bundle_bytes": bundle.size_bytes,
        "notes": [*record.notes, *(n for n in now.notes if n not in record.notes)],
    }


def _show(figures: dict[str, Any]) -> None:
    console.out(figures["bundle"])
    for line in figures.get("check", ()):
        console.status(line)
    if figures["cached"]:
        console.status("the store had a valid bundle: nothing to compile")
        return
    console.status(
        f"{figures['pieces']} pieces, {figures['unique_pieces']} unique; capture {figures['capture_s']:.1f} s, "
        f"compile {figures['compile_s']:.1f} s, in all {figures['cold_s']:.1f} s; "
        f"{figures['bundle_bytes'] / 2**20:.2f} MiB"
    )
    for note in figures["notes"]:
        console.status(f"note: {note}")
