"""`piecework bench serve`: against a stand-in, and against our own server."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from piecework.cli.main import main
from piecework.server.settings import Limits, ServerSettings
from tests.unit.bench.serving.stub_server import good_answer, stub_server
from tests.unit.server.fake import FakeService, ready
from tests.unit.server.live import live_server

SMALL = ["--requests", "8", "--lengths", "fixed", "--input", "5", "--output", "3"]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with stub_server(good_answer) as stub:
        assert main(["bench", "serve", stub.url, *SMALL]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("============ Serving Benchmark Result ============")
    assert "Successful requests:                     8\n" in printed
    assert "Total input tokens:                      40\n" in printed
    assert "Total generated tokens:                  24\n" in printed


def test_json_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    options = ["--rate", "200", "--concurrency", "4", "--seed", "5", "--api-key", "secret", "--json", "--out", str(out)]
    with stub_server(good_answer) as stub:
        assert main(["bench", "serve", stub.url, *SMALL, *options]) == 0
    printed = capsys.readouterr().out
    assert "secret" not in printed
    report = json.loads(printed)
    assert json.loads(out.read_text()) == report
    assert {"machine", "versions", "commit", "url", "model", "settings", "requests"} <= report.keys()
    assert (report["model"], report["completed"], report["failed"]) == ("stub-model", 8, 0)
    assert (report["total_input_tokens"], report["total_output_tokens"]) == (40, 24)
    assert report["settings"]["rate"] == 200.0
    assert report["settings"]["lengths"] == "fixed"
    assert len(report["requests"]) == 8
    for name in ("ttft", "tpot", "itl"):
        assert 0 <= report[f"median_{name}_ms"] <= report[f"p99_{name}_ms"]


def test_a_plot(tmp_path: Path) -> None:
    path = tmp_path / "plot.html"
    with stub_server(good_answer) as stub:
        assert main(["bench", "serve", stub.url, *SMALL, "--plot", str(path)]) == 0
    assert "stub-model, fixed lengths, rate inf: 8 requests;" in path.read_text()


def test_an_infinite_rate_is_json_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    with stub_server(good_answer) as stub:
        assert main(["bench", "serve", stub.url, *SMALL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["rate"] == "inf"


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize("lengths", ["random", "sharegpt"])
def test_our_own_server(endpoint: str, lengths: str, capsys: pytest.CaptureFixture[str]) -> None:
    service = FakeService(step_s=0.001)
    settings = ServerSettings(model_names=("fake",), api_key="key")
    with live_server(ready(service), settings) as url:
        options = ["--requests", "10", "--lengths", lengths, "--input", "20", "--output", "10", "--max-length", "200"]
        options += ["--vocab", "270", "--endpoint", endpoint, "--api-key", "key", "--json"]
        assert main(["bench", "serve", url, *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["completed"], report["errors"]) == ("fake", 10, {})
    sent = service.seen[1:]
    assert report["total_output_tokens"] == sum(generation.params.max_tokens for generation in sent)
    assert report["total_input_tokens"] == sum(len(generation.prompt) for generation in sent)
    assert all(generation.params.ignore_eos for generation in sent)
    assert report["mean_itl_ms"] > 0


def test_what_the_server_refuses_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ServerSettings(model_names=("fake",), limits=Limits(concurrent_requests=1))
    with live_server(ready(FakeService(step_s=0.05)), settings) as url:
        assert main(["bench", "serve", url, *SMALL, "--vocab", "270"]) == 0
    printed = capsys.readouterr().out
    assert "Failed requests:                         7\n" in printed
    assert "failed, 7 ×: HTTP 429: " in printed


def test_where_all_fail_the_exit_code_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with live_server(ready(FakeService()), ServerSettings(model_names=("fake",))) as url:
        assert main(["bench", "serve", url, *SMALL, "--vocab", "999", "--no-warm-up", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["completed"], report["failed"], sum(report["errors"].values())) == (0, 8, 8)


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "http://127.0.0.1:1", "--json"]) == 1
    assert "ConnectError" in json.loads(capsys.readouterr().out)["found"]


@pytest.mark.parametrize(
    "options",
    [
        ["--rate", "0"],
        ["--rate", "-1"],
        ["--rate", "nan"],
        ["--requests", "0"],
        ["--concurrency", "0"],
        ["--lengths", "other"],
        ["--input", "2000", "--output", "100"],
        ["--out", "no/such/directory/file"],
        ["--plot", "no/such/directory/file.html"],
    ],
)
def test_wrong_usage(options: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "serve", "http://127.0.0.1:1", *options])
    assert caught.value.code == 2


def test_an_installation_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "piecework.bench.serving.run":
            raise ModuleNotFoundError("No module named 'httpx'", name="httpx")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["bench", "serve", "http://127.0.0.1:1"]) == 1
    assert "pip install 'piecework[bench]'" in capsys.readouterr().err
