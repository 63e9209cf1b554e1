"""Pieces compiled for use inside torch.compile. torch 2.11-2.13; torch/_inductor/standalone_compile.py.

What torch saves of a compiled piece holds the sources of its kernels, not the kernels: loaded where torch's own cache
is empty, it runs the C++ compiler again, for seconds. Here a piece is compiled in a cache directory of its own, and
that directory, with libraries and all, is the artifact. Torch unpickles its own entries from it when it is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from piecework.foundation.environment import with_variable

Compiled = Callable[..., Sequence[Any]]


def compile_standalone(
    module: torch.fx.GraphModule, inputs: Sequence[Any], *, directory: Path, options: Mapping[str, Any]
) -> tuple[Compiled, bool]:
    """Compile a graph of torch functions in inference mode.

    Args:
        module: its output is a tuple; the output nodes' "example_value" are fake tensors, whose mode is used.
        inputs: a fake tensor, SymInt or stand-in of a reference object per placeholder.
        directory: an empty directory; what the artifact consists of is left there.
        options: Inductor config patches.

    Returns the compiled function, and whether `load_standalone` can load the directory.
    """
    import torch._inductor
    from torch._functorch import config as functorch_config

    functorch: Any = functorch_config
    with _own_cache(directory), torch.no_grad(), functorch.patch(enable_autograd_cache=True):
        artifact: Any = torch._inductor.standalone_compile(
            module,
            list(inputs),
            dynamic_shapes="from_graph",
            options={"config_patches": {**options, "fx_graph_cache": True}},
        )
        saveable = bool(artifact.is_saveable()) if hasattr(artifact, "is_saveable") else artifact._artifacts is not None
        if saveable:
            _write_entries(artifact, directory)
    return artifact._compiled_fn, saveable


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
def _own_cache(directory: Path) -> Iterator[None]:
    """Let Inductor's files go to `directory`, also those of kernels that this process has loaded before."""
    import torch._inductor.codecache as inductor_codecache

    codecache: Any = inductor_codecache
    saved = {}
    for name in ("CppCodeCache", "CppPythonBindingsCodeCache", "CppWrapperCodeCache"):
        found = getattr(codecache, name, None)
        if found is not None and isinstance(getattr(found, "cache", None), dict):
            saved[name] = dict(found.cache)
            found.cache.clear()
    try:
        with with_variable("TORCHINDUCTOR_CACHE_DIR", str(directory)):
            yield
    finally:
        for name, content in saved.items():
            getattr(codecache, name).cache.update(content)


def inductor_settings() -> Mapping[str, Any]:
    """Return Inductor's settings, as far as they may change what it generates."""
    import torch._inductor.config as config

    found: Mapping[str, Any] = config.save_config_portable()
    return found
