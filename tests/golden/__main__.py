"""`python -m tests.golden` writes the text files anew: look at their diff before it is committed."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

from tests.golden.models import MODELS
from tests.golden.printing import print_bundle

for name, make in MODELS.items():
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        text = print_bundle(make(Path(folder)))
    (Path(__file__).parent / f"{name}.txt").write_text(text)
