"""What a family's adapter makes: a module on piecework's ops, and what belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from piecework.bundle.facts import Fact
from piecework.bundle.recipes import Sources
from piecework.capture.request import TensorInput


@dataclass(frozen=True)
class AdaptedModel:
    """A causal language model whose caches are states.

    Attributes:
        module: parameters on the meta device; takes transformers' arguments and a `ForwardBatch` named `batch`.
        states: its caches, by qualified name.
        sources: how those parameters are made that a checkpoint has in another form.
        notes: what was decided about it, for people.
        cache_length: the tokens that its cache seems to hold, where its code attends by itself; else 0.
        facts: what is known of it now that it is built.
    """

    module: nn.Module
    states: Mapping[str, TensorInput]
    sources: Sources = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    cache_length: int = 0
    facts: tuple[Fact, ...] = ()
