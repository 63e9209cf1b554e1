import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.common.launch import CellError, Launcher


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path)


def test_figures_are_the_last_line(launcher: Launcher) -> None:
    ran = launcher.run(python("print('remark'); print('{\"a\": 1}')"), variables={})
    assert ran.figures == {"a": 1}


def test_the_first_output_comes_before_the_end(launcher: Launcher) -> None:
    ran = launcher.run(python("import time; print('{}', flush=True); time.sleep(0.3)"), variables={})
    assert 0 < ran.first_output_s < ran.wall_s - 0.25


def test_a_command_may_print_nothing(launcher: Launcher) -> None:
    ran = launcher.run(python("pass"), variables={}, prints=False)
    assert ran.figures == {}
    assert 0 < ran.first_output_s <= ran.wall_s


def test_variables_reach_the_process(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GONE", "x")
    code = "import json, os; print(json.dumps({k: os.environ.get(k) for k in ('SET', 'GONE', 'HF_HUB_OFFLINE')}))"
    ran = launcher.run(python(code), variables={"SET": "1", "GONE": None})
    assert ran.figures == {"SET": "1", "GONE": None, "HF_HUB_OFFLINE": "1"}


def test_caches_of_a_process_are_its_own(launcher: Launcher, tmp_path: Path) -> None:
    first = launcher.caches("a/b", fresh=False)
    assert not first.warm
    assert set(first.variables()) == {"PIECEWORK_HOME", "TORCHINDUCTOR_CACHE_DIR", "TMPDIR"}
    assert all(Path(place).is_relative_to(tmp_path) for place in first.variables().values())
    kept = Path(first.variables()["TMPDIR"]) / "kept"
    kept.write_text("")
    assert launcher.caches("a/b", fresh=False).warm
    assert kept.exists()
    assert not launcher.caches("a/c", fresh=False).warm
    assert not launcher.caches("a/b", fresh=True).warm
    assert not kept.exists()
    assert kept.parent.is_dir()


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import sys; print('why', file=sys.stderr); sys.exit(3)", "exit code 3: why"),
        ("pass", "it printed nothing"),
        ("print('no json')", "no JSON object in its last line: no json"),
        ("print('[1]')", "no JSON object in its last line: \\[1\\]"),
    ],
)
def test_failures(launcher: Launcher, code: str, found: str) -> None:
    with pytest.raises(CellError, match=found):
        launcher.run(python(code), variables={})


def test_a_process_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    note = tmp_path / "child"
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(note)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(CellError, match="no end after 1 s"):
        Launcher(tmp_path, timeout_s=1.0).run(python(code), variables={})
    deadline = time.monotonic() + 10
    while _runs(int(note.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_interrupt_ends_the_process(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*args: object, **kwargs: object) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **kwargs))
        return started[-1]

    def clock() -> float:
        if started:
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr("benchmarks.common.launch.subprocess.Popen", start)
    monkeypatch.setattr("benchmarks.common.launch.time.perf_counter", clock)
    with pytest.raises(KeyboardInterrupt):
        launcher.run(python("import time; print('begun', flush=True); time.sleep(60)"), variables={})
    assert started[0].returncode is not None


def test_nothing_is_left_of_the_log(launcher: Launcher, tmp_path: Path) -> None:
    launcher.run(python(f"print({json.dumps('{}')})"), variables={})
    assert list(tmp_path.iterdir()) == []
