"""The whole model under `torch.compile(fullgraph=True)`, its defaults otherwise: first decode step, then steps."""

from __future__ import annotations

import torch

from piecework.bench.cells.forward import emit, make_parser
from piecework.bench.cells.module import first_step_and_times


def main() -> None:
    """Run the cell."""
    args = make_parser("piecework.bench.cells.torch_compile", description=__doc__).parse_args()
    emit(
        first_step_and_times(
            args.model,
            max_tokens=args.max_tokens,
            batch=args.batch,
            steps=args.steps,
            seconds=args.seconds,
            prepare=lambda module: torch.compile(module, fullgraph=True),
        )
    )


if __name__ == "__main__":
    main()
