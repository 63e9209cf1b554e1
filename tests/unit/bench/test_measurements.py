import json

import pytest

from piecework.bench.measurements import Key, Row, Sample, summarise

COLD = Key("piecework", 4, "cold_s", "float32")
STEP = Key("eager", 4, "step_ms", "float32", 32)


def test_a_row_per_key_with_median_and_spread() -> None:
    samples = [
        Sample(COLD, 3.0),
        Sample(STEP, 7.0, "first"),
        Sample(COLD, 1.0),
        Sample(COLD, 2.5),
        Sample(STEP, 8.0, "last"),
    ]
    assert summarise(samples) == (
        Row(COLD, 2.5, n=3, min=1.0, max=3.0),
        Row(STEP, 7.5, n=2, min=7.0, max=8.0, note="last"),
    )


def test_no_samples_no_rows() -> None:
    assert summarise([]) == ()


def test_a_row_as_json() -> None:
    assert Row(STEP, 7.123456, n=3, min=0.123456789, max=8.0, note="n").to_json() == {
        "system": "eager",
        "layers": 4,
        "metric": "step_ms",
        "dtype": "float32",
        "batch": 32,
        "value": 7.123,
        "unit": "ms",
        "n": 3,
        "min": 0.12346,
        "max": 8,
        "note": "n",
    }


def test_what_does_not_apply_is_left_out() -> None:
    row = Row(Key("vllm", 80, "pieces"), 81.0, n=1, min=81.0, max=81.0).to_json()
    assert not row.keys() & {"dtype", "batch", "note"}
    assert json.dumps(row["value"]) == "81"


@pytest.mark.parametrize(
    ("metric", "unit"), [("cold_s", "s"), ("load_ms", "ms"), ("rss_mb", "MiB"), ("pieces", ""), ("unique_pieces", "")]
)
def test_the_unit_is_in_the_name(metric: str, unit: str) -> None:
    assert Key("piecework", 4, metric).unit == unit
