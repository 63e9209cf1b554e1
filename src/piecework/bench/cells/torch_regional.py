"""Each decoder layer under `block.compile(fullgraph=True)`, the rest eager: first decode step, then steps."""

from __future__ import annotations

from torch import nn

from piecework.bench.cells.forward import emit, make_parser
from piecework.bench.cells.module import first_step_and_times


def main() -> None:
    """Run the cell."""
    args = make_parser("piecework.bench.cells.torch_regional", description=__doc__).parse_args()
    emit(
        first_step_and_times(
            args.model,
            max_tokens=args.max_tokens,
            batch=args.batch,
            steps=args.steps,
            seconds=args.seconds,
            prepare=_compile_layers,
        )
    )


def _compile_layers(module: nn.Module) -> nn.Module:
    for layer in module.get_submodule("model.layers").children():
        layer.compile(fullgraph=True)
    return module


if __name__ == "__main__":
    main()
