"""Settings of every test: no timing is asserted, Hypothesis' deadlines included; workers take whole files."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("piecework", deadline=None)
settings.load_profile("piecework")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker whole files, so that its fixtures compile once; tests/compile, which is long, comes first."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)
