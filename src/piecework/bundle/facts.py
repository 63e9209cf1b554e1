"""Facts: what a compile read, with its value. A bundle is valid where its facts hold.

What a caller asks for (config, options) is compared with what the caller has; what the machine and the installed
packages are is looked up here, without importing any of them.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import re
import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import Final

from piecework.bundle.format import FORMAT
from piecework.errors import StaleBundle
from piecework.foundation.digests import JsonScalar, canonical_json, digest_bytes, digest_file
from piecework.foundation.environment import compiler_settings
from piecework.foundation.gpu import gpu_architecture
from piecework.foundation.own_code import own_code_digest
from piecework.foundation.target import Target, missing_flags, read_target

NOT_INSTALLED: Final = "not installed"
ABSENT: Final = "not in config.json"
_NOTHING: Final = object()
_OF_JSON: Final = ("[", "{", '"')
_MOST_SOURCE_BYTES: Final = 16 << 20
_INSTALLED: Final = ".dist-info"
_RECOMPILE: Final = "compile the model again on this machine"


@dataclass(frozen=True, order=True)
class Fact:
    """One thing that the compile read, with its value.

    Args:
        kind: "torch", "target", "piecework", "option", "config", "setting", "source", "provider"; "most", of which less
            may be asked for.
        name: what of that kind, such as "version", "isa", a field of config.json, an environment variable, a package
            that implements operators, or "<package>/<path>" of a source file.
        value: what it was.
    """

    kind: str
    name: str
    value: JsonScalar

    @property
    def label(self) -> str:
        """How people read the fact's name, such as "torch version" or "source llama.py"."""
        return f"{self.kind} {self.name}"

    def to_json(self) -> list[JsonScalar]:
        """Return the fact as [kind, name, value]."""
        return [self.kind, self.name, self.value]


@dataclass(frozen=True)
class Difference:
    """A fact that doesn't hold.

    Args:
        fact: as the bundle has it.
        here: the value now and here.
        why: more about it for people, or "".
    """

    fact: Fact
    here: JsonScalar
    why: str = ""

    def __str__(self) -> str:
        """Return a line such as "torch version: bundle 2.13.0, here 2.12.0"."""
        bundle, here = _shorten(self.fact, self.fact.value), _shorten(self.fact, self.here)
        return f"{self.fact.label}: bundle {bundle}, here {here}" + (f" ({self.why})" if self.why else "")


def environment_facts(*, target: Target | None = None, device: str = "cpu") -> tuple[Fact, ...]:
    """Return the facts of this machine and its packages that every compiled artifact depends on.

    Args:
        target: the CPU that was compiled for; default: this one.
        device: the type of device that was compiled for; code for "cuda" is that of one GPU architecture.
    """
    cpu = target or read_target()
    gpu = (Fact("target", "gpu", gpu_architecture()),) if device == "cuda" else ()
    return (
        *gpu,
        Fact("piecework", "format", FORMAT),
        Fact("target", "isa", cpu.fact),
        Fact("target", "machine", cpu.machine),
        Fact("target", "system", cpu.system),
        Fact("torch", "version", package_version("torch")),
    )


def config_facts(config: Mapping[str, object], fields: Iterable[str]) -> tuple[Fact, ...]:
    """Return the facts of a model's config.json: those fields that a compile read, sorted."""
    return tuple(Fact("config", name, _field(config, name)) for name in sorted(set(fields)))


def making_facts() -> tuple[Fact, ...]:
    """Return the facts of what makes bundles here: our own code, and settings of torch's compiler that are changed."""
    settings = compiler_settings()
    return (Fact("piecework", "code", own_code_digest()), *(Fact("setting", name, settings[name]) for name in settings))


def longest_text(tokens: int) -> Fact:
    """Return the fact of how many tokens a text may have in an encoder; asked of a bundle, of those that are given."""
    return Fact("most", "text tokens", tokens)


def option_facts(options: Mapping[str, JsonScalar]) -> tuple[Fact, ...]:
    """Return the facts of compile options, sorted by name."""
    return tuple(Fact("option", name, options[name]) for name in sorted(options))


