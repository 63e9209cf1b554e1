"""argparse's parser, which says of a flag that it doesn't know which known one is nearest."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, Final, NoReturn, final

_UNKNOWN: Final = "unrecognized arguments: "


@final
class CommandParser(argparse.ArgumentParser):
    """A parser of the command line.

    Attributes:
        flags: the flags among which the nearest one is looked for.
        rewrite: makes arguments that argparse knows of those that were given; raises ValueError for those it refuses.
    """

    flags: Sequence[str] = ()
    rewrite: Callable[[Sequence[str]], list[str]] | None = None

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """See argparse."""
        if self.rewrite is not None and args is not None:
            try:
                args = self.rewrite(args)
            except ValueError as error:
                self.error(str(error))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End with a message, and the nearest flag where one isn't known."""
        if message.startswith(_UNKNOWN):
            wrong = [word for word in message.removeprefix(_UNKNOWN).split() if word.startswith("--")]
            near = [get_close_matches(word.partition("=")[0], self.flags, n=1) for word in wrong]
            message += "".join(f"; is {found[0]} meant?" for found in near if found)
        super().error(message)
