"""Providers are found by entry points, imported only when they are asked for, and told of when they are absent."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import torch

import piecework
from piecework.errors import OpError
from piecework.ops.ir.selection import choose_implementation
from piecework.ops.norms import rms_norm
from piecework.providers.discovery import load_operators, load_providers
from piecework.providers.known import GROUP, OURS, entry_points_of_others, import_package, known_provider

ROOT = Path(__file__).resolve().parents[3]


def install(site: Path, package: str, *, provider: str, module: str, version: str = "1.2") -> None:
    """Put a package that nobody installed on a path: a module, and a dist-info directory with an entry point."""
    name = package.replace("-", "_")
    (site / f"{name}.py").write_text(textwrap.dedent(module))
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{provider} = {name}:register\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


MADE_KERNELS = """
    from piecework.ops.norms import rms_norm

    CALLS = []


    def register():
        @rms_norm.implement("made_up", supports=lambda x, *args, **kwargs: x.shape[-1] % 16 == 0
                            or f"hidden size {x.shape[-1]} not a multiple of 16")
        def norm(x, weight=None, eps=1e-6, offset=0.0, round_first=True):
            CALLS.append(tuple(x.shape))
            return rms_norm.native(x, weight, eps, offset, round_first)
"""


def use_made_kernels() -> None:
    """Use a package from eager code; in a process of its own, because what is registered stays registered."""
    assert [(entry.name, entry.dist.name) for entry in entry_points_of_others()] == [("made_up", "made-kernels")]
    assert "made_kernels" not in sys.modules, "nothing was imported before somebody asked"
    with piecework.providers(["rms_norm=made_up,native"]) as order:
        rms_norm(torch.ones(3, 32))
        rms_norm(torch.ones(3, 20))
        choice = choose_implementation(order, rms_norm, (torch.ones(3, 20),))
    assert sys.modules["made_kernels"].CALLS == [(3, 32)]
    assert choice.provider == "native"
    assert choice.rejected[0].why == "supports() said: hidden size 20 not a multiple of 16"
    assert load_providers(["made_up"]).packages == {"made_up": "made-kernels"}
    load_operators(["piecework__made_up.rms_norm.default", "aten.add.Tensor"])


def _run(code: str, site: Path | None = None) -> None:
    path = os.pathsep.join([str(site or "."), *(entry or "." for entry in sys.path)])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path}, timeout=300)


def test_a_package_made_on_the_fly_provides(tmp_path: Path) -> None:
    install(tmp_path, "made-kernels", provider="made_up", module=MADE_KERNELS)
    _run("from tests.unit.providers.test_provider_discovery import use_made_kernels as use; use()", tmp_path)


def test_an_absent_provider_is_passed_over_with_a_reason() -> None:
    absent = load_providers(["nobody"]).absent
    assert absent == {"nobody": "no installed package has an entry point 'nobody' in the group 'piecework.providers'"}
    with piecework.providers(["rms_norm=nobody,native"]):
        rms_norm(torch.ones(1, 4))
    with piecework.providers(["rms_norm=nobody"]), pytest.raises(OpError, match="no installed package"):
        rms_norm(torch.ones(1, 4))
    with pytest.raises(OpError, match="run pieces that call the provider nobody"):
        load_operators(["piecework__nobody::rms_norm"])


@pytest.mark.parametrize("known", [known for known in OURS if known.needs], ids=lambda known: known.name)
def test_ours_say_which_package_they_lack(known) -> None:
    if not known.why_absent:
        pytest.skip("it is installed")
    why = f"the package {known.needs} is not installed"
    assert load_providers([known.name]).absent == {known.name: why}
    with piecework.providers([f"rms_norm={known.name},native"]) as order:
        rms_norm(torch.ones(1, 4))
        assert choose_implementation(order, rms_norm, (torch.ones(1, 4),)).provider == "native"
    with piecework.providers([f"rms_norm={known.name}"]), pytest.raises(OpError, match=why):
        rms_norm(torch.ones(1, 4))


def test_ours_are_declared_as_entry_points() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][GROUP] == {known.name: known.entry for known in OURS}


@pytest.mark.parametrize(
    ("module", "found"),
    [
        ("raise ValueError('no such device')", "importing broken_kernels raised ValueError: no such device"),
        ("def register(:", "importing broken_kernels raised SyntaxError"),
        ("x = 1", "importing broken_kernels raised AttributeError"),
        (
            "def register():\n    raise RuntimeError('too old')",
            "registering its implementations raised RuntimeError: too old",
        ),
        (
            """
            from piecework.ops.norms import rms_norm

            def register():
                rms_norm.implement("broken")(lambda x: x)
            """,
            "registering its implementations raised OpError",
        ),
    ],
)
def test_a_broken_package_is_named(
    site: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, module: str, found: str
) -> None:
    provider = f"broken_{request.node.callspec.indices['module']}"
    monkeypatch.delitem(sys.modules, "broken_kernels", raising=False)
    install(site, "broken-kernels", provider=provider, module=module)
    for _ in range(2):
        with pytest.raises(OpError, match=f"load the provider {provider} of the package broken-kernels") as raised:
            load_providers([provider])
        assert raised.value.found.startswith(found)
    with pytest.raises(OpError, match="broken-kernels"), piecework.providers([f"rms_norm={provider},native"]):
        pass
    monkeypatch.delitem(sys.modules, "broken_kernels", raising=False)


def test_a_package_that_lacks_another_is_absent(site: Path) -> None:
    install(site, "needy-kernels", provider="needy", module="import nothing_of_that_name")
    absent = "the package needy-kernels can't be imported: No module named 'nothing_of_that_name'"
    assert load_providers(["needy"]).absent == {"needy": absent}
    module = "def register():\n    raise ImportError('it needs a GPU of this year')"
    install(site, "choosy-kernels", provider="choosy", module=module)
    assert load_providers(["choosy"]).absent == {"choosy": "it needs a GPU of this year"}


def test_two_packages_with_one_provider(site: Path) -> None:
    for package in ("one-of-them", "other-of-them"):
        install(site, package, provider="wanted_twice", module="def register(): ...")
    with pytest.raises(OpError, match="several packages that have one of that name: one-of-them, other-of-them"):
        load_providers(["wanted_twice"])


def test_another_package_does_not_replace_ours(site: Path) -> None:
    install(site, "usurper", provider="aten", module="raise ValueError")
    assert "aten" not in {entry.name for entry in entry_points_of_others()}
    assert load_providers(["aten"]).absent == {}


def test_a_package_of_ours_that_can_not_be_imported(site: Path) -> None:
    (site / "broken_needs.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    with pytest.raises(ImportError, match="the package broken_needs can't be imported: libcudart"):
        import_package("broken_needs")
    (site / "only_a_folder").mkdir()
    with pytest.raises(ImportError, match="the package only_a_folder is not installed"):
        import_package("only_a_folder")


def test_what_a_provider_needs_is_looked_for_and_not_imported(site: Path) -> None:
    assert known_provider("nobody") is None
    assert known_provider("aten").why_absent == ""
    known = known_provider("kernels")
    if known.why_absent:
        (site / "kernels.py").write_text("raise ValueError")
        assert known.why_absent == ""


def test_nothing_is_looked_for_before_a_name_is_asked_for() -> None:
    _run(
        """
import sys

OPTIONAL = {"flashinfer", "vllm", "sgl_kernel", "kernels"}  # and not triton, which torch looks for
looked_for = []


class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            looked_for.append(name)


sys.meta_path.insert(0, Watch())
import torch
import piecework
from piecework.ops.catalogue import CHOSEN
from piecework.ops.norms import rms_norm
from piecework.providers.discovery import load_providers

with piecework.providers("aten,native"):
    rms_norm(torch.ones(1, 4))
assert looked_for == [], looked_for
assert not {f"piecework.providers.{name}" for name in (*OPTIONAL, "hub", "triton")} & set(sys.modules)
load_providers(["flashinfer"])
assert looked_for == ["flashinfer"]
"""
    )


@pytest.mark.slow
def test_native_code_imports_no_provider() -> None:
    _run(
        """
import sys
import torch, piecework
from piecework.ops.norms import rms_norm
with piecework.providers("native"):
    rms_norm(torch.ones(1, 4))
assert "piecework.providers.aten" not in sys.modules
assert "piecework.providers.triton" not in sys.modules
assert "triton" not in sys.modules
"""
    )
