"""One option, declared where its value stands: a dataclass's field with all that the rest of piecework needs of it.

    dtype: str = option("auto", "type of weights and activations", choices=("float32", "bfloat16"))

Its default, its name on the command line, how texts become its value and its value a fact: nothing else repeats them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from piecework.foundation.digests import JsonScalar

_KEY: Final = "piecework.option"


def _as_it_is(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Option:
    """What is declared of an option, beside its type and default.

    Attributes:
        help: for people, without the default.
        flag: on the command line; None: the field's name with dashes.
        metavar: what `--help` calls the value.
        choices: the values that it may have, as the command line writes them; empty: `read` decides.
        repeated: whether it may be given several times; `read` gets a list of texts then.
        default_text: what `--help` says of the default; None: as `write` writes it.
        latent_only: whether it makes a difference to models with latent attention only.
        read: makes the value of what a caller, a command line or `write` gives; raises ValueError with the reason.
        write: makes a JSON scalar of the value, which is its fact and what `read` reads.
    """

    help: str
    flag: str | None = None
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    repeated: bool = False
    default_text: str | None = None
    latent_only: bool = False
    read: Callable[[Any], Any] = _as_it_is
    write: Callable[[Any], JsonScalar] = _as_it_is


@dataclass(frozen=True)
class Declared:
    """An option with its name and default."""

    name: str
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return self.option.flag or "--" + self.name.replace("_", "-")

    @property
    def help(self) -> str:
        """What `--help` says."""
        text = self.option.default_text
        return f"{self.option.help} (default: {self.option.write(self.default) if text is None else text})"


def option(default: Any, help: str, **declared: Any) -> Any:
    """Return a dataclass's field with a default that is an option; for `declared` see `Option`."""
    return field(default=default, metadata={_KEY: Option(help, **declared)})


def declared_options(made: type) -> tuple[Declared, ...]:
    """Return the options among a dataclass's fields, in their order."""
    return tuple(Declared(f.name, f.default, f.metadata[_KEY]) for f in fields(made) if _KEY in f.metadata)


def written(value: Any) -> dict[str, JsonScalar]:
    """Return the options of a dataclass's value by name, as facts and JSON have them."""
    return {d.name: d.option.write(getattr(value, d.name)) for d in declared_options(type(value))}


def read_options(made: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `given` that are options of a dataclass, as its fields have them; None is "not given".

    Raises ValueError, with the option's name and the reason, for a value that it can't have.
    """
    values = {}
    for d in declared_options(made):
        if given.get(d.name) is None:
            continue
        try:
            values[d.name] = d.option.read(given[d.name])
        except ValueError as error:
            raise ValueError(f"{d.name}={given[d.name]!r}: {error}") from error
    return values


def wrong_choice(value: Any) -> Declared | None:
    """Return the first option of a dataclass's value that is neither its default nor one of its choices, or None."""
    for d in declared_options(type(value)):
        has = getattr(value, d.name)
        if d.option.choices and has != d.default and d.option.write(has) not in d.option.choices:
            return d
    return None


def at_least_one(value: Any) -> int:
    """Read a whole number from 1 up. Raises ValueError."""
    number = int(value)
    if number < 1:
        raise ValueError(f"{number} is less than 1")
    return number
