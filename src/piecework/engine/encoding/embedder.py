"""`piecework.Embedder` and `piecework.CrossEncoder`: an encoder's directory in Python, texts in and numbers out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, final

from piecework.bundle.bundle import Bundle
from piecework.engine.encoding.encode_engine import shortened
from piecework.engine.encoding.opening import open_encoder
from piecework.engine.events import notes_to
from piecework.engine.llm import as_spec
from piecework.engine.opening import check_task
from piecework.engine.options import engine_options, read_engine_options
from piecework.engine.output import Stats
from piecework.foundation.environment import read_environment
from piecework.foundation.process import keep_freed_memory
from piecework.spec.encoder_config import Task
from piecework.spec.model_spec import ModelSpec, check_names, spec_options

if TYPE_CHECKING:
    from piecework.engine.encoding.encode_engine import Vectors

_OPTIONS: Final = engine_options("bundle", "trust", "random_weights", "threads")


class Encodes:
    """What both have in common.

    Args:
        model: a directory that sentence-transformers wrote, or one of a transformers encoder alone, or a ModelSpec.
        on_note: is told what happens to bundles, such as that one is being compiled.
        options: how the model is compiled, by the names of the options of `ModelSpec` and `CompileOptions`, unless
            `model` is a spec; and bundle, trust, random_weights and threads of `EngineOptions`. None is the default.

    Raises UnsupportedModelError, BundleError, WeightsError, CompileError, OpError, RequestError.
    """

    _task: Task

    def __init__(
        self, model: str | Path | ModelSpec, *, on_note: Callable[[str], None] = lambda _: None, **options: Any
    ) -> None:
        keep_freed_memory()
        check_names(options, known=(*spec_options(), *_OPTIONS))
        how = {name: options[name] for name in options if name in {d.name for d in spec_options()}}
        spec = as_spec(model, how, weights=options.get("random_weights") is None)
        check_task(spec, self._task)
        opened = open_encoder(
            spec, read_engine_options(options), environment=read_environment(), on_event=notes_to(on_note)
        )
        self._bundle = opened.found.bundle
        self._engine = opened.engine

    @property
    def bundle(self) -> Bundle:
        """The bundle that is running."""
        return self._bundle

    @property
    def max_tokens(self) -> int:
        """The longest text in tokens, special ones included; what is longer is cut off."""
        return self._engine.max_positions

    def stats(self) -> Stats:
        """Return how many texts wait, and how many forwards and tokens there were."""
        return self._engine.stats()

    def close(self) -> None:
        """Let go of the model, once what runs has ended."""
        self._engine.close()

    def __enter__(self) -> Self:
        """Return itself; the end of the block closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()


@final
class Embedder(Encodes):
    """A model that makes a vector of each text. Any thread may use it, several at a time.

    Uses a valid bundle of the local store, else compiles one there, in a process of its own. Arguments and errors are
    those of `Encodes`.
    """

    _task = Task.EMBED

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        dimensions: int | None = None,
    ) -> Vectors:
        """Return the vectors of texts, [n, dim] float32, in their order; of one text that is no list, [dim].

        Texts are cut off at `max_tokens`, and computed in batches of at most the spec's `max_tokens` tokens, the
        longest first. A vector depends on its own text only.

        Args:
            texts: one or several.
            prompt: put before each of them.
            prompt_name: which of the model's prompts is put before them; where neither is given, its default one.
            dimensions: how many of the first numbers are kept, with length 1 again; None for all as they are.

        Raises RequestError for a prompt that the model hasn't, and for more dimensions than there are.
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        vectors = self._engine.encode(self._engine.tokens(given, prompt=prompt, prompt_name=prompt_name))
        vectors = shortened(vectors, dimensions)
        return vectors[0] if isinstance(texts, str) else vectors


@final
class CrossEncoder(Encodes):
    """A model that gives a pair of texts a score. Any thread may use it, several at a time.

    Uses a valid bundle of the local store, else compiles one there, in a process of its own. Arguments and errors are
    those of `Encodes`.
    """

    _task = Task.SCORE

    def score(self, pairs: Sequence[tuple[str, str]]) -> Vectors:
        """Return the scores of pairs such as (question, document), [n] float32, in their order."""
        scores: Vectors = self._engine.encode(self._engine.pair_tokens(pairs))[:, 0]
        return scores
