"""Every exception a user can meet, as one tree.

A message has three parts: what was asked, what was found, what to try.
"""

from __future__ import annotations

from collections.abc import Sequence


class PieceworkError(Exception):
    """Root of all errors that a user's input or environment can cause.

    Args:
        asked: what the caller wanted.
        found: what stood in the way.
        try_: what would help, or "" where nothing is known to.
    """

    def __init__(self, *, asked: str, found: str, try_: str = "") -> None:
        self.asked = asked
        self.found = found
        self.try_ = try_
        lines = [f"asked: {asked}", f"found: {found}"]
        if try_:
            lines.append(f"try:   {try_}")
        super().__init__("\n".join(lines))

    def to_json(self) -> dict[str, str]:
        """Return the three parts and the error's name, for machines."""
        return {"error": type(self).__name__, "asked": self.asked, "found": self.found, "try": self.try_}


class CaptureError(PieceworkError):
    """The module could not be traced into one graph; `location` is the source line."""

    def __init__(self, *, asked: str, found: str, try_: str = "", location: str = "") -> None:
        self.location = location
        super().__init__(asked=asked, found=f"{found} (at {location})" if location else found, try_=try_)


class ShapeContractError(CaptureError):
    """A declared dynamic size was narrowed while tracing, or a call left its range.

    `conditions` are what the trace relies on, as text over the sizes' names.
    """

    def __init__(
        self, *, asked: str, found: str, try_: str = "", location: str = "", conditions: Sequence[str] = ()
    ) -> None:
        self.conditions = tuple(conditions)
        super().__init__(asked=asked, found=found, try_=try_, location=location)


class UnsupportedModelError(PieceworkError):
    """The model directory or its architecture is not one that piecework can compile."""


class CompileError(PieceworkError):
    """The backend (Inductor, the C++ compiler, a worker process) failed."""


class CheckError(PieceworkError):
    """What was compiled gives other results than the module that it was made of."""


class BackwardError(PieceworkError):
    """A backward pass was asked for; piecework compiles for inference."""


class OpError(PieceworkError):
    """An operator is declared wrongly, or doesn't do what it declares, or is called outside of what it needs."""


class WeightsError(PieceworkError):
    """A checkpoint lacks a tensor, or holds it in the wrong shape or dtype, or is damaged."""


class BundleError(PieceworkError):
    """A bundle can't be used."""


class StaleBundle(BundleError):
    """Facts of the bundle no longer hold; `differing` lists (fact, recorded, current)."""

    def __init__(
        self, *, asked: str, found: str, try_: str = "", differing: Sequence[tuple[str, object, object]] = ()
    ) -> None:
        self.differing = tuple(differing)
        super().__init__(asked=asked, found=found, try_=try_)


class CorruptBundle(BundleError):
    """A file of the bundle is missing or differs from its digest; `file` names it."""

    def __init__(self, *, asked: str, found: str, try_: str = "", file: str = "") -> None:
        self.file = file
        super().__init__(asked=asked, found=found, try_=try_)


class UntrustedBundle(BundleError):
    """The bundle is not signed by a key that the policy trusts."""


class StoreError(PieceworkError):
    """The store's directory, a remote, or a file of keys can't be read or written."""


class RequestError(PieceworkError):
    """A generation request asks for something impossible."""


class MissingPackageError(RequestError):
    """What a request asks for needs an optional package that isn't installed; `try_` is how to install it."""


class CapacityError(PieceworkError):
    """Not enough memory, blocks or room for what was asked."""


class EngineError(PieceworkError):
    """The engine takes no requests and goes on with none: it was closed, or a step of the model failed."""


class InternalError(AssertionError):
    """A bug of piecework itself."""
