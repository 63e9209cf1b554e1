"""Run another `piecework` command in a process of its own, and read its JSON."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, Final

from piecework.errors import CompileError
from piecework.foundation.environment import child_variables
from piecework.foundation.process import python_command

# Time for an interrupted child to end its workers and clean its store before it is killed.
_INTERRUPT_GRACE_S: Final = 15.0


def run_command(words: Sequence[str], *, what: str, variables: Mapping[str, str | None] | None = None) -> Any:
    """Run `piecework WORDS --json`, its progress going to our stderr, and return what it printed.

    Args:
        words: the command and its arguments.
        what: it is about, for the error.
        variables: changes to the environment.

    Raises CompileError where the command fails; its own message was shown before.
    """
    # The child shares our stderr, so that its own progress display is what the user sees. It has its own process group,
    # so that an interrupt comes to it once, from us, however it came to us.
    child = subprocess.Popen(
        python_command("piecework", *words, "--json", "--parent", str(os.getpid())),
        stdout=subprocess.PIPE,
        text=True,
        env=child_variables(variables or {}),
        process_group=0,
    )
    try:
        printed, _ = child.communicate()
    except BaseException:
        _end(child)
        raise
    if child.returncode:
        raise CompileError(
            asked=f"piecework {words[0]} of {what}",
            found=f"the command ended with code {child.returncode}; its message is above",
            try_="piecework doctor, which says what this machine lacks",
        )
    return json.loads(printed)


def _end(child: subprocess.Popen[str]) -> None:
    """Let the child end its workers and clean up, then make sure that it is gone."""
    child.terminate()
    try:
        child.wait(timeout=_INTERRUPT_GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
