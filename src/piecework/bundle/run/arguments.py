"""A caller's arguments by name, as the compiled module's forward was called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from piecework.errors import RequestError


def bind_arguments(layout: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments by parameter name; `layout` is the plan's `arguments`, with "*name" for those without one.

    Raises RequestError where they are not those that the module was compiled with.
    """
    names = layout["parameters"]
    star = next((place for place, name in enumerate(names) if name.startswith("*")), len(names))
    given: dict[str, Any] = dict(zip(names[:star], args, strict=False))
    others = tuple(args[star:])
    if (others and star == len(names)) or set(given) & set(kwargs):
        raise RequestError(
            asked="call the loaded model",
            found=f"{len(args)} positional arguments and {sorted(kwargs)}",
            try_="call it as forward(" + ", ".join(names) + ")",
        )
    if others:
        given[names[star][1:]] = others
    given.update(kwargs)
    wanted = [name for name, _ in layout["given"]]
    missing = [n for n in wanted if n not in given]
    extra = [n for n in given if n not in wanted and not _is_default(layout["defaults"], n, given[n])]
    if missing or extra:
        raise RequestError(
            asked="call the loaded model",
            found=f"missing arguments {missing}" if missing else f"arguments {extra} that it was not compiled with",
            try_="pass what the example arguments had: " + ", ".join(wanted),
        )
    return given


def _is_default(defaults: Mapping[str, Any], name: str, value: object) -> bool:
    return name in defaults and type(value) is type(defaults[name]) and value == defaults[name]
