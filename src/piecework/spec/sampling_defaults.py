"""How a model's author samples from it: the part of generation_config.json that a request may leave unsaid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from piecework.spec.json_file import read_json_file

GENERATION_CONFIG: Final = "generation_config.json"


@dataclass(frozen=True)
class SamplingDefaults:
    """Values of sampling parameters where a request names none; None: nobody says.

    Attributes:
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: as in
            `SamplingParams`.
        max_tokens: also the most that a request gets, as vLLM has it; `max_new_tokens` in the file.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_tokens: int | None = None

    def given(self) -> dict[str, Any]:
        """Return those that somebody says, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


def read_generation_config(model_dir: Path) -> Mapping[str, Any]:
    """Return a directory's generation_config.json, empty where there is none; raises UnsupportedModelError."""
    path = model_dir / GENERATION_CONFIG
    return read_json_file(path, asked=f"the generation settings in {model_dir}") if path.exists() else {}


def read_sampling_defaults(model_dir: Path) -> SamplingDefaults:
    """Return what generation_config.json says of sampling; raises UnsupportedModelError for a broken file."""
    said = dict(read_generation_config(model_dir))
    said["max_tokens"] = said.get("max_new_tokens")
    return SamplingDefaults(**{field.name: said.get(field.name) for field in fields(SamplingDefaults)})
