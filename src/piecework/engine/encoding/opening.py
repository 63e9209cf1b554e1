"""`open_encoder`: from a spec to an encoder, the way that engine/opening.py goes for every model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from piecework.engine.events import OnEvent
from piecework.engine.opening import Opened, begin_opening, check_task, open_model
from piecework.engine.options import EngineOptions
from piecework.foundation.environment import Environment
from piecework.spec.encoder_config import Task
from piecework.spec.model_spec import ModelSpec

if TYPE_CHECKING:
    from piecework.engine.encoding.encode_engine import EncodeEngine

_DEFAULT: Final = EngineOptions()


@dataclass(frozen=True)
class OpenEncoder(Opened):
    """An encoder that takes texts.

    Attributes:
        engine: the encoder.
    """

    engine: EncodeEngine


def open_encoder(
    spec: ModelSpec,
    options: EngineOptions = _DEFAULT,
    *,
    environment: Environment,
    on_event: OnEvent = lambda _: None,
    hears_compile: bool = False,
) -> OpenEncoder:
    """Do what `open_engine` does, for a spec whose model encodes texts; arguments and errors are the same."""
    encoder = spec.config.encoder
    if encoder is None:
        check_task(spec, Task.EMBED)
    assert encoder is not None
    start = begin_opening(spec, options, environment, on_event, hears_compile=hears_compile)
    with start.store.in_use():
        _, opened = open_model(start)
    from piecework.engine.encoding.encode_engine import EncodeEngine  # noqa: PLC0415  imports torch
    from piecework.engine.encoding.encoder import Encoder  # noqa: PLC0415

    assert opened.tokenizer is not None
    sizes = opened.model.plan.sizes
    computes = Encoder(
        opened.model,
        max_tokens=sizes["tokens"][1],
        max_texts=sizes["seqs_plus_one"][1] - 1,
        longest=encoder.longest,
        vocab_size=spec.config.vocab_size,
        padded="longest" in sizes,
    )
    return OpenEncoder(**vars(opened), engine=EncodeEngine(computes, opened.tokenizer, encoder))
