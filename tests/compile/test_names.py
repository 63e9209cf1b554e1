"""Names stay out of native pieces: the KV update and attention are steps between them.

A stack of L blocks is L + 1 pieces, of which 3 are different: before the first attention, between two, after the last.
tests/unit/names/test_matrix.py has all operators and depths, without native code.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import piecework
from piecework.foundation.environment import child_variables
from tests.choice import slow_but
from tests.compile.stacks import FAMILY, run_compiled, run_steps
from tests.unit.names.models import HIDDEN, make_stack

ROOT = Path(__file__).parents[2]
ARTIFACTS = 3
CLOSE = 1e-5


@pytest.fixture(scope="module", params=slow_but(["LayerName", "str"]))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def own_home(tmp_path_factory: pytest.TempPathFactory, new_home: Callable[[Path], Path], kind: str) -> Path:
    """A store, and a cache of Inductor's, that were empty before the 4 layers of `kind` were compiled."""
    home = tmp_path_factory.mktemp("names")
    new_home(home / "store")
    return home


def variables(home: Path) -> dict[str, str]:
    return {"PIECEWORK_HOME": str(home / "store"), "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor")}


@pytest.fixture(scope="module")
def four_layers(own_home: Path, kind: str) -> dict[str, float]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables(own_home).items():
            patch.setenv(name, value)
        torch._dynamo.reset()
        return run_compiled(kind, num_layers=4)


class TestTorchCompile:
    @pytest.fixture(autouse=True)
    def _use_own_home(self, own_home: Path, use_home: None, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in variables(own_home).items():
            monkeypatch.setenv(name, value)
        torch._dynamo.reset()

    def test_four_layers_make_three_artifacts(self, four_layers: dict[str, float], kind: str) -> None:
        assert four_layers["graphs"] == 1
        assert four_layers["pieces"] == 5
        assert (four_layers["compiled"], four_layers["store_hits"]) == (ARTIFACTS, 0)
        assert four_layers["worst"] < CLOSE

    def test_eight_layers_run_on_the_same_three(self, four_layers: dict[str, float], kind: str) -> None:
        found = run_compiled(kind, num_layers=8)
        assert found["pieces"] == 9
        assert (found["compiled"], found["store_hits"]) == (0, ARTIFACTS)
        assert found["worst"] < CLOSE

    def test_another_process_needs_no_compiler(self, four_layers: dict[str, float], own_home: Path, kind: str) -> None:
        empty = own_home / "no compiler"
        empty.mkdir()
        changes = {**variables(own_home), "TORCHINDUCTOR_CACHE_DIR": str(own_home / "empty"), "PATH": str(empty)}
        done = subprocess.run(
            [sys.executable, "-m", "tests.compile.stacks", kind, "4", kind, "8"],
            env=child_variables(changes),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        four, eight = json.loads(done.stdout.splitlines()[-1])
        assert (four["compiled"], four["store_hits"]) == (0, ARTIFACTS)
        assert (eight["compiled"], eight["store_hits"]) == (0, ARTIFACTS)
        assert max(four["worst"], eight["worst"]) < CLOSE


@pytest.mark.slow
@torch.no_grad()
def test_a_bundle_of_shared_libraries(tmp_path: Path) -> None:
    model = make_stack(FAMILY, "LayerName", num_layers=4)
    sizes = {"tokens": piecework.Dim(1, 64)}
    bundle = piecework.compile(model, (torch.randn(5, HIDDEN),), dynamic=sizes, out=tmp_path / "bundle")
    loaded = piecework.load(bundle, weights=model)
    assert len(loaded.plan.instances) == 5
    assert len({form.artifact for piece in loaded.plan.pieces for form in piece.ranges}) == ARTIFACTS
    made, wanted = (run_steps(run, "LayerName", num_layers=4) for run in (loaded, model))
    for got, want in zip(made, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=CLOSE, atol=CLOSE)
