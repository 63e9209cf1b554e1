import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from piecework.errors import PieceworkError
from piecework.foundation.environment import (
    Environment,
    child_variables,
    let_idle_threads_sleep,
    let_torch_cache_in,
    read_environment,
)
from piecework.foundation.flight import OVERTAKE_S


@pytest.mark.parametrize(
    ("variables", "root"),
    [
        ({"PIECEWORK_HOME": "/p", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/p"),
        ({"PIECEWORK_HOME": "", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/piecework"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/piecework"),
        ({"HOME": "/h"}, "/h/.cache/piecework"),
    ],
)
def test_store_root(variables: dict[str, str], root: str) -> None:
    keys = Path("/h/.config/piecework/trusted_keys")
    assert read_environment(variables) == Environment(store_root=Path(root), default_keys=keys)


def test_relative_home_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_environment({"PIECEWORK_HOME": "here"}).store_root == tmp_path / "here"


def test_without_home_the_user_database_says() -> None:
    assert read_environment({}).store_root.is_absolute()


def test_compiler() -> None:
    assert read_environment({"HOME": "/h", "CXX": "clang++ -v"}).compiler == "clang++ -v"
    assert read_environment({"HOME": "/h", "CXX": ""}).compiler is None


def test_seconds_until_another_is_overtaken() -> None:
    assert read_environment({"HOME": "/h", "PIECEWORK_OVERTAKE_S": "7.5"}).overtake_s == 7.5
    assert read_environment({"HOME": "/h", "PIECEWORK_OVERTAKE_S": "inf"}).overtake_s == math.inf
    assert read_environment({"HOME": "/h", "PIECEWORK_OVERTAKE_S": ""}).overtake_s == OVERTAKE_S


@pytest.mark.parametrize("text", ["-1", "nan", "soon"])
def test_what_is_no_number_of_seconds(text: str) -> None:
    with pytest.raises(PieceworkError, match="PIECEWORK_OVERTAKE_S"):
        read_environment({"HOME": "/h", "PIECEWORK_OVERTAKE_S": text})


def test_torchs_cache_lies_where_we_say_unless_the_user_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    for place in (tmp_path / "one", tmp_path / "two"):
        let_torch_cache_in(place)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "one" / "inductor")


def test_trust_and_remote() -> None:
    read = read_environment({"HOME": "/h", "PIECEWORK_TRUST": "/keys", "PIECEWORK_REMOTE": "s3://bucket/x"})
    assert (read.trust, read.remote) == (Path("/keys"), "s3://bucket/x")
    read = read_environment({"HOME": "/h", "PIECEWORK_TRUST": "", "PIECEWORK_REMOTE": ""})
    assert (read.trust, read.remote) == (None, None)


def test_trust_may_be_required_by_a_word() -> None:
    default = Path("/h/.config/piecework/trusted_keys")
    assert read_environment({"HOME": "/h", "PIECEWORK_TRUST": "require"}).trust == default
    configured = read_environment({"HOME": "/h", "XDG_CONFIG_HOME": "/etc/x", "PIECEWORK_TRUST": "require"})
    assert configured.trust == Path("/etc/x/piecework/trusted_keys")
    read = read_environment({"HOME": "/h", "XDG_CONFIG_HOME": "relative"})
    assert (read.trust, read.keys_file("require"), read.keys_file(Path("/keys"))) == (None, default, Path("/keys"))
    with pytest.raises(PieceworkError, match="no home directory"):
        replace(read, default_keys=None).keys_file("require")


def test_reads_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIECEWORK_HOME", "/somewhere")
    assert read_environment().store_root == Path("/somewhere")


def test_child_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIECEWORK_TEST_KEPT", "kept")
    monkeypatch.setenv("PIECEWORK_TEST_GONE", "gone")
    child = child_variables({"PIECEWORK_TEST_GONE": None, "PIECEWORK_TEST_NEW": "new", "PIECEWORK_TEST_NEVER": None})
    assert child["PIECEWORK_TEST_KEPT"] == "kept"
    assert child["PIECEWORK_TEST_NEW"] == "new"
    assert "PIECEWORK_TEST_GONE" not in child


def test_without_any_home_it_is_a_directory_of_this_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user id has no entry: `~` stays as it is."""
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    root = read_environment({}).store_root
    assert root.is_absolute()
    assert "~" not in str(root)
    assert str(os.getuid()) in root.name


@pytest.mark.parametrize(("given", "spins"), [({}, "1000"), ({"OMP_WAIT_POLICY": "active"}, None)])
def test_idle_threads_sleep_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], spins: str | None
) -> None:
    variables = dict(given)
    monkeypatch.setattr("os.environ", variables)
    let_idle_threads_sleep()
    assert variables.get("GOMP_SPINCOUNT") == spins
    variables["GOMP_SPINCOUNT"] = "7"
    let_idle_threads_sleep()
    assert variables["GOMP_SPINCOUNT"] == "7"
