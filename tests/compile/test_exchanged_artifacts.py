"""Native libraries under other libraries' names: seen before they are opened, because they say what they are."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from benchmarks.common.forgery import content_of, forge, forge_artifact
from benchmarks.common.sample_bundles import Sample, llama
from piecework.errors import CorruptBundle
from piecework.spec.compile_options import BackendName

pytestmark = pytest.mark.slow  # native code of two pieces, for nobody else


@pytest.fixture(scope="module")
def sample(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIECEWORK_HOME", str(home))
        return llama(tmp_path_factory.mktemp("exchanged"), BackendName.AOTI)


def test_every_exchange_of_two_is_refused(sample: Sample, tmp_path: Path) -> None:
    text = json.dumps(content_of(sample.bundle).plan)
    pairs = list(itertools.combinations(sample.bundle.artifacts, 2))
    assert len(pairs) >= 3
    for number, (one, other) in enumerate(pairs):
        exchanged = text.replace(one, "?").replace(other, one).replace("?", other)
        with pytest.raises(CorruptBundle):
            sample.load(forge(sample.bundle, tmp_path / str(number), plan=json.loads(exchanged)))


def test_a_library_that_says_nothing(sample: Sample, tmp_path: Path) -> None:
    name = sample.bundle.plan()["pieces"][0]["ranges"][0]["artifact"]
    whole = sample.bundle.artifact_path(name).read_bytes()
    for number, data in enumerate((whole[: whole.rindex(b'{"constants"')], whole[:1000], b"")):
        with pytest.raises(CorruptBundle, match="doesn't say what it takes and gives"):
            sample.load(forge_artifact(sample.bundle, tmp_path / str(number), name, data))


def test_what_was_not_changed_runs(sample: Sample, tmp_path: Path) -> None:
    again = sample.load(forge(sample.bundle, tmp_path / "again"))
    assert all(map(torch.equal, sample.run(again), sample.run(sample.load())))