def source_facts(files: Iterable[str | Path]) -> tuple[Fact, ...]:
    """Return the facts of source files that the compile traced, sorted, each once.

    A file is named by its top-level package and its path in it, so that the fact holds wherever the package is
    installed. A file that belongs to no importable package (a notebook cell, `__main__`, "<string>") gives none:
    nobody could look it up later.

    Raises OSError where a file can't be read.
    """
    facts = set[Fact]()
    for file in files:
        path = Path(file)
        if path.is_file() and (name := _source_name(path)) is not None:
            facts.add(Fact("source", name, digest_file(path)))
    return tuple(sorted(facts, key=lambda fact: fact.name))


@dataclass(frozen=True)
class Asked:
    """What a caller asks of a bundle.

    Args:
        facts: a fact of the bundle with the same kind and name must have the same value; one that the bundle doesn't
            have at all is a difference too.
        config: the model's config.json, or None where the caller has none.
        as_made_here: whether the bundle must be what a compile would make here and now (`making_facts`): whoever names
            a bundle takes it as it is.
    """

    facts: tuple[Fact, ...] = ()
    config: Mapping[str, object] | None = None
    as_made_here: bool = False


NOTHING: Final = Asked()


def check(facts: Iterable[Fact], *, asked: Asked = NOTHING, target: Target | None = None) -> tuple[Difference, ...]:
    """Return the facts that don't hold here, in the order of `facts`.

    Args:
        facts: the bundle's.
        asked: what the caller asks for.
        target: the CPU to run on; default: this one.
    """
    expected = (*asked.facts, *(making_facts() if asked.as_made_here else ()))
    wanted = {(fact.kind, fact.name): fact for fact in expected}
    cpu = target or read_target()
    differences = []
    for fact in facts:
        known = wanted.pop((fact.kind, fact.name), None)
        if known is not None:
            difference = _compare(fact, known.value)
        elif fact.kind == "config" and asked.config is not None:
            difference = _compare(fact, _field(asked.config, fact.name))
        elif fact.kind == "setting" and asked.as_made_here:
            difference = Difference(fact, None)  # what is set here is in `wanted`
        else:
            difference = _look_up(fact, cpu=cpu)
        if difference is not None:
            differences.append(difference)
    for fact in wanted.values():
        differences.append(Difference(Fact(fact.kind, fact.name, None), fact.value, why="the bundle doesn't say"))
    return tuple(differences)


def require(facts: Iterable[Fact], *, what: str, asked: Asked = NOTHING, target: Target | None = None) -> None:
    """Raise StaleBundle with every fact that doesn't hold here; arguments as for `check`, and what is to be done."""
    differences = check(facts, asked=asked, target=target)
    if differences:
        raise stale(differences, what=what)


def stale(differences: Sequence[Difference], *, what: str) -> StaleBundle:
    """Return the error that lists `differences`."""
    return StaleBundle(
        asked=what,
        found="facts that no longer hold: " + "; ".join(str(difference) for difference in differences),
        try_=_RECOMPILE,
        differing=[(d.fact.label, d.fact.value, d.here) for d in differences],
    )


def package_version(name: str) -> str:
    """Return an installed package's version without importing it, or "not installed"."""
    wanted = _normalized(name)
    for entry in sys.path:
        with contextlib.suppress(OSError):
            for found in os.listdir(entry or "."):
                if (
                    found.endswith(_INSTALLED)
                    and _normalized(found.removesuffix(_INSTALLED).rpartition("-")[0]) == wanted
                ):
                    text = Path(entry, found, "METADATA").read_text("utf-8", errors="replace")
                    if said := re.search(r"^Version: *(\S+)", text, re.MULTILINE):
                        return said[1]
    import importlib.metadata  # noqa: PLC0415  costs 20 ms, and knows packages that are installed in other ways

    try:
        return importlib.metadata.version(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):  # of which the latter is raised for ""
        return NOT_INSTALLED


def _normalized(package: str) -> str:
    return re.sub(r"[-_.]+", "_", package).lower()


def _look_up(fact: Fact, *, cpu: Target) -> Difference | None:
    """Compare a fact with this machine; what only a caller can know holds."""
    match fact.kind, fact.name:
        case "torch", "version":
            return _compare(fact, package_version("torch"))
        case "piecework", "format":
            return _compare(fact, FORMAT)
        case "target", "machine":
            return _compare(fact, cpu.machine)
        case "target", "system":
            return _compare(fact, cpu.system)
        case "target", "isa":
            missing = missing_flags(str(fact.value), target=cpu)
            why = f"this CPU lacks {', '.join(missing)}"
            return Difference(fact, cpu.fact, why=why) if missing else None
        case "target", "gpu":
            return _compare(fact, gpu_architecture())
        case "provider", name:
            return _compare(fact, package_version(name))
        case "source", name:
            return _check_source(fact, name=name)
    return None


