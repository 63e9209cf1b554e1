"""`torch.compile(backend="piecework")` of small modules; prints how many artifacts the process compiled itself."""

from __future__ import annotations

import argparse
from typing import Any

WIDTHS = (8, 24, 40, 56, 72, 88)


def main() -> None:
    """Run the cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="which module comes first")
    args = parser.parse_args()
    import torch

    import piecework
    from benchmarks.common.steps import emit

    recorder = piecework.Recorder()
    options: dict[str, Any] = {"recorder": recorder}
    start = args.first % len(WIDTHS)
    with torch.no_grad():
        for width in (*WIDTHS[start:], *WIDTHS[:start]):
            torch.manual_seed(0)
            module = torch.nn.Sequential(torch.nn.Linear(16, width), torch.nn.SiLU(), torch.nn.Linear(width, 4))
            x = torch.randn(5, 16)
            made = torch.compile(module, backend="piecework", options=options)(x)
            torch.testing.assert_close(made, module(x))
    counts = recorder.finish().counts
    emit({"compiled": counts.get("compiled", 0), "store_hits": counts.get("store_hits", 0)})


if __name__ == "__main__":
    main()
