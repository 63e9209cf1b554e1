"""Pieces compiled for use inside torch.compile. torch 2.11-2.13; torch/_inductor/standalone_compile.py.

What torch saves of a compiled piece holds the sources of its kernels, not the kernels: loaded where torch's own cache
is empty, it runs the C++ compiler again, for seconds. Here a piece is compiled in a cache directory of its own, and
that directory, with libraries and all, is the artifact. Torch unpickles its own entries from it when it is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from piecework.foundation.environment import with_variable

Compiled = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class Standalone:
    """A compiled piece.

    Attributes:
        run: what to call.
        kernels: the names of its kernels' files, without suffix.
        is_saved: whether `load_standalone` can load the directory.
    """

    run: Compiled
    kernels: frozenset[str]
    is_saved: bool


def compile_standalone(
    module: torch.fx.GraphModule, inputs: Sequence[Any], *, directory: Path, options: Mapping[str, Any]
) -> Standalone:
    """Compile a graph of aten operators in inference mode.

    Args:
        module: its output is a tuple; the output nodes' "example_value" are fake tensors, whose mode is used.
        inputs: a fake tensor, SymInt or stand-in of a reference object per placeholder.
        directory: what the artifact consists of is left there. Kernels that are there already aren't compiled again.
        options: Inductor config patches.
    """
    import torch._inductor
    from torch._functorch import config as functorch_config
    from torch._inductor import config

    functorch: Any = functorch_config
    with (
        _own_cache(directory) as kernels,
        torch.no_grad(),
        config.patch({**options, "fx_graph_cache": True}),
        functorch.patch(enable_autograd_cache=True),
    ):
        artifact: Any = torch._inductor.standalone_compile(
            module, list(inputs), dynamic_shapes="from_graph", options={"config_patches": dict(options)}
        )
        saved = bool(artifact.is_saveable()) if hasattr(artifact, "is_saveable") else artifact._artifacts is not None
        if saved:
            _write_entries(artifact, directory)
        return Standalone(artifact._compiled_fn, kernels(), saved)


def _write_entries(artifact: Any, directory: Path) -> None:
    """Leave exactly one entry of torch's autograd cache in `directory`, as loading by directory wants it."""
    (wanted,) = artifact._artifacts[1].aot_autograd_artifacts
    root = directory / "aotautograd"
    present = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    if wanted not in present:
        torch.compiler.load_cache_artifacts(artifact._artifacts[0])


def load_standalone(directory: Path, *, options: Mapping[str, Any]) -> Compiled:
    """Load what `compile_standalone` left in `directory`; the directory may go once this has returned.

    `options` are the Inductor config patches that it was compiled with: they are part of the names of its files.
    """
    from torch._inductor import config
    from torch._inductor.standalone_compile import CacheCompiledArtifact

    with _own_cache(directory), config.patch(dict(options)):
        (key,) = sorted(path.name for path in (directory / "aotautograd").iterdir())
        artifact: Any = CacheCompiledArtifact._load_impl(contextlib.nullcontext(), key)
    compiled: Compiled = artifact._compiled_fn if artifact._artifacts is not None else artifact
    return compiled


@contextlib.contextmanager
def _own_cache(directory: Path) -> Iterator[Callable[[], frozenset[str]]]:
    """Let Inductor's files go to `directory`, also those of kernels that this process has loaded before.

    Yields a function that names the kernels which have been loaded since.
    """
    import torch._inductor.codecache as inductor_codecache

    names = ("CppCodeCache", "CppPythonBindingsCodeCache", "CppWrapperCodeCache")
    caches = {
        id(c): c for n in names if (c := getattr(getattr(inductor_codecache, n, None), "cache", None)) is not None
    }
    saved = {key: dict(cache) for key, cache in caches.items()}
    for cache in caches.values():
        cache.clear()
    try:
        with with_variable("TORCHINDUCTOR_CACHE_DIR", str(directory)):
            yield lambda: frozenset(str(key) for cache in caches.values() for key in cache)
    finally:
        for key, content in saved.items():
            caches[key].update(content)


@contextlib.contextmanager
def trusted_instructions() -> Iterator[None]:
    """Inside, Inductor believes that the C++ compiler knows the instructions that the CPU has, and doesn't try them.

    Each trial compiles a file and loads it in another process (torch/_inductor/cpu_vec_isa.py, `VecISA.check_build`);
    `cpp.vec_isa_ok` spares the first one only. What is believed stays so for the process.
    """
    from torch._inductor import config, cpu_vec_isa

    known: Any = cpu_vec_isa.VecISA
    original = known.check_build
    known.check_build = lambda self, code: True
    try:
        with config.patch({"cpp.vec_isa_ok": True}):
            yield
    finally:
        known.check_build = original


def inductor_settings() -> Mapping[str, Any]:
    """Return Inductor's settings, as far as they may change what it generates; not where the C++ compiler is."""
    import torch._inductor.config as config

    found: Mapping[str, Any] = config.save_config_portable()
    return {name: value for name, value in found.items() if name != "cpp.cxx"}


def uses_custom_passes() -> bool:
    """Whether somebody has put passes of his own into Inductor; its settings don't tell them apart."""
    import torch._inductor.config as config

    settings: Any = config
    names = [n for n in settings._config if "custom" in n and n.endswith("_pass")]
    return any(getattr(settings, n) is not None for n in names)


def ambient_mode() -> Mapping[str, Any]:
    """Return what of torch's global state changes the code of a graph. Inside Dynamo it is that of the frame."""
    devices = ("cpu", "cuda")
    return {
        "autocast": [[d, str(torch.get_autocast_dtype(d))] for d in devices if torch.is_autocast_enabled(d)],
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "deterministic": [
            torch.are_deterministic_algorithms_enabled(),
            bool(getattr(torch.utils.deterministic, "fill_uninitialized_memory", False)),
        ],
        "matmul": [torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32],
        "mkldnn": torch.backends.mkldnn.enabled,
    }


def stock_inductor(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph as torch.compile does by default."""
    from torch._dynamo.backends.registry import lookup_backend

    compiled: Callable[..., Any] = lookup_backend("inductor")(module, list(inputs))
    return compiled
