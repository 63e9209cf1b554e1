"""Every block of docs/latent-attention.md runs, in order."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "latent-attention.md"


def test_the_blocks_run_in_order() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    code = "\n".join(["torch_seed = __import__('torch').manual_seed(0)", *blocks])
    assert "fullgraph=True)" in code
    code = code.replace(
        "fullgraph=True)", "fullgraph=True, backend='aot_eager')"
    )  # one graph; generating code takes long
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
