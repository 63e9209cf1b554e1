"""What a forward of `bench mla` is about. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Batch:
    """What a forward is about: sequences that decode, and prompts.

    Args:
        decode: sequences with one new token each.
        decode_context: tokens that each of those has in the cache.
        prompts: sequences with `prompt_tokens` new tokens each.
        prompt_tokens: see there.
        prompt_context: tokens that each prompt has in the cache.
    """

    decode: int = 0
    decode_context: int = 0
    prompts: int = 0
    prompt_tokens: int = 0
    prompt_context: int = 0

    @property
    def regime(self) -> str:
        """One of "decode", "prefill" and "mixed", by which sequences there are."""
        if not self.prompts:
            return "decode"
        return "mixed" if self.decode else "prefill"

    @property
    def context(self) -> int:
        """What the sequences that there are have in the cache; those that decode, where there are both."""
        return self.decode_context if self.decode else self.prompt_context

    @property
    def num_seqs(self) -> int:
        """How many sequences."""
        return self.decode + self.prompts

    @property
    def num_tokens(self) -> int:
        """How many new tokens."""
        return self.decode + self.prompts * self.prompt_tokens

    def num_blocks(self, block_size: int) -> int:
        """Return the blocks of the cache that all sequences have together."""
        return sum(-(-sum(sequence) // block_size) for sequence in self.sequences())

    def sequences(self) -> list[tuple[int, int]]:
        """Return (tokens in the cache, new tokens) of each sequence, those that decode first."""
        decode = [(self.decode_context, 1)] * self.decode
        return decode + [(self.prompt_context, self.prompt_tokens)] * self.prompts

    def __str__(self) -> str:
        parts = []
        if self.decode:
            parts.append(f"{self.decode} decode tokens after {self.decode_context} each")
        if self.prompts:
            parts.append(f"{self.prompts} × {self.prompt_tokens} prompt tokens after {self.prompt_context} each")
        return ", ".join(parts)
