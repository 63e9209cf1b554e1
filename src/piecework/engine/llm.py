"""`piecework.LLM`: a model directory as something that continues texts, in Python."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Final, cast, final

from piecework.bundle.bundle import Bundle
from piecework.engine.async_engine import AsyncEngine
from piecework.engine.events import notes_to
from piecework.engine.opening import open_engine
from piecework.engine.options import engine_options, read_engine_options
from piecework.engine.output import Stats
from piecework.engine.profile_options import ProfileOptions
from piecework.engine.request import GenerationRequest
from piecework.engine.sampling_params import SamplingParams
from piecework.engine.text.chat_template import Message
from piecework.engine.text.completion import Completion
from piecework.engine.text.deltas import TextDelta
from piecework.engine.text.tokenizer import Tokenizer
from piecework.engine.text_engine import TextEngine
from piecework.errors import CompileError, RequestError
from piecework.foundation.environment import read_environment
from piecework.foundation.process import keep_freed_memory
from piecework.spec.model_spec import ModelSpec, check_names, spec_options

Prompt = str | Sequence[int]
_OPTIONS: Final = engine_options(
    *("max_seqs", "max_model_len", "kv_cache_memory", "memory_fraction", "prefix_caching"),
    *("bundle", "trust", "random_weights", "threads", "chat_template"),
)


@final
class LLM:
    """A model that continues texts. Any thread and any event loop may use it, several at a time.

    Uses a valid bundle of the local store, else compiles one there, in a process of its own. The engine runs in a
    thread until `close`. Tells glibc to keep freed memory (`keep_freed_memory`), which steps need to be fast.

    Args:
        model: a directory in Hugging Face layout, a Hub id ("OWNER/NAME" or "OWNER/NAME@REVISION"), or a ModelSpec.
            Without tokenizer.json, prompts are tokens and texts are empty.
        profile: write a torch profiler trace of some forwards, with pieces and layers by name.
        on_note: is told what happens to bundles, such as that one is being compiled, and where a trace was written.
        options: how the model is compiled, by the names of the options of `ModelSpec` and `CompileOptions` (dtype,
            device, max_tokens, ranges, providers, ...), unless `model` is a spec; and how it is run, by those of
            `EngineOptions` (max_seqs, max_model_len, kv_cache_memory, memory_fraction, prefix_caching, bundle, trust,
            random_weights, threads, chat_template). None is the default.

    Raises UnsupportedModelError, BundleError, WeightsError, CompileError, CapacityError, OpError, RequestError.
    """

    def __init__(
        self,
        model: str | Path | ModelSpec,
        *,
        profile: ProfileOptions | None = None,
        on_note: Callable[[str], None] = lambda _: None,
        **options: Any,
    ) -> None:
        keep_freed_memory()
        check_names(options, known=(*spec_options(), *_OPTIONS))
        how = {name: options[name] for name in options if name in {d.name for d in spec_options()}}
        spec = as_spec(model, how, weights=options.get("random_weights") is None)
        opened = open_engine(
            spec,
            read_engine_options(options, profile=profile),
            environment=read_environment(),
            on_event=notes_to(on_note),
        )
        self._bundle = opened.found.bundle
        self._tokenizer = opened.tokenizer
        self._texts = TextEngine(AsyncEngine(opened.engine), opened.tokenizer)
        self._numbers = itertools.count()

    @property
    def bundle(self) -> Bundle:
        """The bundle that is running."""
        return self._bundle

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if it has one."""
        return self._tokenizer

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Continue prompts, as many at a time as fit, and return what became of each, in their order.

        Args:
            prompts: a text, a list of texts, or a list of prompts that are lists of tokens.
            params: how to continue all of them, or one for each; None for SamplingParams().

        Raises RequestError or CapacityError where one of them can't be continued, before any is; EngineError where the
        engine ends before they do.
        """
        return self._texts.complete([self._request(prompt, one) for prompt, one in _pair(prompts, params)])

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Completion]:
        """Answer conversations by the model's own chat template, and return what became of each, in their order.

        Args:
            messages: a conversation, or a list of them: messages with "role" and "content", as in OpenAI's API.
            params: how to answer all of them, or one for each; None for SamplingParams().
            tools: JSON descriptions of functions that the model is told of.
            chat_template_kwargs: further names for the template, such as "enable_thinking".

        Raises like `generate`, and RequestError where there is no chat template or it refuses the messages.
        """
        single = not messages or isinstance(messages[0], Mapping)
        each = cast("Sequence[Sequence[Message]]", [messages] if single else messages)
        return self.generate(
            [self._texts.encode_chat(one, tools=tools, extra=chat_template_kwargs) for one in each], params
        )

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncIterator[TextDelta]:
        """Continue a prompt, and yield what each step adds.

        Whoever stops iterating, by cancellation or `aclose`, ends the request.

        Raises RequestError for `n` other than 1, and like `generate`.
        """
        request = self._request(prompt, params or SamplingParams())
        if request.params.n != 1:
            raise RequestError(
                asked=f"stream {request.params.n} continuations", found="a stream has one", try_="n=1, or generate"
            )
        self._texts.check(request)
        async with aclosing(cast("Any", self._texts.stream(request))) as deltas:
            async for delta in deltas:
                yield delta

    def stats(self) -> Stats:
        """Return what the engine is doing."""
        return self._texts.stats()

    def close(self) -> None:
        """End what runs with an EngineError, and let go of the model."""
        self._texts.close()

    def __enter__(self) -> LLM:
        """Return itself; the end of the block closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def _request(self, prompt: Prompt, params: SamplingParams) -> GenerationRequest:
        tokens = self._texts.encode(prompt) if isinstance(prompt, str) else prompt
        return GenerationRequest(f"llm-{next(self._numbers)}", tuple(tokens), params)


def as_spec(model: str | Path | ModelSpec, options: Mapping[str, Any], *, weights: bool) -> ModelSpec:
    """Return the spec of a model; raises CompileError for options beside one, and as `ModelSpec.of`."""
    if not isinstance(model, ModelSpec):
        return ModelSpec.of(model, weights=weights, **options)
    if options:
        raise CompileError(
            asked=f"a model with {', '.join(options)}",
            found="a ModelSpec, which says how it is compiled already",
            try_="the option in the spec",
        )
    return model


def _pair(
    prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> Iterator[tuple[Prompt, SamplingParams]]:
    """Yield each prompt with its parameters."""
    each = [prompts] if isinstance(prompts, str) else list(prompts)
    if each and isinstance(each[0], int):
        raise RequestError(
            asked="continue a list of numbers", found="one prompt's tokens", try_="a list of such lists: [tokens]"
        )
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(each)
    if len(params) != len(each):
        raise RequestError(
            asked=f"continue {len(each)} prompts",
            found=f"{len(params)} SamplingParams",
            try_="one for all, or for each",
        )
    return zip(cast("list[Prompt]", each), params, strict=True)
