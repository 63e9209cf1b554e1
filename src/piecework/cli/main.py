"""The command `piecework`.

A command's module is imported when it is chosen, and no other: `piecework --help` needs neither torch nor them.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import platform
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Final, NoReturn

from piecework.cli import console
from piecework.cli.command_parser import CommandParser
from piecework.errors import PieceworkError
from piecework.foundation.environment import let_idle_threads_sleep
from piecework.foundation.files import as_store_error
from piecework.foundation.process import end_with_parent, exit_at_once
from piecework.foundation.version import VERSION

EXIT_FAILED: Final = 1

# What `piecework --help` says of each command; the modules `piecework.cli.<name>` say the rest.
COMMANDS: Final[Mapping[str, str]] = {
    "compile": "compile a model's different pieces into a bundle",
    "generate": "continue a prompt, from a stored bundle or after compiling one",
    "serve": "serve a model over HTTP, as OpenAI does",
    "why": "say whether a start would find its bundle, and why not",
    "store": "list, check, tidy and share the store",
    "inspect": "show what a bundle contains and check its digests",
    "explain": "say which layers share their pieces, and why others don't",
    "bench": "measure a model here: its start, and tokens per second",
    "doctor": "say what of this machine is missing or slow, with the fix",
    "demo": "compile the model that ships with piecework, and start it again warm",
}
_EPILOG: Final = """\
exit codes: 0 done, 1 failed (also when interrupted), 2 wrong usage
store: $PIECEWORK_HOME, else $XDG_CACHE_HOME/piecework, else ~/.cache/piecework,
else (without a home directory) /tmp/piecework-<user id>
"""
_FLAG: Final = re.compile(r"--[a-z][a-z0-9-]+")
_DISK_ERRORS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; wrong usage, `--help` and `--version` leave by SystemExit.

    Args:
        argv: the arguments; default: this process's.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        with _terminate_as_interrupt():
            args = make_parser(arguments).parse_args(arguments)
            if args.parent is not None:
                end_with_parent(args.parent)
            return int(importlib.import_module(f"piecework.cli.{args.command}").run(args))
    except KeyboardInterrupt:
        if debug:
            console.status(traceback.format_exc())
        console.status("piecework: interrupted")
    except BrokenPipeError:
        # whoever read our output is gone; keep the interpreter from complaining about it while it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:  # noqa: BLE001 - the edge: whatever comes becomes three lines and an exit code
        if debug:
            console.status(traceback.format_exc())
        console.show_error(_as_ours(error, arguments=arguments), as_json="--json" in arguments)
    return EXIT_FAILED


def entry() -> NoReturn:
    """Be the console script: run this process's command, then end at once."""
    let_idle_threads_sleep()
    exit_at_once(main())


def make_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser for `arguments`: complete for the command they name, one line for each other."""
    parser = CommandParser(
        prog="piecework",
        description="Compile each different piece of a model once; start anywhere in a blink.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"piecework {VERSION} (Python {platform.python_version()})"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, summary in COMMANDS.items():
        if name == chosen:
            importlib.import_module(f"piecework.cli.{name}").add_parser(subparsers)
            # SUPPRESS: where it isn't given here, what was given before the command stays
            subparsers.choices[name].add_argument(
                "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks"
            )
            # given by processes of ours that start others: end when that one does
            subparsers.choices[name].add_argument("--parent", type=int, help=argparse.SUPPRESS)
            parser.flags = tuple(dict.fromkeys(_FLAG.findall(subparsers.choices[name].format_help())))
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def _as_ours(error: Exception, *, arguments: Sequence[str]) -> PieceworkError:
    """Return the error as one of ours; one that isn't is a bug, or a disk that fails where nobody expected it."""
    asked = " ".join(["piecework", *arguments])
    if isinstance(error, PieceworkError):
        return error
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return as_store_error(error, asked=asked)
    return PieceworkError(
        asked=asked,
        found=f"an error that piecework did not expect: {type(error).__name__}: {error}",
        try_="run it again with --debug, and report what it shows",
    )


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, so that workers are ended and unfinished files removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
