"""The process that compiles pieces: `python -m piecework.compiler.backends.worker`.

It imports Inductor once and forks a child for every job, so that a crash ends one job, memory is given back, and no
state leaks between pieces. It reads one JSON object per line from stdin ({"job": id, "work": …, "directory": …}) and
writes one per event to stdout ({"event": "ready" | "start" | "done" | "failed", …}). When stdin ends it ends, and so do
its children.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import json
import os
import select
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from piecework.compiler.backends.toolchain import Toolchain
from piecework.errors import InternalError, PieceworkError
from piecework.foundation.process import python_command
from piecework.foundation.target import read_target

_COLLECT_EVERY = 50_000  # objects more than before; Inductor makes some hundred thousand of them for a piece


@dataclass
class _Child:
    """A forked compile and the pipe that its answer comes through."""

    job: str
    pid: int
    pipe: int
    answer: bytes = b""


def main() -> int:
    """Serve compile jobs until stdin ends."""
    parser = argparse.ArgumentParser(prog="piecework.compiler.backends.worker")
    parser.add_argument("--toolchain", type=Path, required=True)
    parser.add_argument("--compiler", required=True)
    parser.add_argument("--compiler-version", required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--overtake-s", type=float, required=True)
    parser.add_argument("--single", action="store_true", help="compile the one job on stdin and answer on stdout")
    args = parser.parse_args()
    if not args.single:
        _end_with_input()
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what torch or the compiler print must not mix with the events
    target = read_target()
    toolchain = Toolchain(args.toolchain, args.compiler, args.compiler_version, args.overtake_s, target.compiler_flags)
    gc.disable()  # collecting walks all of torch and Inductor in vain while they are imported: a quarter of that time
    # they import torch, which must come after that
    from piecework.compiler.backends.aoti import warm_up  # noqa: PLC0415
    from piecework.foundation import torch_private  # noqa: PLC0415

    torch_private.set_inductor_options(trust_isa=True, vector_bits=256 if target.isa == "avx2" else None)
    if args.single:
        _send(events, _compile(json.loads(sys.stdin.readline()), toolchain=toolchain))
        return 0
    torch_private.warm_up_inductor()
    try:
        warm_up(directory=args.scratch)
    except Exception as error:  # noqa: BLE001  only a warm-up: the jobs will tell what is wrong
        _send(events, {"event": "note", "text": f"warm-up: {type(error).__name__}: {error}"[:300]})
    gc.freeze()  # children collect what is their own, and leave pages shared
    _send(events, {"event": "ready"})
    _serve(events, toolchain=toolchain, limit=args.jobs)
    return 0


def _end_with_input() -> None:
    """End at once, with the whole group, when the driver is gone: while torch is imported, or a child's g++ runs."""

    def look(*_: object) -> None:
        hangup = select.poll()  # one of its own: a signal may come while another one is looked at
        hangup.register(0, select.POLLHUP)
        if any(event & select.POLLHUP for _, event in hangup.poll(0)):
            os.killpg(0, signal.SIGKILL)

    signal.signal(signal.SIGIO, look)
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    look()  # it may have gone before


def _send(events: TextIO, event: Mapping[str, Any]) -> None:
    events.write(json.dumps(event) + "\n")


def _serve(events: TextIO, *, toolchain: Toolchain, limit: int) -> None:
    waiting: deque[dict[str, Any]] = deque()
    running: dict[int, _Child] = {}
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    buffered = b""
    open_input = True
    while open_input or running or waiting:
        while waiting and len(running) < limit:
            request = waiting.popleft()
            child = _start(request, toolchain=toolchain, events=events)
            running[child.pipe] = child
            selector.register(child.pipe, selectors.EVENT_READ)
            _send(events, {"event": "start", "job": child.job, "pid": child.pid})
        for key, _ in selector.select():
            if key.fd == 0:
                chunk = os.read(0, 1 << 16)
                if not chunk:
                    open_input = False
                    selector.unregister(0)
                    waiting.clear()
                    for child in running.values():
                        os.kill(child.pid, signal.SIGKILL)
                buffered += chunk
                *lines, buffered = buffered.split(b"\n")
                waiting.extend(json.loads(line) for line in lines if line.strip())
            else:
                child = running[key.fd]
                chunk = os.read(child.pipe, 1 << 16)
                child.answer += chunk
                if not chunk:
                    selector.unregister(child.pipe)
                    os.close(child.pipe)
                    del running[child.pipe]
                    _send(events, _finish(child))


def _start(request: Mapping[str, Any], *, toolchain: Toolchain, events: TextIO) -> _Child:
    if any(spec[3] == "cuda" for spec in request["work"]["program"]["inputs"]):
        return _start_alone(request)
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid:
        os.close(sending)
        return _Child(job=request["job"], pid=pid, pipe=receiving)
    os.close(receiving)
    os.close(0)
    os.close(events.fileno())  # the driver sees the worker's death by the end of its events
    code = 1
    try:
        answer = json.dumps(_compile(request, toolchain=toolchain)).encode()
        while answer:
            answer = answer[os.write(sending, answer) :]
        code = 0
    finally:
        os._exit(code)


def _start_alone(request: Mapping[str, Any]) -> _Child:
    """Compile in a new process instead of a fork: CUDA can't be used in a fork of a process that has touched it."""
    receiving, sending = os.pipe()
    process = subprocess.Popen(
        python_command("piecework.compiler.backends.worker", *sys.argv[1:], "--single"),
        stdin=subprocess.PIPE,
        stdout=sending,
        text=True,
    )
    os.close(sending)
    assert process.stdin is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.close()
    return _Child(job=request["job"], pid=process.pid, pipe=receiving)


def _compile(request: Mapping[str, Any], *, toolchain: Toolchain) -> dict[str, Any]:
    from piecework.compiler.backends.aoti import compile_piece  # noqa: PLC0415  see `main`
    from piecework.compiler.job import Job  # noqa: PLC0415

    directory = Path(request["directory"])
    begun = time.perf_counter()
    gc.set_threshold(_COLLECT_EVERY)
    gc.enable()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        library = compile_piece(Job.from_json(request["work"]), directory=directory, toolchain=toolchain)
        return {"event": "done", "path": str(library), "seconds": time.perf_counter() - begun}
    except PieceworkError as error:
        return {"event": "failed", **error.to_json(), "trace": traceback.format_exc()}
    except Exception as error:  # noqa: BLE001  the driver reports it
        bug = InternalError(f"{type(error).__name__}: {error}")
        return {"event": "failed", "error": "InternalError", "found": str(bug), "trace": traceback.format_exc()}


def _finish(child: _Child) -> dict[str, Any]:
    _, status = os.waitpid(child.pid, 0)
    if child.answer and os.WIFEXITED(status):
        return {"job": child.job, **json.loads(child.answer)}
    how = (
        f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit code {os.waitstatus_to_exitcode(status)}"
    )
    return {"job": child.job, "event": "failed", "error": "CompileError", "found": f"the compile ended with {how}"}


if __name__ == "__main__":
    sys.exit(main())
