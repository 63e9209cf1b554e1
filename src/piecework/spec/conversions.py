"""Commands that make of a model's files what piecework reads, with transformers. They are shown, and not run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Final

_TO_SAFETENSORS: Final = (
    "from transformers import AutoModelForCausalLM as M; M.from_pretrained({}, dtype='auto').save_pretrained({})"
)
_TO_TOKENIZER_JSON: Final = "from transformers import AutoTokenizer as T; T.from_pretrained({}).save_pretrained({})"


def python_command(code: str, *paths: str | Path) -> str:
    """Return a command for the shell that runs Python code, with paths as texts where the code has "{}"."""
    return f"python -c {shlex.quote(code.format(*(repr(str(path)) for path in paths)))}"


def to_safetensors(model: str | Path, *, to: Path | str | None = None) -> str:
    """Return the command that writes a model's weights as safetensors, into its own directory or into another."""
    return python_command(_TO_SAFETENSORS, model, model if to is None else to)


def to_tokenizer_json(model_dir: Path) -> str:
    """Return the command that writes a tokenizer.json beside a tokenizer's other files."""
    return python_command(_TO_TOKENIZER_JSON, model_dir, model_dir)
