"""Which fields of config.json, and which files, the making of a model read: facts of its bundle.

Fields are seen where code reads them from transformers' config: modelling code, and that of the family's own config,
which may read a field that decides only together with another. What transformers' own code for all configs makes of
fields (`rope_parameters` of `rope_scaling`, parts of `text_config`) is seen by changing each in turn, those included
that config.json may get: the config's own, and what its code takes out of `kwargs`.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any, Final, final

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.utils import logging

from piecework.bundle.facts import Fact, config_facts, source_facts
from piecework.capture.sources import is_users, ran_files
from piecework.spec.config import ModelConfig

_WITHOUT_EFFECT: Final = frozenset(
    {
        *("dtype", "torch_dtype"),  # an option of the compile, which `auto` takes from there
        "architectures",  # of which the first is part of what is asked for
        *("bos_token_id", "eos_token_id"),  # of generating
        *("initializer_range", "use_cache", "transformers_version", "name_or_path", "gradient_checkpointing"),
        *("_name_or_path", "_commit_hash", "_attn_implementation", "attn_implementation"),  # of which we give our own
        "auto_map",  # of code that lies beside config.json, which is not run
        *("base_model_tp_plan", "base_model_ep_plan"),  # of several devices, as the next ones
        *("base_model_pp_plan", "base_model_fsdp_plan"),
    }
)
"""Fields that are read, and that change nothing of a model's forward as piecework calls it."""

_REPLACED: Final = frozenset({"num_key_value_heads", "experts_implementation", "_experts_implementation"})
"""Fields of what is code of ours in models with latent attention."""

_OF_TRAINING: Final = re.compile(r"((dropout|pdrop)(_prob|_rate)?|aux_loss_coef)$")
_ASKED_FOR: Final = re.compile(r"kwargs(?:\.pop\(|\.get\(|\[)\s*[\"'](\w+)[\"']")
_INITIALISERS: Final = frozenset({"_init_weights", "init_weights", "initialize_weights", "post_init"})
_GENERAL: Final = ("configuration_utils.py", "configuration_auto.py")
_MISSING: Final = object()


@final
class ModelReads:
    """What was read while a model was built and traced. Made by `model_reads`."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._names: dict[type, set[str]] = {}
        self._own: dict[type, set[str]] = {}
        self._files: set[Path] = set()

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Collect the files whose code runs inside the block."""
        with ran_files(self._files):
            yield

    def note(self, name: str, config: PretrainedConfig, reader: FrameType) -> None:
        """Note that code read an attribute of a config, unless that is about generating, initialising or all configs.

        What the code of all configs reads is seen in what it makes of it, by `_fields_behind`.
        """
        if name.startswith("__") or reader.f_code.co_name in _INITIALISERS:
            return
        by = _reader(reader.f_code.co_filename)
        if by is _Reader.FAMILY:
            self._own.setdefault(type(config), set()).add(name)
        elif by is _Reader.MODEL and reader.f_locals.get("self") is not config:
            self._names.setdefault(type(config), set()).add(name)

    def facts(self) -> tuple[Fact, ...]:
        """Return the facts of all that was read; what is read from now on is not noted."""
        made = CONFIG_MAPPING[self._config.model_type]
        without = _WITHOUT_EFFECT if self._config.latent is None else _WITHOUT_EFFECT | _REPLACED

        def matters(name: str) -> bool:
            return name not in without and not _OF_TRAINING.search(name)

        with _reading(_plainly), _quietly():
            behind = _fields_behind(made, self._config.raw, self._names, own=self._own.get(made, set()), only=matters)
        fields_read = filter(matters, self._config.read | behind)
        return (*config_facts(self._config.raw, fields_read), *source_facts(_files(made) | self._files))


class _Reader(Enum):
    """Whose code reads a config: that of all configs, generating included; that of the family's config; the rest."""

    GENERAL = "general"
    FAMILY = "family"
    MODEL = "model"


@functools.cache
def _reader(filename: str) -> _Reader:
    file = Path(filename)
    if file.name in _GENERAL or "generation" in file.parts or file == Path(__file__):
        return _Reader.GENERAL
    return _Reader.FAMILY if file.name.startswith("configuration_") else _Reader.MODEL


_plainly: Final = PretrainedConfig.__getattribute__


@contextlib.contextmanager
def model_reads(config: ModelConfig) -> Iterator[ModelReads]:
    """Collect what is read of transformers' configs inside the block, in which a model is built and traced."""
    reads = ModelReads(config)

    def noted(self: PretrainedConfig, name: str) -> Any:
        reads.note(name, self, sys._getframe(1))
        return _plainly(self, name)

    with _reading(noted):
        yield reads


