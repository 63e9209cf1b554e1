"""`bench mla`: latent attention with its steps compiled ("exposed") beside the same in one operator ("opaque")."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from piecework.bench.cells.mla_batch import Batch
from piecework.bench.launch import Launcher
from piecework.bench.measurements import Measured, OnProgress
from piecework.bench.mla_model import LatentShape, write_deepseek
from piecework.bench.random_models import RANDOM_MODELS, TINY_LATENT, RandomModel
from piecework.bench.systems.mla import ChatLoad, LatentLayers, LatentModel, LatentOffline, LatentServing, VllmServing
from piecework.bench.systems.throughput import ThroughputSystem, VllmThroughput, Workload
from piecework.bench.systems.vllm import Peers
from piecework.bench.throughput import take_turns
from piecework.spec.latent_config import MLA_MODES

SYSTEMS: Final = (*MLA_MODES, "vllm")
PARTS: Final = ("layers", "serving", "offline")
# DeepSeek-V2-Lite's; an MLP is as wide as its two shared experts, because routed ones are the same in both forms
LITE: Final = LatentShape(hidden=2048, heads=16, intermediate=2816, vocab=1024)
LAYER_SHAPES: Final[Mapping[str, LatentShape]] = {"v2-lite": LITE, "tiny": TINY_LATENT}


def lite_batches(context: int) -> tuple[Batch, ...]:
    """Return the batches that layers are measured with: `context` tokens are in the cache before, where any are."""
    decode = tuple(Batch(decode=count, decode_context=context) for count in (1, 8, 32))
    return (
        *decode,
        Batch(prompts=4, prompt_tokens=256),
        Batch(prompts=4, prompt_tokens=128, prompt_context=context),
        Batch(decode=16, decode_context=context, prompts=1, prompt_tokens=480),
    )


@dataclass(frozen=True)
class MlaSettings:
    """What to measure.

    Args:
        parts: which of PARTS: a few layers' forwards, chats all at once, and the workload of `bench throughput`.
        systems: which of SYSTEMS; vLLM has no forwards of layers.
        layers, shape, dtypes, batches: of the forwards.
        steps, seconds: at least so many forwards of each batch in a process, for so long.
        model, dtype: of the other parts.
        chats: of the second part.
        requests, input, output, runs: of the last part, see `Workload`.
        repeats: rounds of the first part, in each of which all forms take turns in one process.
        end_to_end_repeats: rounds of the others, in each of which every system runs in a process of its own.
        backend: of the bundles, "aoti" or "eager".
        peers: the installed vLLM, or None.
    """

    parts: tuple[str, ...] = PARTS
    systems: tuple[str, ...] = SYSTEMS
    layers: int = 2
    shape: LatentShape = LITE
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    batches: tuple[Batch, ...] = lite_batches(512)
    steps: int = 5
    seconds: float = 1.0
    model: RandomModel = RANDOM_MODELS["mla-100m"]
    dtype: str = "bfloat16"
    chats: ChatLoad = field(default_factory=ChatLoad)
    requests: int = 32
    input: int = 128
    output: int = 64
    runs: int = 3
    repeats: int = 3
    end_to_end_repeats: int = 2
    backend: str = "aoti"
    peers: Peers | None = None


@dataclass(frozen=True)
class _Part:
    """What is measured in turns: what it is called, who takes part, and how many rounds there are."""

    name: str
    systems: Sequence[ThroughputSystem]
    repeats: int


def measure_mla(settings: MlaSettings, *, on_progress: OnProgress) -> Measured:
    """Measure everything; takes minutes, and the machine to itself. Leaves nothing behind.

    Args:
        settings: what.
        on_progress: called with what runs, how many processes of its part are done, and how many there are.
    """
    with tempfile.TemporaryDirectory(prefix="piecework-bench-") as place:
        root = Path(place)
        found = [
            take_turns(part.systems, repeats=part.repeats, on_progress=on_progress, what=part.name, first_tokens=False)
            for part in _parts(settings, root, on_progress=on_progress)
        ]
    return Measured(
        rows=tuple(row for part in found for row in part.rows),
        notes=tuple(note for part in found for note in part.notes),
        failed=frozenset(name for part in found for name in part.failed),
    )


def _parts(settings: MlaSettings, root: Path, *, on_progress: OnProgress) -> Iterator[_Part]:
    """Yield the parts, each with its model written."""
    launcher = Launcher(root)
    forms = [name for name in MLA_MODES if name in settings.systems]
    if "layers" in settings.parts:
        for dtype in settings.dtypes:
            yield _layers(settings, root, dtype=dtype, launcher=launcher, forms=forms)
    if not {"serving", "offline"} & set(settings.parts):
        return
    on_progress("writing the model", 0, 0)
    path = settings.model.write(root / settings.model.name, dtype=settings.dtype)
    model = LatentModel(path, settings.model.layers, settings.dtype, settings.backend)
    if "serving" in settings.parts:
        chats: list[ThroughputSystem] = [LatentServing(name, launcher, model, load=settings.chats) for name in forms]
        if settings.peers is not None and "vllm" in settings.systems:
            chats.append(VllmServing(launcher, settings.peers, model, load=settings.chats))
        yield _Part("serving", chats, settings.end_to_end_repeats)
    if "offline" in settings.parts:
        yield _Part("offline", _offline(settings, model, launcher=launcher, forms=forms), settings.end_to_end_repeats)


def _layers(settings: MlaSettings, root: Path, *, dtype: str, launcher: Launcher, forms: Sequence[str]) -> _Part:
    path = root / f"layers-{dtype}"
    write_deepseek(path, shape=settings.shape, layers=settings.layers, dtype=dtype, weights=False)
    model = LatentModel(path, settings.layers, dtype, settings.backend, has_weights=False)
    how: Any = {"batches": settings.batches, "steps": settings.steps, "seconds": settings.seconds}
    return _Part(f"layers, {dtype}", [LatentLayers(forms, launcher, model, **how)] if forms else [], settings.repeats)


def _offline(
    settings: MlaSettings, model: LatentModel, *, launcher: Launcher, forms: Sequence[str]
) -> list[ThroughputSystem]:
    workload = Workload(
        model.path,
        model.layers,
        model.dtype,
        requests=settings.requests,
        input=settings.input,
        output=settings.output,
        runs=settings.runs,
    )
    systems: list[ThroughputSystem] = [LatentOffline(name, launcher, model, workload=workload) for name in forms]
    if settings.peers is not None and "vllm" in settings.systems:
        systems.append(VllmThroughput(launcher, settings.peers, workload, first_tokens=False))
    return systems
