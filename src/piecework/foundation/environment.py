"""The one reader of environment variables. Read once, at the edge, and passed on as a value."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """What piecework takes from the environment.

    Args:
        store_root: where bundles and artifacts live (`PIECEWORK_HOME`, else `$XDG_CACHE_HOME/piecework`,
            else `~/.cache/piecework`).
        compiler: the C++ compiler's command (`CXX`), or None where it is to be searched for.
        layer_names: whether layer names are objects that compilers lift (`PIECEWORK_LAYERNAME`, "0" for strings).
        api_key: what clients of a server must send (`PIECEWORK_API_KEY`), or None.
    """

    store_root: Path
    compiler: str | None = None
    layer_names: bool = True
    api_key: str | None = field(default=None, repr=False)

    @property
    def toolchain_root(self) -> Path:
        """Where what the C++ compiler prepares once per machine lives."""
        return self.store_root / "toolchain"


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Read the variables that piecework knows, from `variables` or else from this process's environment.

    An empty variable counts as not set. A relative `XDG_CACHE_HOME` is ignored, as its specification says.
    """
    given = os.environ if variables is None else variables
    return Environment(
        store_root=_store_root(given),
        compiler=given.get("CXX") or None,
        layer_names=given.get("PIECEWORK_LAYERNAME") != "0",
        api_key=given.get("PIECEWORK_API_KEY") or None,
    )


def child_variables(changes: Mapping[str, str | None]) -> dict[str, str]:
    """Return the environment for a child process: this one's, with `changes` applied (None removes)."""
    variables = dict(os.environ)
    for name, value in changes.items():
        if value is None:
            variables.pop(name, None)
        else:
            variables[name] = value
    return variables


def _store_root(given: Mapping[str, str]) -> Path:
    home = given.get("PIECEWORK_HOME")
    if home:
        # expanduser raises RuntimeError for an unknown user; absolute() pins it against a later chdir
        return Path(os.path.expanduser(home)).absolute()
    cache = given.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache):
        return Path(cache) / "piecework"
    user = given.get("HOME") or os.path.expanduser("~")
    return Path(user).absolute() / ".cache" / "piecework"
