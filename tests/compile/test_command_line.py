"""The command line from a cold compile to generated text, with the demo model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import piecework

MODEL = Path(piecework.__file__).parent / "demo_model"
_GENERATE = """
import json, sys
from piecework.cli.main import main
code = main(["generate", sys.argv[1], "--prompt", "The for statement is used to", "--max-new-tokens", "12"])
names = ("sympy", "triton", "transformers")
banned = [m for m in sys.modules if m.split(".")[0] in names or m.startswith(("torch._dynamo", "torch._inductor"))]
sys.stderr.write(json.dumps({"code": code, "banned": banned}))
"""


def test_text_comes_warm_without_a_compiler(home: Path) -> None:
    environment = {**os.environ, "PIECEWORK_HOME": str(home)}
    command = [sys.executable, "-m", "piecework", "compile", str(MODEL), "--json"]
    made = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert (made["layers"], made["pieces"], made["unique_pieces"]) == (6, 7, 3)
    again = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert (again["cached"], again["bundle"]) == (True, made["bundle"])
    # no compiler and no modelling code can be reached any more
    command = [sys.executable, "-c", _GENERATE, str(MODEL)]
    warm = subprocess.run(command, env={**environment, "PATH": ""}, capture_output=True, text=True, check=True)
    assert json.loads(warm.stderr) == {"code": 0, "banned": []}
    assert "iterate over the elements of a sequence" in warm.stdout


def test_generate_finds_what_was_compiled_with_the_same_options(tmp_path: Path) -> None:
    environment = {**os.environ, "PIECEWORK_HOME": str(tmp_path)}
    options = ["--backend", "eager", "--max-tokens", "64", "--ranges", "1,2:64", "--without-pass", "merge_linear"]

    def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "piecework", command, str(MODEL), *arguments, "--json"]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True)

    made = json.loads(run("compile", *options).stdout)
    prompt = ["--prompt", "The for statement", "--max-new-tokens", "2"]
    hit = run("generate", *prompt, *options)
    assert (json.loads(hit.stdout)["bundle"], hit.stderr) == (made["bundle"], "")
    miss = run("generate", *prompt, *options[:-2])
    assert json.loads(miss.stdout)["bundle"] != made["bundle"]
    why = "the nearest differs: option passes_off: bundle merge_linear, here nothing: compiling one"
    assert miss.stderr.splitlines()[0].endswith(why)
