import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from piecework.bundle import (
    Asked,
    Fact,
    check,
    config_facts,
    environment_facts,
    option_facts,
    require,
    source_facts,
)
from piecework.bundle import facts as facts_module
from piecework.bundle.facts import NOT_INSTALLED, longest_text, making_facts, package_version
from piecework.errors import StaleBundle
from piecework.foundation.target import make_target

SMALL = make_target("x86_64", system="linux", flags=frozenset({"sse2", "avx", "avx2", "fma"}))
LARGE = make_target("x86_64", system="linux", flags=frozenset({"sse2", "avx", "avx2", "fma", "f16c"}))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package on the search path whose import would fail."""
    root = tmp_path / "pwsample"
    (root / "sub").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (root / "sub" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (root / "sub" / "code.py").write_text("value = 1\n")
    (tmp_path / "pwmodule.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return root


def test_environment_facts_hold_here() -> None:
    facts = environment_facts()
    assert [(fact.kind, fact.name) for fact in facts] == [
        ("piecework", "format"),
        ("target", "isa"),
        ("target", "machine"),
        ("target", "system"),
        ("torch", "version"),
    ]
    assert check(facts) == ()


def test_every_environment_fact_is_compared() -> None:
    for fact in environment_facts():
        value = 0 if fact.name == "format" else "other: nosuchflag"
        differences = check([Fact(fact.kind, fact.name, value)])
        assert [difference.fact.name for difference in differences] == [fact.name]


def test_all_differences_are_named_with_both_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts_module, "package_version", lambda name: {"torch": "2.12.0"}[name])
    with pytest.raises(StaleBundle) as caught:
        require(
            [
                Fact("torch", "version", "2.13.0"),
                Fact("target", "machine", "aarch64"),
                Fact("target", "isa", LARGE.fact),
            ],
            what="load it",
            target=SMALL,
        )
    assert "torch version: bundle 2.13.0, here 2.12.0" in caught.value.found
    assert "target machine: bundle aarch64, here x86_64" in caught.value.found
    assert "this CPU lacks f16c" in caught.value.found
    assert caught.value.differing[0] == ("torch version", "2.13.0", "2.12.0")
    assert len(caught.value.differing) == 3
    assert caught.value.asked == "load it"


def test_code_for_a_lesser_cpu_runs_on_a_better_one() -> None:
    assert check([Fact("target", "isa", SMALL.fact)], target=LARGE) == ()
    assert len(check([Fact("target", "isa", LARGE.fact)], target=SMALL)) == 1


def test_what_the_caller_expects_is_compared() -> None:
    facts = option_facts({"dtype": "float32", "tokens": 8})
    assert check(facts) == ()
    assert check(facts, asked=Asked(facts)) == ()
    differences = check(facts, asked=Asked(option_facts({"dtype": "bfloat16", "new": True})))
    assert [str(difference) for difference in differences] == [
        "option dtype: bundle float32, here bfloat16",
        "option new: bundle nothing, here True (the bundle doesn't say)",
    ]


def test_fields_that_were_read_are_compared_and_others_are_not() -> None:
    config = {"a": 1, "b": None, "rope": {"y": 2.0, "x": [1]}, "unread": 5}
    facts = config_facts(config, ["a", "b", "rope", "missing"])
    assert check(facts) == ()
    for same in (config, {**config, "unread": 6}, {**config, "rope": {"x": [1], "y": 2.0}}, {**config, "new": 1}):
        assert check(facts, asked=Asked(config=same)) == ()
    for changed, said in (
        ({"a": 2}, "config a: bundle 1, here 2"),
        ({"b": 0}, "config b: bundle nothing, here 0"),
        ({"missing": None}, "config missing: bundle not in config.json, here nothing"),
        ({"rope": {"x": [1]}}, 'config rope: bundle {"x":[1],"y":2.0}, here {"x":[1]}'),
    ):
        assert [str(d) for d in check(facts, asked=Asked(config={**config, **changed}))] == [said]
    [difference] = check(facts, asked=Asked(config={k: v for k, v in config.items() if k != "a"}))
    assert str(difference) == "config a: bundle 1, here not in config.json"


def test_whoever_would_make_it_anew_has_the_same_code_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    here, setting = Asked(as_made_here=True), "TORCHINDUCTOR_EMULATE_PRECISION_CASTS"
    monkeypatch.delenv(setting, raising=False)
    plain = making_facts()
    assert check(plain, asked=here) == ()
    assert check([Fact("piecework", "code", "0" * 64)]) == ()
    [difference] = check([Fact("piecework", "code", "0" * 64)], asked=here)
    assert difference.fact.label == "piecework code"
    monkeypatch.setenv(setting, "1")
    changed = making_facts()
    assert Fact("setting", setting, "1") in changed
    assert check(changed, asked=here) == ()
    assert [str(d) for d in check(plain, asked=here)] == [
        f"setting {setting}: bundle nothing, here 1 (the bundle doesn't say)"
    ]
    for unrelated in (
        "TORCHINDUCTOR_CACHE_DIR",
        "TORCHINDUCTOR_COMPILE_THREADS",
        "TORCHINDUCTOR_NO_SUCH_THING",
        "MY_VARIABLE",
    ):
        monkeypatch.setenv(unrelated, "2")
    assert check(changed, asked=here) == ()
    monkeypatch.delenv(setting)
    assert [str(d) for d in check(changed, asked=here)] == [f"setting {setting}: bundle 1, here nothing"]


def test_a_text_is_not_the_json_that_it_looks_like() -> None:
    for value, text in (([1], "[1]"), ({"a": 1}, '{"a":1}'), (None, "null")):
        [difference] = check(config_facts({"a": value}, ["a"]), asked=Asked(config={"a": text}))
        assert difference.fact.name == "a"
    [absent] = check(config_facts({}, ["a"]), asked=Asked(config={"a": "not in config.json"}))
    assert absent.fact.value == "not in config.json"


def test_less_may_be_asked_for_than_there_is_at_most() -> None:
    facts = (longest_text(64),)
    assert check(facts) == ()
    assert check(facts, asked=Asked((longest_text(64),))) == check(facts, asked=Asked((longest_text(8),))) == ()
    assert [str(d) for d in check(facts, asked=Asked((longest_text(65),)))] == [
        "most text tokens: bundle 64, here 65",
    ]
    assert len(check((), asked=Asked((longest_text(8),)))) == 1


@pytest.mark.parametrize(("recorded", "wanted"), [(1, True), (1, 1.0), (0, None), ("1", 1)])
def test_values_of_other_types_differ(recorded: object, wanted: object) -> None:
    assert len(check([Fact("option", "o", recorded)], asked=Asked((Fact("option", "o", wanted),)))) == 1  # type: ignore[arg-type]


def test_source_facts_name_the_package_not_the_place(package: Path, tmp_path: Path) -> None:
    code = package / "sub" / "code.py"
    facts = source_facts([code, str(code), tmp_path / "pwmodule.py", "<string>", tmp_path / "missing.py"])
    assert [(fact.kind, fact.name) for fact in facts] == [
        ("source", "pwmodule.py"),
        ("source", "pwsample/sub/code.py"),
    ]
    assert check(facts) == ()
    assert "pwsample" not in sys.modules


def test_a_changed_source_file_is_stale(package: Path) -> None:
    code = package / "sub" / "code.py"
    facts = source_facts([code])
    code.write_text("value = 2\n")
    [difference] = check(facts)
    assert str(difference).startswith("source pwsample/sub/code.py: bundle ")
    code.unlink()
    [difference] = check(facts)
    assert "no such file" in str(difference)


def test_a_package_that_is_not_installed_changes_nothing() -> None:
    assert check([Fact("source", "nosuchpackage/code.py", "ab" * 32), Fact("source", "nosuchmodule.py", "cd")]) == ()


def test_a_file_outside_every_package_gives_no_fact(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("")
    assert source_facts([tmp_path / "script.py"]) == ()


def test_this_library_is_found_by_its_name() -> None:
    [fact] = source_facts([facts_module.__file__])
    assert fact.name == "piecework/bundle/facts.py"


def test_unknown_kinds_hold() -> None:
    assert check([Fact("weather", "here", "fine")]) == ()


@pytest.mark.parametrize("name", ["torch", "huggingface-hub", "huggingface_hub", "PyYAML", "no-such-package", ""])
def test_versions_are_those_of_the_packages_metadata(name: str) -> None:
    try:
        expected = importlib.metadata.version(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        expected = NOT_INSTALLED
    assert package_version(name) == expected


def test_versions_need_no_metadata_library() -> None:
    code = "import sys; from piecework.bundle.facts import package_version; package_version('torch'); "
    code += "print('importlib.metadata' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
