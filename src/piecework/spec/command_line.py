"""The command line's part of a spec: options are added, and read, as their fields declare them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from piecework.spec.model_spec import ModelSpec, spec_options
from piecework.spec.option import Declared
from piecework.spec.source import MODEL_HELP


def add_spec_options(parser: argparse._ActionsContainer) -> None:
    """Add the options that say how a model is compiled."""
    add_options(parser, spec_options())


def add_options(parser: argparse._ActionsContainer, declared: Iterable[Declared]) -> None:
    """Add options; those that aren't given are None in what is parsed."""
    for d in declared:
        option = d.option
        kind: dict[str, Any] = {"metavar": option.metavar}
        if option.choices:
            kind = {"choices": option.choices}
        elif isinstance(d.default, bool):
            kind = {"action": "store_const", "const": not d.default}
        elif option.repeated:
            kind["action"] = "append"
        else:
            kind["type"] = _reader(option.read)
        parser.add_argument(d.flag, dest=d.name, help=d.help.replace("%", "%%"), **kind)


def given_options(args: argparse.Namespace, declared: Iterable[Declared]) -> dict[str, Any]:
    """Return what the command line gave of some options, by name."""
    return {d.name: given for d in declared if (given := getattr(args, d.name, None)) is not None}


def add_model(parser: argparse._ActionsContainer, **how: Any) -> None:
    """Add the argument that says which model; `how` are more of argparse's settings."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP, **how)


def spec_of(args: argparse.Namespace, *, weights: bool) -> ModelSpec:
    """Return the spec of the model and the options that were given; arguments and errors as of `ModelSpec.of`."""
    return ModelSpec.of(args.model, weights=weights, **given_options(args, spec_options()))


def _reader(read: Callable[[Any], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse
