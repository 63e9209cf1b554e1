"""`piecework compile MODEL`: compile a model's different pieces into a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piecework.cli import console
from piecework.foundation.process import garbage_collection_off, seconds_since_start
from piecework.models.bundle_key import DEFAULT_MAX_TOKENS
from piecework.models.latent_config import DEFAULT_KV_CACHE_DTYPE, DEFAULT_MLA, KV_CACHE_DTYPES, MLA_MODES
from piecework.ops.ir.selection import ProviderOrder

if TYPE_CHECKING:
    from piecework.bundle.record import Recorder
    from piecework.compiler.model import CompiledModel


def add_parser(subparsers: Any) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "compile",
        help="compile a model's different pieces into a bundle",
        description="Compile the model of a directory in Hugging Face layout: each structurally different piece once. "
        "The bundle holds no weights.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory with config.json (and safetensors)")
    parser.add_argument("--out", type=Path, metavar="BUNDLE", help="where to write the bundle: a directory, or an "
                        "archive if it ends in .pwb (default: the local store)")  # fmt: skip
    add_compile_options(parser)
    parser.add_argument("--without-pass", action="append", default=[], metavar="NAME", help="leave a pass out, such as "
                        "rotary or merge_linear; may be given several times; `inspect --passes` shows what each "
                        "did")  # fmt: skip
    parser.add_argument("--weights", choices=("real", "none"), default="real",
                        help="real: check that the checkpoint holds what the model needs; none: only config.json is "
                        "needed (default: real)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object with every figure")
    parser.set_defaults(parser=parser)


def add_compile_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide what a bundle is compiled for."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="type of weights and activations (default: "
                        "the config's)")  # fmt: skip
    parser.add_argument("--max-tokens", type=_positive, default=DEFAULT_MAX_TOKENS, metavar="N",
                        help="most tokens in one forward pass (default: %(default)s)")  # fmt: skip
    parser.add_argument("--ranges", type=_ranges, default=(), metavar="R", help="ranges of tokens with artifacts of "
                        'their own, such as "1,2:64,65:2048" (default: one for all)')  # fmt: skip
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="what the bundle runs on (default: cpu)"
    )
    add_latent_options(parser)
    add_provider_option(parser)
    parser.add_argument("--backend", choices=("aoti", "eager"), default="aoti", help="aoti: native code; eager: run "
                        "the pieces operator by operator (default: aoti)")  # fmt: skip


def add_latent_options(parser: argparse._ActionsContainer) -> None:
    """Add the options that say how latent attention is compiled, and how its cache is kept."""
    parser.add_argument("--mla", choices=MLA_MODES, default=DEFAULT_MLA, help="for models with latent attention: "
                        "exposed has a layer's steps compiled, opaque hides them in one operator "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default=DEFAULT_KV_CACHE_DTYPE,
                        help="type of the KV cache: auto is the model's, or what a given bundle has; fp8, for models "
                        "with latent attention, keeps latents in a byte per number (default: %(default)s)")  # fmt: skip


def add_provider_option(parser: argparse._ActionsContainer) -> None:
    """Add the option that says which implementations IR ops get."""
    parser.add_argument("--provider", action="append", metavar="RULE", help="which implementations operators get, in "
                        'order: "rms_norm=triton,native", "rms_norm[1:64]=aten,native" for a range of tokens, '
                        '"@cuda=triton,native" for a device, or "aten,native" for all; may be given several times '
                        "(default: native)")  # fmt: skip


def chosen_providers(args: argparse.Namespace) -> ProviderOrder | None:
    """Return what `--provider` says, or None where it wasn't given. Raises OpError."""
    return None if args.provider is None else ProviderOrder.parse(args.provider)


@garbage_collection_off()  # the process ends with the command
def run(args: argparse.Namespace) -> int:
    """Compile and print where the bundle is."""
    from piecework.bundle.record import Recorder  # noqa: PLC0415
    from piecework.bundle.store.directory import DirectoryStore  # noqa: PLC0415
    from piecework.compiler.model import compile_model  # noqa: PLC0415  `piecework --help` must not pay for it
    from piecework.compiler.options import BackendName, CompileOptions  # noqa: PLC0415
    from piecework.foundation.environment import read_environment  # noqa: PLC0415
    from piecework.models.config import read_config  # noqa: PLC0415

    if args.ranges and args.ranges[-1][1] != args.max_tokens:
        args.parser.error(f"--ranges must end at --max-tokens ({args.max_tokens})")
    environment = read_environment()
    config = read_config(args.model)
    recorder = Recorder()
    with console.progress() as progress:
        compiled = compile_model(
            config,
            dtype=args.dtype or config.dtype,
            max_tokens=args.max_tokens,
            options=CompileOptions(
                backend=BackendName(args.backend),
                ranges=args.ranges,
                device=args.device,
                providers=chosen_providers(args) or ProviderOrder(),
                passes_off=frozenset(args.without_pass),
            ),
            check_weights=args.weights == "real",
            store=DirectoryStore(environment.store_root),
            toolchain_root=environment.store_root / "toolchain",
            compiler=environment.compiler,
            out=args.out,
            recorder=recorder,
            on_progress=lambda text, done, total: progress.update(text, done=done, total=total),
            mla=args.mla,
            kv_cache_dtype=args.kv_cache_dtype,
        )
    figures = _figures(compiled, recorder=recorder)
    if args.json:
        console.out_json(figures)
    else:
        _show(figures)
    return 0


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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _ranges(text: str) -> tuple[tuple[int, int], ...]:
    from piecework.compiler.options import parse_ranges  # noqa: PLC0415

    try:
        return parse_ranges(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
