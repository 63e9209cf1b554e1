"""The one reader of environment variables. Read once, at the edge, and passed on as a value."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from piecework.errors import PieceworkError
from piecework.foundation.flight import OVERTAKE_S

TRUST_VARIABLE: Final = "PIECEWORK_TRUST"
REQUIRE: Final = "require"
ISA_VARIABLE: Final = "PIECEWORK_ISA"
_COMPILERS: Final = re.compile(r"(TORCHINDUCTOR|TORCHDYNAMO|AOT_INDUCTOR|TORCH_COMPILE)_[A-Z0-9_]+")
_WITHOUT_EFFECT: Final = re.compile(
    r"CACHE|WORKER|THREADS|TRACE|LOG|DUMP|PROFIL|BENCHMARK|DEBUG|VERBOSE|PROGRESS|SUPPRESS|SAVE_ARGS|PRINT"
)
"""Names of settings that change where and how fast code is made, or what is told of it, and not the code."""


@dataclass(frozen=True)
class Environment:
    """What piecework takes from the environment.

    Args:
        store_root: where bundles and artifacts live (`PIECEWORK_HOME`, else `$XDG_CACHE_HOME/piecework`,
            else `~/.cache/piecework`, else `piecework-<user id>` among temporary files where there is no home).
        compiler: the C++ compiler's command (`CXX`), or None where it is to be searched for.
        layer_names: whether layer names are objects that compilers lift (`PIECEWORK_LAYERNAME`, "0" for strings).
        api_key: what clients of a server must send (`PIECEWORK_API_KEY`), or None.
        overtake_s: after how many seconds without progress of another process that compiles what is needed here, it
            is compiled here (`PIECEWORK_OVERTAKE_S`; "inf" for never).
        trust: the file of public keys of which a bundle from elsewhere needs a signature (`PIECEWORK_TRUST`), or None.
        default_keys: the file that `PIECEWORK_TRUST=require` means (`$XDG_CONFIG_HOME/piecework/trusted_keys`, else
            `~/.config/piecework/trusted_keys`), or None where there is no home.
        remote: the URL where bundles are looked for that the store hasn't (`PIECEWORK_REMOTE`), or None.
    """

    store_root: Path
    compiler: str | None = None
    layer_names: bool = True
    api_key: str | None = field(default=None, repr=False)
    overtake_s: float = OVERTAKE_S
    trust: Path | None = None
    default_keys: Path | None = None
    remote: str | None = None

    def keys_file(self, named: str | Path | None) -> Path | None:
        """Return the file of keys that a user names, "require" being the default one; None takes the environment's.

        Raises PieceworkError for "require" where there is no home.
        """
        if named is None:
            return self.trust
        if str(named) != REQUIRE:
            return Path(named).absolute()
        if self.default_keys is None:
            raise PieceworkError(
                asked=f"{TRUST_VARIABLE}={REQUIRE}", found="no home directory for the keys", try_="a file of keys"
            )
        return self.default_keys

    @property
    def toolchain_root(self) -> Path:
        """Where what the C++ compiler prepares once per machine lives."""
        return self.store_root / "toolchain"


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Read the variables that piecework knows, from `variables` or else from this process's environment.

    An empty variable counts as not set. Relative XDG directories are ignored, as their specification says. Raises
    PieceworkError for what is no value of a variable.
    """
    given = os.environ if variables is None else variables
    found = Environment(
        store_root=_store_root(given),
        compiler=given.get("CXX") or None,
        layer_names=given.get("PIECEWORK_LAYERNAME") != "0",
        api_key=given.get("PIECEWORK_API_KEY") or None,
        overtake_s=_seconds(given, "PIECEWORK_OVERTAKE_S", default=OVERTAKE_S),
        default_keys=_default_keys(given),
        remote=given.get("PIECEWORK_REMOTE") or None,
    )
    return replace(found, trust=found.keys_file(given.get(TRUST_VARIABLE) or None))


def lesser_isa() -> str | None:
    """Return the level of instructions that `PIECEWORK_ISA` limits this process and its compiles to, or None."""
    return os.environ.get(ISA_VARIABLE) or None


def threads_given() -> bool:
    """Whether the user has told OpenMP how many threads to use (`OMP_NUM_THREADS`)."""
    return bool(os.environ.get("OMP_NUM_THREADS"))


def let_idle_threads_sleep() -> None:
    """Have OpenMP's threads wait some 50 µs for work, and then sleep, unless the user has said how they shall wait.

    GNU's OpenMP otherwise spins for milliseconds, which takes the core from whoever else, or which other thread of
    ours, has work to do (docs/decisions.md). Has an effect before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def child_variables(changes: Mapping[str, str | None]) -> dict[str, str]:
    """Return the environment for a child process: this one's, with `changes` applied (None removes)."""
    variables = dict(os.environ)
    for name, value in changes.items():
        if value is None:
            variables.pop(name, None)
        else:
            variables[name] = value
    return variables


def let_torch_cache_in(directory: Path) -> None:
    """Have torch make its cache's directory there, and not among temporary files, unless the user has said where.

    Has an effect before Inductor is imported.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(directory / "inductor"))


def compiler_settings(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables that change what Inductor generates, with their values, sorted by name.

    Args:
        variables: where to look; default: this process's environment.
    """
    given = os.environ if variables is None else variables
    names = [n for n in given if _COMPILERS.fullmatch(n) and not _WITHOUT_EFFECT.search(n)]
    if not names:
        return {}
    known = _torchs_config()
    return {name: given[name] for name in sorted(names) if given[name] and name in known}


def _torchs_config() -> str:
    """Return the text of the files that read such variables; nothing of torch is imported."""
    spec = importlib.util.find_spec("torch")
    roots = [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []
    files = [root / part / "config.py" for root in roots for part in ("_inductor", "_dynamo", "_functorch", "compiler")]
    return "\n".join(file.read_text("utf-8", errors="replace") for file in files if file.is_file())


def _seconds(given: Mapping[str, str], name: str, *, default: float) -> float:
    text = given.get(name)
    try:
        seconds = float(text) if text else default
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise PieceworkError(
            asked=f"{name}={text}", found="no number of seconds", try_=f'a number such as {default:g}, or "inf"'
        )
    return seconds


def _store_root(given: Mapping[str, str]) -> Path:
    home = given.get("PIECEWORK_HOME")
    if home:
        # expanduser raises RuntimeError for an unknown user; absolute() pins it against a later chdir
        return Path(os.path.expanduser(home)).absolute()
    cache = given.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache):
        return Path(cache) / "piecework"
    user = _home(given)
    if user is None:
        return Path(tempfile.gettempdir()) / f"piecework-{os.getuid()}"
    return user / ".cache" / "piecework"


def _default_keys(given: Mapping[str, str]) -> Path | None:
    config, user = given.get("XDG_CONFIG_HOME", ""), _home(given)
    root = Path(config) if os.path.isabs(config) else None if user is None else user / ".config"
    return None if root is None else root / "piecework" / "trusted_keys"


def _home(given: Mapping[str, str]) -> Path | None:
    """Return the user's home, or None without HOME for a user id that has none, as is usual in containers."""
    user = given.get("HOME") or os.path.expanduser("~")
    return Path(user) if os.path.isabs(user) else None
