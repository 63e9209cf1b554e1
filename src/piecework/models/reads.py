"""Which fields of config.json, and which files, the making of a model read: facts of its bundle.

Fields are seen where modelling code reads them from transformers' config. They may be made of others (`head_dim` of
`hidden_size`, `rope_parameters` of `rope_scaling`), or give way to them; which these are is seen by changing each field
in turn, those included that config.json may get: the config's own, and what its code takes out of `kwargs`.
"""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass
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
        *("initializer_range", "use_cache", "transformers_version", "name_or_path"),
    }
)
"""Fields that are read, and that change nothing of a model's forward as piecework calls it."""

_OF_KEYS: Final = frozenset({"num_key_value_heads"})  # latent attention has none of their own
_OF_TRAINING: Final = re.compile(r"(dropout|pdrop)(_prob|_rate)?$")
_ASKED_FOR: Final = re.compile(r"kwargs(?:\.pop\(|\.get\(|\[)\s*[\"'](\w+)[\"']")
_INITIALISERS: Final = frozenset({"_init_weights", "init_weights", "initialize_weights", "post_init"})
_MISSING: Final = object()


@final
class ModelReads:
    """What was read while a model was built and traced. Made by `model_reads`."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._names: set[str] = set()
        self._files: set[Path] = set()

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Collect the files whose code runs inside the block."""
        with ran_files(self._files):
            yield

    def note(self, name: str, config: PretrainedConfig, reader: FrameType) -> None:
        """Note that code read an attribute of a config, unless that is about generating, initialising or configs.

        What a config's own code reads is seen in what it makes of it, by `_fields_behind`.
        """
        code = reader.f_code
        file = Path(code.co_filename)
        if name.startswith("_") or name in self._names or code.co_name in _INITIALISERS:
            return
        if file.name.startswith("configuration_") or "generation" in file.parts or file == Path(__file__):
            return
        if reader.f_locals.get("self") is not config:
            self._names.add(name)

    def facts(self) -> tuple[Fact, ...]:
        """Return the facts of all that was read."""
        made = CONFIG_MAPPING[self._config.model_type]
        files = _files(made)
        read = self._config.read | _fields_behind(made, self._config.raw, self._names)
        without = _WITHOUT_EFFECT if self._config.latent is None else _WITHOUT_EFFECT | _OF_KEYS
        matter = (name for name in read - without if not _OF_TRAINING.search(name))
        return (*config_facts(self._config.raw, matter), *source_facts(files | self._files))


@contextlib.contextmanager
def model_reads(config: ModelConfig) -> Iterator[ModelReads]:
    """Collect what is read of transformers' configs inside the block, in which a model is built and traced."""
    reads = ModelReads(config)
    read = PretrainedConfig.__getattribute__

    def noted(self: PretrainedConfig, name: str) -> Any:
        reads.note(name, self, sys._getframe(1))
        return read(self, name)

    PretrainedConfig.__getattribute__ = noted
    try:
        yield reads
    finally:
        PretrainedConfig.__getattribute__ = read


def _fields_behind(cls: type[PretrainedConfig], raw: Mapping[str, Any], names: set[str]) -> frozenset[str]:
    """Return the fields of config.json that decide on attributes of the config that is made of it."""
    base = _made(cls, raw)
    assert base is not None, "the model was built from it"
    known = {name for name in names if not callable(getattr(base, name, None))}
    candidates = {*raw, *cls.attribute_map, *_taken_from_kwargs(cls)}
    candidates |= {f.name for f in fields(cls)} if is_dataclass(cls) else set()
    return frozenset(known | {f for f in candidates - known if _decides(f, known, cls=cls, raw=raw, base=base)})


def _files(cls: type[PretrainedConfig]) -> set[Path]:
    """Return the files that define a config's class and those that it is derived from."""
    modules = [sys.modules.get(base.__module__) for base in cls.__mro__]
    return {Path(file) for m in modules if (file := getattr(m, "__file__", None)) is not None and is_users(file)}


def _taken_from_kwargs(cls: type[PretrainedConfig]) -> set[str]:
    """Return the names of fields that are none of a config's, and that its code asks for all the same."""
    return {name for file in _files(cls) for name in _ASKED_FOR.findall(file.read_text("utf-8"))}


def _decides(
    field: str, names: Collection[str], *, cls: type[PretrainedConfig], raw: Mapping[str, Any], base: PretrainedConfig
) -> bool:
    """Whether another value of a field gives one of the attributes another value; so where no other value is taken."""
    values = _others(raw[field]) if field in raw else [*_others(getattr(base, field, None)), *_others(None)]
    other = [_made(cls, {**raw, field: value}) for value in values]
    taken = [config for config in other if config is not None]
    return not taken or any(
        not _same(getattr(config, name, _MISSING), getattr(base, name, _MISSING)) for config in taken for name in names
    )


def _others(value: object) -> list[object]:
    """Return some values that a field might have instead."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2 + 2]
    if isinstance(value, float):
        return [value * 2 + 1, value / 2]
    if isinstance(value, str):
        return [value + "_", None]
    if isinstance(value, (list, tuple)):
        return [[*value, *value], []]
    if isinstance(value, Mapping):
        return [{}, None, *({**value, name: other} for name, inner in value.items() for other in _others(inner))]
    return [1, True, 0.5, "other", {"factor": 2.0}]


def _made(cls: type[PretrainedConfig], raw: Mapping[str, Any]) -> PretrainedConfig | None:
    """Return the config that transformers makes of fields, or None where it refuses them."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls.from_dict(deepcopy(dict(raw)))
    except Exception:  # noqa: BLE001  whatever a family's checks raise
        return None
    finally:
        logging.set_verbosity(before)


def _same(a: object, b: object) -> bool:
    try:
        return bool(a == b)
    except (TypeError, ValueError, RuntimeError):
        return False
