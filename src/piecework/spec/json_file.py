"""JSON files of a model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from piecework.errors import UnsupportedModelError
from piecework.spec.other_models import LAYOUT


def read_json_file(path: Path, *, asked: str) -> dict[str, Any]:
    """Read a JSON object of a model directory; raises UnsupportedModelError where that isn't one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UnsupportedModelError(
            asked=asked,
            found=f"no {path.name} in {path.parent}" if path.parent.is_dir() else f"no directory {path.parent}",
            try_=LAYOUT,
        ) from error
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(
            asked=asked, found=f"{path} can't be read as JSON: {error}", try_="download or write the file again"
        ) from error
    if not isinstance(value, dict):
        raise UnsupportedModelError(asked=asked, found=f"{path} holds no JSON object", try_="write the file again")
    return value
