"""Turn what `piecework bench startup --out FILE` wrote into the README's table.

python benchmarks/readme_table.py FILE [--dtype bfloat16] [--write README.md]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
NAMES = {
    "piecework": "piecework",
    "torch_compile": "`torch.compile`",
    "torch_regional": "`block.compile`",
    "eager": "eager",
    "vllm": "vLLM",
}
LINES = (
    ("cold start", "cold_s", "{:.1f} s"),
    ("… of it capture", "capture_s", "{:.2f} s"),
    ("load the compiled model", "load_ms", "{:.1f} ms"),
    ("process start to first token, warm", "first_token_s", "{:.2f} s"),
    ("`import torch` alone", "import_torch_s", "{:.2f} s"),
    ("pieces", "pieces", "{:.0f}"),
    ("unique pieces", "unique_pieces", "{:.0f}"),
    ("compiled code on disk", "bundle_mb", "{:.1f} MiB"),
    ("memory over torch and weights", "rss_mb", "{:.0f} MiB"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtype", default="bfloat16", help="of what does not say its dtype (default: bfloat16)")
    parser.add_argument("--write", type=Path, help="replace the README's measured part")
    args = parser.parse_args()
    text = "\n".join(lines(json.loads(args.file.read_text()), dtype=args.dtype)) + "\n"
    if args.write is None:
        print(text, end="")
        return
    before, _, rest = args.write.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    args.write.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def lines(report: dict, *, dtype: str) -> Iterator[str]:
    """Yield the lines of the README's measured part."""
    found = {(r["system"], r["layers"], r["metric"], r.get("dtype"), r.get("batch")): r for r in report["rows"]}
    layers = sorted({row["layers"] for row in report["rows"]})
    systems = [name for name in NAMES if any(row["system"] == name for row in report["rows"])]
    columns = [("piecework", layers[0])] if len(layers) > 1 else []
    columns += [(name, layers[-1]) for name in systems]
    yield "| | " + " | ".join(f"{NAMES[name]}, {count} layers" for name, count in columns) + " |"
    yield "|---|" + "---|" * len(columns)

    def line(title: str, show: str, row_of: Callable[[str, int], dict | None]) -> Iterator[str]:
        rows = [row_of(name, count) for name, count in columns]
        if any(rows):
            yield f"| {title} | " + " | ".join(show.format(row["value"]) if row else "" for row in rows) + " |"

    for title, metric, show in LINES:
        yield from line(title, show, lambda name, count, m=metric: found.get((name, count, m, dtype, None)))
    steps = sorted({(r["dtype"], r["batch"]) for r in report["rows"] if r["metric"] == "step_ms"})
    for kind, batch in steps:
        key = ("step_ms", kind, batch)
        yield from line(
            f"decode step, batch {batch}, {kind}",
            "{:.2f} ms",
            lambda name, count, k=key: found.get((name, count, *k)),
        )
    yield ""
    yield from about(report, dtype=dtype)


def about(report: dict, *, dtype: str) -> Iterator[str]:
    """Yield what the figures were measured on, by which command, and which goals they missed."""
    machine, versions, settings = report["machine"], report["versions"], report["settings"]
    shape = ", ".join(f"{name} {settings[name]}" for name in ("hidden", "heads", "intermediate", "vocab"))
    counts = f"medians of {settings['repeats']}, other systems' cold starts of {settings['peer_repeats']}"
    vllm = f", vLLM {versions['vllm']}" if "vllm" in versions else ""
    yield f"Llama with random weights ({shape}), {dtype} where not said; {counts}."
    yield f"{machine['cpu']}, {machine['cores']} cores, Python {versions['python']}, torch {versions['torch']}{vllm}."
    for row in report["rows"]:
        if row["metric"] == "cold_first_token_s" and row["layers"] == settings["layers"][-1]:
            yield f"vLLM's cold start is its own compile time; its first token, cold, comes after {row['value']:.0f} s."
    yield "What each figure is and how it is measured: benchmarks/README.md. To reproduce it, on an idle machine:"
    yield ""
    command = f"piecework bench startup --layers {','.join(map(str, settings['layers']))}"
    yield f"```sh\n{command} --repeats {settings['repeats']} --peer-repeats {settings['peer_repeats']}\n```"
    missed = [goal for goal in report["goals"] if not goal["met"]]
    if missed:
        yield ""
        yield "Goals that these figures miss:"
        yield ""
    for goal in missed:
        where = ", ".join(str(goal[k]) + t for k, t in (("layers", " layers"), ("dtype", "")) if k in goal)
        batch = f", batch {goal['batch']}" if "batch" in goal else ""
        yield f"- {goal['goal']} ({where}{batch}): {goal['value']:.3g}, goal ≤ {goal['limit']:g}"


if __name__ == "__main__":
    main()
