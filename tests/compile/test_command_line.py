"""What was compiled by command is found by command; tests/smoke goes from a cold compile to text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import piecework

MODEL = Path(piecework.__file__).parent / "demo_model"


@pytest.mark.slow
def test_generate_finds_what_was_compiled_with_the_same_options(
    tmp_path: Path, new_home: Callable[[Path], Path]
) -> None:
    environment = {**os.environ, "PIECEWORK_HOME": str(new_home(tmp_path / "home"))}
    options = ["--backend", "eager", "--max-tokens", "64", "--ranges", "1,2:64", "--without-pass", "merge_linear"]

    def run(command: str, *arguments: str, model: str = str(MODEL), code: int = 0) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "piecework", command, model, *arguments, "--json"]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    made = json.loads(run("compile", *options).stdout)
    prompt = ["--prompt", "The for statement", "--max-new-tokens", "2"]
    hit = run("generate", *prompt, *options)
    assert (json.loads(hit.stdout)["bundle"], hit.stderr) == (made["bundle"], "")
    miss = run("generate", *prompt, *options[:-2])
    assert json.loads(miss.stdout)["bundle"] != made["bundle"]
    why = "the nearest differs: option passes_off: bundle merge_linear, here nothing: compiling one"
    assert miss.stderr.splitlines()[0].endswith(why)

    why_not = json.loads(run("why", "--max-tokens", "64", "--backend", "eager", "--no-pieces", code=1).stdout)
    assert not why_not["hit"]
    assert [d["fact"] for d in why_not["nearest"][0]["differing"]] == ["option ranges"]
    assert json.loads(run("why", *options).stdout)["bundle"] == made["bundle"]

    stored = json.loads(run("store", model="ls").stdout)["items"]
    assert Path(made["bundle"]).name in {item["key"] for item in stored}
    assert json.loads(run("store", model="verify").stdout)["items"] == []
    assert json.loads(run("store", "--older-than", "1s", model="gc").stdout)["items"] == [], "it was used just now"
    run("store", Path(made["bundle"]).name, model="rm")
    missing = json.loads(run("why", *options, code=1).stdout)
    assert (missing["artifacts"]["stored"] > 0, missing["artifacts"]["to_compile"]) == (True, 0)
    run("store", "no-such-key", model="rm", code=1)


@pytest.mark.slow
def test_a_machine_starts_from_what_another_one_signed_and_pushed(
    tmp_path: Path, new_home: Callable[[Path], Path]
) -> None:
    remote, secret = f"file://{tmp_path}/remote", tmp_path / "secret"
    options = ["--backend", "eager", "--max-tokens", "64"]

    def run(home: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PIECEWORK_HOME": str(new_home(tmp_path / home)), **variables}
        command = [sys.executable, "-m", "piecework", *words, "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    made = json.loads(run("first", "compile", str(MODEL), *options).stdout)
    key = Path(made["bundle"]).name
    run("first", "store", "keygen", str(secret))
    run("first", "store", "push", remote)
    generate = ["generate", str(MODEL), "--prompt", "The for statement", "--max-new-tokens", "2", *options]
    elsewhere = {"PIECEWORK_REMOTE": remote, "PIECEWORK_TRUST": f"{secret}.pub"}

    unsigned = run("second", *generate, **elsewhere)
    assert "it is not signed" in unsigned.stderr.splitlines()[0]
    assert "compiling one" in unsigned.stderr
    own = run("second", *generate, **elsewhere)
    assert (own.stderr, json.loads(own.stdout)["bundle"]) == ("", json.loads(unsigned.stdout)["bundle"])

    run("first", "store", "sign", key, "--key", str(secret))
    run("first", "store", "push", remote)
    fetched = run("third", *generate, **elsewhere)
    assert fetched.stderr == f"took the bundle from {remote}\n"
    assert Path(json.loads(fetched.stdout)["bundle"]).name == key
    shutil.rmtree(tmp_path / "remote")
    assert run("third", *generate, **elsewhere).stderr == ""
