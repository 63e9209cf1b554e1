"""`piecework.LLM`: a model directory as something that continues texts, in Python."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, cast, final

from piecework.bundle.bundle import Bundle, open_bundle
from piecework.bundle.facts import require
from piecework.bundle.plan import Plan
from piecework.bundle.run import LoadedModel, load
from piecework.bundle.store.directory import DirectoryStore
from piecework.engine.async_engine import AsyncEngine
from piecework.engine.bundles import find_or_compile
from piecework.engine.engine import EngineConfig, Runner, engine_for
from piecework.engine.kv_memory import read_memory
from piecework.engine.loading import CacheSize, num_blocks_for_cache, open_weights
from piecework.engine.output import Stats
from piecework.engine.profile_options import ProfileOptions
from piecework.engine.request import GenerationRequest
from piecework.engine.sampling_params import SamplingParams
from piecework.engine.text.completion import Completion
from piecework.engine.text.deltas import TextDelta
from piecework.engine.text.tokenizer import Tokenizer, load_tokenizer
from piecework.engine.text_engine import TextEngine
from piecework.errors import RequestError
from piecework.foundation.environment import read_environment
from piecework.foundation.process import keep_freed_memory
from piecework.spec.model_spec import ModelSpec

Prompt = str | Sequence[int]


@final
class LLM:
    """A model that continues texts. Any thread and any event loop may use it, several at a time.

    Uses a valid bundle of the local store, else compiles one there, in a process of its own. The engine runs in a
    thread until `close`. Tells glibc to keep freed memory (`keep_freed_memory`), which steps need to be fast.

    Args:
        model_dir: directory in Hugging Face layout. Without tokenizer.json, prompts are tokens and texts are empty.
        dtype: type of weights and activations, "float32" or "bfloat16"; None for the config's.
        device: where to run, "cpu" or "cuda".
        max_tokens: most tokens in one forward pass.
        max_seqs: most sequences in one forward pass; None for the most that the bundle takes.
        kv_cache_memory: bytes of the KV cache; None for `memory_fraction`.
        memory_fraction: the KV cache's share of the memory that is free once the model is loaded; None for 0.5 of the
            host's or 0.9 of a GPU's.
        prefix_caching: whether a prompt's beginning is taken from the KV cache where it is there.
        bundle: use this one instead of the store's.
        random_weights: a seed for random weights; the directory then needs no safetensors.
        mla: for models with latent attention: "exposed" has the steps of a layer compiled, "opaque" is one operator.
        kv_cache_dtype: "auto" caches in the model's type, or in what `bundle` was compiled for; "fp8", for models with
            latent attention, caches latents in a byte per number, with scales.
        providers: which implementations IR ops have, as ProviderOrder or as what its `parse` reads; None for the
            default, or for what `bundle` has.
        profile: write a torch profiler trace of some forwards, with pieces and layers by name.
        on_note: is told what happens to bundles, such as that one is being compiled, and where a trace was written.

    Raises UnsupportedModelError, BundleError, WeightsError, CompileError, CapacityError, OpError.
    """

    def __init__(
        self,
        model: str | Path | ModelSpec,
        *,
        max_seqs: int | None = None,
        kv_cache_memory: int | None = None,
        memory_fraction: float | None = None,
        prefix_caching: bool = True,
        bundle: str | Path | None = None,
        random_weights: int | None = None,
        profile: ProfileOptions | None = None,
        on_note: Callable[[str], None] = lambda _: None,
        **options: Any,
    ) -> None:
        keep_freed_memory()
        spec = model if isinstance(model, ModelSpec) else ModelSpec.of(model, **options)
        device = spec.options.device
        memory = read_memory(device)
        self._config = config = spec.config
        has_tokenizer = (config.path / "tokenizer.json").exists()
        self._tokenizer = load_tokenizer(config.path) if has_tokenizer else None
        root = read_environment().store_root
        if bundle is not None:
            opened = open_bundle(Path(bundle), extract_root=root)
            require(opened.facts, asked=f"run {config.path} from {bundle}", expected=spec.asked_facts)
        else:
            opened = find_or_compile(spec, store=DirectoryStore(root), on_note=on_note).bundle
        size = CacheSize(num_bytes=kv_cache_memory, fraction=memory_fraction)
        plan = Plan.from_json(opened.plan())
        num_blocks = num_blocks_for_cache(plan, config, size, device=device, memory=memory)
        most = plan.sizes["seqs"][1]
        engine_config = EngineConfig(
            num_blocks=num_blocks,
            max_tokens=plan.sizes["tokens"][1],
            max_seqs=most if max_seqs is None else min(max_seqs, most),
            prefix_caching=prefix_caching,
        )
        loaded = load(opened, weights=open_weights(config.path, plan, random_seed=random_weights), check_facts=False)
        runner = loaded if profile is None else _profiled(loaded, profile, on_note=on_note)
        engine = engine_for(runner, engine_config, model_config=config, tokenizer=self._tokenizer)
        self._bundle = opened
        self._texts = TextEngine(AsyncEngine(engine), self._tokenizer)
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


def _profiled(model: LoadedModel, options: ProfileOptions, *, on_note: Callable[[str], None]) -> Runner:
    from piecework.engine.profiling import profiled  # noqa: PLC0415  only who profiles pays for it

    return profiled(model, options, on_note=on_note)


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
