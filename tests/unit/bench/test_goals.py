import pytest

from piecework.bench.goals import check_goals, check_throughput_goals
from piecework.bench.measurements import Key, Row


def row(
    system: str, layers: int, metric: str, value: float, *, dtype: str = "bfloat16", batch: int | None = None
) -> Row:
    return Row(Key(system, layers, metric, dtype, batch), value, n=1, min=value, max=value)


def texts(rows: list[Row]) -> list[str]:
    return [str(goal) for goal in check_goals(rows)]


def test_cold_is_held_against_few_layers_and_the_peers() -> None:
    rows = [
        row("piecework", 4, "cold_s", 10.0),
        row("piecework", 80, "cold_s", 12.0),
        row("vllm", 4, "cold_s", 1.0),
        row("vllm", 80, "cold_s", 60.0),
        row("torch_compile", 80, "cold_s", 20.0),
        row("torch_compile", 80, "cold_s", 1.0, dtype="float32"),
    ]
    assert texts(rows) == [
        "cold_s ÷ that at 4 layers = 1.2 (≤ 1.15: MISSED)",
        "cold_s ÷ vllm's = 0.2 (≤ 0.3: met)",
        "cold_s ÷ torch_compile's = 0.6 (≤ 0.5: MISSED)",
    ]


def test_one_number_of_layers_has_no_ratio() -> None:
    assert texts([row("piecework", 4, "cold_s", 10.0), row("piecework", 4, "bundle_mb", 1.0)]) == []


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("load_ms", 60.0, "load_ms = 60 (≤ 60: met)"),
        ("load_ms", 60.5, "load_ms = 60.5 (≤ 60: MISSED)"),
        ("rss_mb", 24.0, "rss_mb = 24 (≤ 60: met)"),
        ("bundle_mb", 1.2, "bundle_mb ÷ that at 4 layers = 1.2 (≤ 1.1: MISSED)"),
        ("unique_pieces", 1.0, "unique_pieces ÷ that at 4 layers = 1 (≤ 1: met)"),
    ],
)
def test_goals_at_the_most_layers(metric: str, value: float, text: str) -> None:
    assert texts([row("piecework", 4, metric, 1.0), row("piecework", 80, metric, value)]) == [text]


def test_the_first_token_is_held_against_the_import_beside_it() -> None:
    rows = [row("piecework", 80, "import_torch_s", 1.5), row("piecework", 80, "first_token_s", 2.5)]
    assert texts(rows) == [
        "first_token_s = 2.5 (≤ 3: met)",
        "first_token_s − import_torch_s = 1 (≤ 0.7: MISSED)",
    ]
    assert texts(rows[1:]) == ["first_token_s = 2.5 (≤ 3: met)"]


def test_steps_are_compared_for_every_model_and_batch() -> None:
    rows = [row("piecework", layers, "step_ms", 1.0, batch=batch) for layers in (4, 80) for batch in (1, 32)] + [
        row("torch_compile", 4, "step_ms", 2.0, batch=1),
        row("torch_compile", 80, "step_ms", 0.5, batch=32),
    ]
    found = [(goal.key.layers, goal.key.batch, goal.met) for goal in check_goals(rows)]
    assert found == [(4, 1, True), (80, 32, False)]


def test_goals_as_json() -> None:
    (goal,) = check_goals([row("piecework", 80, "load_ms", 12.34567)])
    assert goal.to_json() == {
        "goal": "load_ms",
        "layers": 80,
        "dtype": "bfloat16",
        "value": 12.3457,
        "bound": "at_most",
        "limit": 60.0,
        "met": True,
    }


def test_no_goals_for_others() -> None:
    assert check_goals([row("vllm", 80, "load_ms", 1.0), row("eager", 80, "first_token_s", 9.0)]) == ()


def test_throughput_is_held_against_vllm_in_the_same_run() -> None:
    rows = [
        row("piecework", 12, "output_tok_s", 110.0, batch=32),
        row("vllm", 12, "output_tok_s", 100.0, batch=32),
        row("piecework", 12, "total_tok_s", 330.0, batch=32),
        row("vllm", 12, "total_tok_s", 300.0, batch=32),
        row("piecework", 12, "one_request_tok_s", 119.0, batch=1),
        row("vllm", 12, "one_request_tok_s", 100.0, batch=1),
        row("piecework", 12, "first_token_s", 2.0),
        row("vllm", 12, "first_token_s", 10.0),
        row("piecework", 12, "cold_s", 99.0),
        row("vllm", 12, "cold_s", 1.0),
    ]
    goals = check_throughput_goals(rows)
    assert [str(goal) for goal in goals] == [
        "output_tok_s ÷ vllm's = 1.1 (≥ 1: met; aim 1.2: missed)",
        "one_request_tok_s ÷ vllm's = 1.19 (≥ 1.2: MISSED)",
        "first_token_s ÷ vllm's = 0.2 (≤ 0.2: met)",
    ]
    assert goals[0].to_json() == {
        "goal": "output_tok_s ÷ vllm's",
        "layers": 12,
        "dtype": "bfloat16",
        "batch": 32,
        "value": 1.1,
        "bound": "at_least",
        "limit": 1.0,
        "met": True,
        "aim": 1.2,
        "aim_met": False,
    }


def test_throughput_without_vllm_has_no_goals() -> None:
    assert check_throughput_goals([row("piecework", 12, "output_tok_s", 1.0, batch=32)]) == ()
    other = row("vllm", 12, "output_tok_s", 1.0, batch=8)
    assert check_throughput_goals([row("piecework", 12, "output_tok_s", 1.0, batch=32), other]) == ()