def _compare(fact: Fact, here: JsonScalar) -> Difference | None:
    # 1 == True == 1.0 in Python, but not in what a compile read
    if fact.kind == "most" and isinstance(here, int) and isinstance(fact.value, int) and here <= fact.value:
        return None
    same = type(fact.value) is type(here) and fact.value == here
    return None if same else Difference(fact, here)


def _check_source(fact: Fact, *, name: str) -> Difference | None:
    top, _, relative = name.partition("/")
    places = _package_places(top)
    if not places:
        return None  # running the bundle doesn't need the package, so its absence changes nothing
    for place in places:
        try:
            digest = _digest_of_source(place / relative if relative else place)
        except FileNotFoundError:
            continue
        except OSError as error:
            return Difference(fact, None, why=f"can't be read: {error.strerror}")
        return _compare(fact, digest)
    return Difference(fact, None, why="the package has no such file")


def _digest_of_source(path: Path) -> str:
    """Return the SHA-256 of a file; raises FileNotFoundError where it is no file, or more than a source can be.

    The name comes from a bundle: a device or a pipe in its place must not be waited for.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_SOURCE_BYTES:
            raise FileNotFoundError(path)
        return digest_bytes(os.read(descriptor, _MOST_SOURCE_BYTES))
    finally:
        os.close(descriptor)


def is_source_name(name: str) -> bool:
    """Whether a fact about a source file may have this name: a package and a path that stays in it, or "module.py"."""
    parts = name.split("/")
    return parts[0].removesuffix(".py").isidentifier() and not {"", ".", ".."} & set(parts) and "\0" not in name


def _field(config: Mapping[str, object], name: str) -> JsonScalar:
    """Return a field as facts have it: numbers and texts as they are, but those that look like the rest, as JSON."""
    value = config.get(name, _NOTHING)
    if value is _NOTHING:
        return ABSENT
    if isinstance(value, str) and (value == ABSENT or value.startswith(_OF_JSON)):
        return canonical_json(value).decode()
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and isfinite(value)):
        return value
    return canonical_json(value).decode()


def _package_places(top: str) -> tuple[Path, ...]:
    """Return the directories of a top-level package, or the file of a module "name.py"; empty where not installed."""
    spec = _find_spec(top.removesuffix(".py"))
    if spec is None:
        return ()
    if top.endswith(".py"):
        return (Path(spec.origin),) if spec.origin and spec.submodule_search_locations is None else ()
    return tuple(Path(place) for place in spec.submodule_search_locations or ())


def _find_spec(top: str) -> importlib.machinery.ModuleSpec | None:
    """Return a top-level module's spec, which Python finds without importing it."""
    if not top.isidentifier():
        return None
    try:
        return importlib.util.find_spec(top)
    except (ValueError, ImportError):  # `__main__` and modules made by hand have no spec
        return None


def _source_name(path: Path) -> str | None:
    """Return "<package>/<path in it>" or "<module>.py" for a file that Python would find under that name."""
    file = path.resolve()
    candidates = [file.relative_to(entry) for entry in _search_path() if file.is_relative_to(entry)]
    packages = [parent for parent in file.parents if (parent / "__init__.py").is_file()]
    if packages:
        candidates.append(file.relative_to(packages[-1].parent))
    for candidate in sorted(candidates, key=lambda c: len(c.parts)):
        name = str(PurePosixPath(candidate))
        top, _, relative = name.partition("/")
        for place in _package_places(top):
            if (place / relative if relative else place).resolve() == file:
                return name
    return None


def _search_path() -> list[Path]:
    return [Path(entry).resolve() for entry in sys.path if entry]


def _shorten(fact: Fact, value: JsonScalar) -> str:
    """Write a value for people: a digest by its beginning, an instruction set by its level."""
    if value is None or value == "":
        return "nothing"
    if (fact.kind == "source" or (fact.kind, fact.name) == ("piecework", "code")) and isinstance(value, str):
        return value[:12]
    if (fact.kind, fact.name) == ("target", "isa") and isinstance(value, str):
        return value.partition(":")[0]
    return str(value)
