"""Every block of docs/providers.md runs, in order, and the package that it shows is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from piecework.providers.known import GROUP, OURS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "providers.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Install the page's package."""
    (package,) = (block for block in blocks("python") if block.startswith("# my_kernels.py"))
    (project,) = (tomllib.loads(block) for block in blocks("toml"))
    (tmp_path / "my_kernels.py").write_text(package)
    info = tmp_path / "my_kernels-1.0.dist-info"
    info.mkdir()
    name, version = project["project"]["name"], project["project"]["version"]
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    entries = "".join(f"{key} = {value}\n" for key, value in project["project"]["entry-points"][GROUP].items())
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entries}")
    return tmp_path


def _run(code: str, site: Path) -> None:
    path = os.pathsep.join([str(site), *(entry or "." for entry in sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "PIECEWORK_HOME": str(site / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_blocks_run_in_order(site: Path) -> None:
    code = [block for block in blocks("python") if not block.startswith("# my_kernels.py")]
    # the page's own compile, without a C++ compiler
    eager = [b.replace("CompileOptions(", "CompileOptions(backend='eager', ") for b in code]
    eager = [b.replace("backend='eager'", "backend=BackendName.EAGER") for b in eager]
    _run("from torch import Tensor\nfrom piecework.spec.compile_options import BackendName\n" + "\n".join(eager), site)


@pytest.mark.slow
def test_the_package_is_found_by_its_entry_point(site: Path) -> None:
    code = """
import sys, torch, piecework
from piecework.ops.ir.selection import choose_implementation
from piecework.ops.norms import add_rms_norm, rms_norm
x, weight = torch.randn(4, 64), torch.randn(64)
assert "my_kernels" not in sys.modules
with piecework.providers("my_kernels,native") as order:
    torch.testing.assert_close(rms_norm(x, weight), rms_norm.native(x, weight))
    assert choose_implementation(order, rms_norm, (x, weight)).provider == "my_kernels"
    why = choose_implementation(order, rms_norm, (x[:, :20],)).rejected[0].why
    assert why == "supports() said: hidden size 20 not a multiple of 16", why
    rms_norm.check(x, weight, provider="my_kernels")
    add_rms_norm.check(x, x.clone(), weight, provider="my_kernels")
"""
    _run(code, site)


def test_the_table_has_every_provider() -> None:
    named = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    assert named == ["native", *(known.name for known in OURS)]
