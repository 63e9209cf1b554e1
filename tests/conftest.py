"""Settings of every test: no timing is asserted, Hypothesis' deadlines included; workers take whole files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Each worker's threads, and the compilers that they start, share the cores: those that wait shall not spin meanwhile.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

settings.register_profile("piecework", deadline=None)
settings.load_profile("piecework")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker whole files, so that its fixtures compile once; tests/compile, which is long, comes early."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the matrix of names first: it is the longest file, and one worker would be left with it at the end."""
    items.sort(key=lambda item: "names" not in item.path.parts)


@pytest.fixture(scope="session")
def common_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that all tests have in common, in all of pytest-xdist's workers."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def new_home(common_dir: Path) -> Callable[[Path], Path]:
    """Return a function that makes an empty store, whose precompiled headers are those of all other tests."""
    toolchain = common_dir / "toolchain"
    toolchain.mkdir(exist_ok=True)

    def make(path: Path) -> Path:
        path.mkdir(exist_ok=True)
        if not (path / "toolchain").is_symlink():
            (path / "toolchain").symlink_to(toolchain)
        return path

    return make
