"""What is given for a model and is none: a GGUF file, a bundle, an adapter, a pipeline … Each gets its own words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from piecework.errors import UnsupportedModelError
from piecework.spec.conversions import python_command

LAYOUT: Final = (
    "a directory in Hugging Face layout (config.json, *.safetensors, tokenizer.json), or OWNER/NAME on the Hub"
)

_MERGE: Final = (
    "from peft import AutoPeftModelForCausalLM as M; M.from_pretrained({}).merge_and_unload().save_pretrained('MERGED')"
)


def refuse_others(path: Path, *, asked: str) -> None:
    """Raise UnsupportedModelError where a path is of something else than the directory of a language model."""
    try:
        found = _of_file(path) if path.is_file() else _of_directory(path) if path.is_dir() else None
    except OSError:
        return  # whoever reads config.json next says it
    if found is not None:
        raise UnsupportedModelError(asked=asked, found=found[0], try_=found[1])


def gguf(name: str) -> tuple[str, str]:
    """Return the words about a GGUF file: what it is, and what to try."""
    return (
        f"{name}, a GGUF file: weights in the blocks of llama.cpp, which piecework doesn't read",
        "the model that it was made from, whose weights are safetensors",
    )


def _of_file(path: Path) -> tuple[str, str]:
    """Return what a file is, and what to try."""
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            return gguf(path.name)
    if path.suffix == ".pwb":
        return "a bundle, which holds no weights", f"its model's directory, with --bundle {path}"
    return "a file", f"its directory, {path.parent}" if (path.parent / "config.json").exists() else LAYOUT


def _of_directory(path: Path) -> tuple[str, str] | None:
    """Return what a directory is that is none of a language model, and what to try."""
    names = {entry.name for entry in path.iterdir()}
    if "config.json" in names:
        return None
    if "manifest.json" in names:
        return "a bundle, which holds no weights", f"its model's directory, with --bundle {path}"
    if "adapter_config.json" in names:
        base = _field(path / "adapter_config.json", "base_model_name_or_path")
        return (
            f"a LoRA adapter (adapter_config.json) of {base}",
            f"the model with the adapter merged into it: {python_command(_MERGE, path)}",
        )
    if "model_index.json" in names:
        kind = _field(path / "model_index.json", "_class_name")
        return f"a pipeline of diffusers, {kind} (model_index.json)", "piecework.compile(pipeline.transformer, ...)"
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if ggufs:
        return gguf(ggufs[0])
    return None if names else ("an empty directory", LAYOUT)


def _field(path: Path, name: str) -> str:
    """Return a field of a JSON file, or "a model it doesn't name"."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))[name])
    except (OSError, ValueError, LookupError, TypeError):
        return "a kind that it doesn't name"
