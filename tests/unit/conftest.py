"""A small bundle, whose artifacts are any bytes: nothing here loads them."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from piecework.record import Record
from piecework.store import Bundle, BundleContent, Fact, environment_facts, write_bundle


def _plan(artifacts: Mapping[str, Path]) -> dict[str, Any]:
    first, second = (name.partition(".")[0] for name in artifacts)
    return {
        "sizes": {"s0": {"name": "tokens", "min": 1, "max": 8192}},
        "inputs": [{"name": "input_ids", "kind": "tensor", "shape": ["s0"], "dtype": "int64", "device": "cpu"}],
        "states": [
            {"name": f"model.layers.{layer}.self_attn.kv_cache", "shape": [2, "s5", 16, 2, 64], "dtype": "float32"}
            for layer in range(2)
        ],
        "recipes": [
            {"take": "model.embed_tokens.weight", "shape": [128, 64]},
            {"take": "a.weight", "shape": [64, 64], "pack": "mkldnn_linear"},
            {"take": "b.weight", "shape": [64, 64], "pack": "mkldnn_linear"},
            {"literal": "inv_freq"},
        ],
        "pieces": [
            {
                "fingerprint": "ab" * 32,
                "ranges": [{"min": 1, "max": 1, "artifact": first}, {"min": 2, "max": 8192, "artifact": second}],
                "num_ops": 7,
                "constants": ["w0"],
                "size": "s0",
            },
            {
                "fingerprint": "cd" * 32,
                "ranges": [{"min": 1, "max": 8192, "artifact": second}],
                "num_ops": 3,
                "constants": ["w0", "w1"],
                "size": "s0",
            },
        ],
        "instances": [[0, [1]], [0, [2]], [1, [0, 3]]],
        "steps": [
            ["piece", 0, [0], [1]],
            ["op", "piecework::attention", [{"slot": 1}, {"state": "model.layers.0.self_attn.kv_cache"}], [2]],
            ["piece", 1, [2], [3]],
            ["op", "piecework::attention", [{"slot": 3}, {"state": "model.layers.1.self_attn.kv_cache"}], [4]],
            ["piece", 2, [4], [5]],
        ],
        "outputs": {"slot": 5},
    }


@pytest.fixture
def sample_content(tmp_path: Path) -> BundleContent:
    artifacts = {}
    for content in (b"first library " * 50, b"second library " * 50):
        path = tmp_path / f"{hashlib.sha256(content).hexdigest()}.so"
        path.write_bytes(content)
        artifacts[path.name] = path
    return BundleContent(
        plan=_plan(artifacts),
        artifacts=artifacts,
        facts=(*environment_facts(), Fact("option", "dtype", "float32"), Fact("model", "config", "12" * 32)),
        record=Record(phases={"capture": 1.5, "compile": 8.25}, counts={"pieces": 3}, notes=("all well",)),
        constants=b"literals",
        identity={"model": "tiny", "dtype": "float32"},
    )


@pytest.fixture
def write_sample(sample_content: BundleContent, tmp_path: Path) -> Callable[..., Bundle]:
    """Return a function that writes the sample to a path; keywords replace parts of it."""

    def write(path: Path, **changes: Any) -> Bundle:
        content = {"extract_root": tmp_path / "home", **vars(sample_content), **changes}
        return write_bundle(path, **content)

    return write