@contextlib.contextmanager
def _reading(function: Any) -> Iterator[None]:
    """Inside, attributes of configs are read by `function`."""
    before = PretrainedConfig.__getattribute__
    PretrainedConfig.__getattribute__ = function
    try:
        yield
    finally:
        PretrainedConfig.__getattribute__ = before


def _fields_behind(
    cls: type[PretrainedConfig],
    raw: Mapping[str, Any],
    names: Mapping[type, Collection[str]],
    *,
    own: Collection[str],
    only: Callable[[str], bool],
) -> frozenset[str]:
    """Return the fields of config.json that decide on attributes that were read of the config that is made of it.

    Args:
        cls: the config's class.
        raw: config.json.
        names: the attributes that were read, of it and of configs inside it, by their class.
        own: those that its own code read.
        only: whether a field is asked about.
    """
    base = _made(cls, raw)
    assert base is not None, "the model was built from it"
    candidates = {*raw, *cls.attribute_map, *_taken_from_kwargs(cls)}
    candidates |= {f.name for f in fields(cls)} if is_dataclass(cls) else set()
    known = {name for name in names.get(cls, ()) if not callable(getattr(base, name, None))}
    known = set(filter(only, known | (candidates & set(own))))
    values = _values(base, names)

    def decides(field: str) -> bool:
        made = [config for value in _trials(field, raw, base) if (config := _made(cls, {**raw, field: value}))]
        return not made or any(not _same(_values(config, names), values) for config in made)

    return frozenset(known | {field for field in filter(only, candidates - known) if decides(field)})


def _values(config: PretrainedConfig, names: Mapping[type, Collection[str]]) -> list[object]:
    """Return the values of attributes, by their class, of a config and of all that are inside it; no methods."""
    found = [getattr(config, name, _MISSING) for name in sorted(names.get(type(config), ()))]
    inside = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    return [
        *(value for value in found if not callable(value) and not isinstance(value, PretrainedConfig)),
        *(value for part in inside for value in _values(part, names)),
    ]


def _trials(field: str, raw: Mapping[str, Any], base: PretrainedConfig) -> list[object]:
    """Return values that a field might have instead: of its own type, where config.json doesn't say it of any."""
    return _others(raw[field]) if field in raw else [*_others(getattr(base, field, None)), *_others(None)]


def _files(cls: type[PretrainedConfig]) -> set[Path]:
    """Return the files that define a config's class and those that it is derived from."""
    modules = [sys.modules.get(base.__module__) for base in cls.__mro__]
    return {Path(file) for m in modules if (file := getattr(m, "__file__", None)) is not None and is_users(file)}


def _taken_from_kwargs(cls: type[PretrainedConfig]) -> set[str]:
    """Return the names of fields that are none of a config's, and that its code asks for all the same."""
    return {name for file in _files(cls) for name in _ASKED_FOR.findall(file.read_text("utf-8"))}


def _others(value: object) -> list[object]:
    """Return some values that a field might have instead, small and large ones."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [other for other in (value + 1, value * 2 + 2, 0, 1, value // 2) if other != value]
    if isinstance(value, float):
        return [value * 2 + 1, value / 2]
    if isinstance(value, str):
        return [value + "_", None]
    if isinstance(value, (list, tuple)):
        firsts = [[other, *value[1:]] for inner in value[:1] for other in _others(inner)]
        return [[*value, *value], value[::-1], [], *firsts]
    if isinstance(value, Mapping):
        return [{}, None, *({**value, name: other} for name, inner in value.items() for other in _others(inner))]
    return [1, True, 0.5, "other", {"factor": 2.0}]


def _made(cls: type[PretrainedConfig], raw: Mapping[str, Any]) -> PretrainedConfig | None:
    """Return the config that transformers makes of fields, or None where it refuses them."""
    try:
        # `from_dict` does no more, unless a family has its own, than to write the config for a log that nobody reads
        make = cls.from_dict if "from_dict" in vars(cls) else lambda given: cls(**given)
        return make(deepcopy(dict(raw)))
    except Exception:  # noqa: BLE001  whatever a family's checks raise
        return None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Inside, transformers neither logs nor warns."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _same(a: object, b: object) -> bool:
    try:
        return bool(a == b)
    except (TypeError, ValueError, RuntimeError):
        return False
