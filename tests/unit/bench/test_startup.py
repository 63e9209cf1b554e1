from pathlib import Path

import pytest

from piecework.bench.launch import CellError, Launcher
from piecework.bench.measurements import Sample
from piecework.bench.startup import SYSTEMS, Cell, StartupSettings, make_systems, run_cells, schedule, warm_up
from piecework.bench.systems.base import Case, Phase, System
from piecework.bench.systems.vllm import Peers

CASES = [Case(Path("m"), layers, dtype, 16) for dtype in ("float32", "bfloat16") for layers in (4, 80)]


class FakeSystem(System):
    def __init__(self, name: str, *, failing: bool = False, dtypes: tuple[str, ...] = (), **rounds: int) -> None:
        super().__init__(name, rounds={Phase[phase]: count for phase, count in rounds.items()}, dtypes=dtypes)
        self.failing = failing
        self.measured: list[tuple[Phase, Case, int]] = []

    def warm_up(self, case: Case) -> None:
        if self.failing:
            raise CellError(asked="a", found="broken", try_="t")

    def measure(self, phase: Phase, case: Case, *, batch: int) -> list[Sample]:
        self.measured.append((phase, case, batch))
        if self.failing:
            raise CellError(asked="a", found="broken", try_="t")
        return [self.sample(case, "cold_s", float(len(self.measured)))]


def test_systems_take_turns_and_models_too() -> None:
    a, b = FakeSystem("a", COLD=2, STEPS=1), FakeSystem("b", COLD=1, STEPS=1)
    cells = [str(cell) for cell in schedule([a, b], CASES[:2], batches=(1, 32), repeats=2)]
    assert cells == [
        "cold: a, 4 layers, float32",
        "cold: b, 4 layers, float32",
        "cold: a, 80 layers, float32",
        "cold: b, 80 layers, float32",
        "steps: a, 4 layers, float32, batch 1",
        "steps: b, 4 layers, float32, batch 1",
        "steps: a, 4 layers, float32, batch 32",
        "steps: b, 4 layers, float32, batch 32",
        "steps: a, 80 layers, float32, batch 1",
        "steps: b, 80 layers, float32, batch 1",
        "steps: a, 80 layers, float32, batch 32",
        "steps: b, 80 layers, float32, batch 32",
        "cold: a, 4 layers, float32",
        "cold: a, 80 layers, float32",
    ]


def test_a_system_of_one_dtype() -> None:
    cells = list(schedule([FakeSystem("a", COLD=1, dtypes=("bfloat16",))], CASES, batches=(1,), repeats=1))
    assert [cell.case.dtype for cell in cells] == ["bfloat16", "bfloat16"]


def test_a_failure_is_noted_and_not_tried_again() -> None:
    good, bad = FakeSystem("good", COLD=2), FakeSystem("bad", failing=True, COLD=2)
    shown: list[tuple[str, int, int]] = []
    cells = list(schedule([good, bad], CASES[:1], batches=(1,), repeats=2))
    result = run_cells(cells, on_progress=lambda *what: shown.append(what))
    assert [(row.key.system, row.value, row.n) for row in result.rows] == [("good", 1.5, 2)]
    assert result.notes == ("cold: bad, 4 layers, float32 failed: broken",)
    assert result.failed == {"bad"}
    assert len(bad.measured) == 1
    assert [(done, total) for _, done, total in shown] == [(0, 4), (1, 4), (2, 4)]


def test_another_model_is_still_tried() -> None:
    bad = FakeSystem("bad", failing=True)
    result = run_cells([Cell(bad, Phase.COLD, case) for case in CASES[:2]], on_progress=lambda *what: None)
    assert len(bad.measured) == len(result.notes) == 2


def test_a_failed_warm_up_is_a_note() -> None:
    notes = warm_up([FakeSystem("a"), FakeSystem("b", failing=True)], CASES[0], on_progress=lambda *what: None)
    assert notes == ("warming up b failed: broken",)


def test_systems_of_the_settings(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    peers = Peers(Path("python"), "1", Path("script"), Path("root"))
    assert [system.name for system in make_systems(StartupSettings(peers=peers), launcher)] == list(SYSTEMS)
    assert [system.name for system in make_systems(StartupSettings(), launcher)] == list(SYSTEMS[:-1])
    chosen = StartupSettings(systems=("eager", "piecework"))
    assert [system.name for system in make_systems(chosen, launcher)] == ["piecework", "eager"]


@pytest.mark.parametrize(
    ("name", "phase", "rounds"),
    [
        ("piecework", Phase.COLD, 3),
        ("piecework", Phase.STEPS, 3),
        ("torch_compile", Phase.COLD, 1),
        ("torch_compile", Phase.WARM, 0),
        ("torch_compile", Phase.STEPS, 3),
        ("torch_regional", Phase.STEPS, 1),
        ("eager", Phase.COLD, 0),
        ("eager", Phase.WARM, 3),
        ("vllm", Phase.COLD, 1),
        ("vllm", Phase.WARM, 3),
        ("vllm", Phase.STEPS, 0),
    ],
)
def test_rounds(name: str, phase: Phase, rounds: int, tmp_path: Path) -> None:
    settings = StartupSettings(systems=(name,), peers=Peers(Path("python"), "1", Path("script"), Path("root")))
    (system,) = make_systems(settings, Launcher(tmp_path))
    taken = [system.takes_part(phase, round_number=number, dtype="bfloat16") for number in range(4)]
    assert sum(taken) == rounds
    assert not taken[3]


def test_vllm_is_measured_in_one_dtype(tmp_path: Path) -> None:
    peers = Peers(Path("python"), "1", Path("script"), Path("root"))
    for dtypes, expected in ((("float32", "bfloat16"), "bfloat16"), (("float32",), "float32")):
        (system,) = make_systems(StartupSettings(dtypes=dtypes, systems=("vllm",), peers=peers), Launcher(tmp_path))
        taking = [d for d in dtypes if system.takes_part(Phase.COLD, round_number=0, dtype=d)]
        assert taking == [expected]
