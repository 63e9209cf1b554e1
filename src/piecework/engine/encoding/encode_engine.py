"""Vectors and scores of texts from an encoder. `Embedder`, `CrossEncoder` and the server all stand on this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import numpy

from piecework.engine.encoding.encoder import Encoder, EncoderModel
from piecework.engine.output import Stats
from piecework.engine.text.tokenizer import TextTokens, Tokenizer
from piecework.errors import RequestError
from piecework.spec.encoder_config import EncoderConfig, Task

if TYPE_CHECKING:
    Vectors = numpy.ndarray[Any, numpy.dtype[numpy.float32]]


@final
class EncodeEngine:
    """Encodes texts. Any thread may use it, several at a time.

    Args:
        encoder: computes tokens.
        tokenizer: the model's, which cuts texts off at the encoder's longest.
        config: what the directory says of texts.
    """

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, config: EncoderConfig) -> None:
        self._encoder = encoder
        self._tokenizer = tokenizer
        self._config = config

    @property
    def task(self) -> Task:
        """What it does with texts."""
        return self._config.task

    @property
    def max_positions(self) -> int:
        """The longest text in tokens, special ones included."""
        return self._encoder.longest

    @property
    def failure(self) -> str:
        """What has ended it for good: nothing does."""
        return ""

    def tokens(self, texts: Sequence[str], *, prompt: str | None = None, prompt_name: str | None = None
               ) -> list[TextTokens]:  # fmt: skip
        """Return the tokens of texts.

        Args:
            texts: each as long as it likes: what is too much is cut off.
            prompt: put before each of them.
            prompt_name: which of the model's prompts is put before them; where neither is given, its default one.

        Raises RequestError for a prompt that the model hasn't.
        """
        name = self._config.default_prompt if prompt_name is None else prompt_name
        if prompt is None and name:
            if name not in self._config.prompts:
                raise RequestError(
                    asked=f"the prompt {name!r}",
                    found=f"prompts named {', '.join(self._config.prompts) or 'nothing'}",
                    try_="one of those, or prompt= with the text itself",
                )
            prompt = self._config.prompts[name]
        given = [prompt + text for text in texts] if prompt else list(texts)
        return self._tokenizer.encode_all([text.lower() for text in given] if self._config.lower_case else given)

    def pair_tokens(self, pairs: Sequence[tuple[str, str]]) -> list[TextTokens]:
        """Return the tokens of pairs of texts; of those that are too long, the longer text is cut off first."""
        lower = self._config.lower_case
        return self._tokenizer.encode_all([(a.lower(), b.lower()) for a, b in pairs] if lower else list(pairs))

    def check(self, texts: Sequence[TextTokens]) -> None:
        """Raise RequestError where one of the texts has no tokens, too many, or tokens that there aren't."""
        self._encoder.check(texts)

    def encode(self, texts: Sequence[TextTokens]) -> Vectors:
        """Return a vector for each text, [n, dim], or a score, [n, 1]. Raises as `Encoder.encode`."""
        rows: Vectors = self._encoder.encode(texts).numpy()
        return rows

    def stats(self) -> Stats:
        """Return what it is doing. Cheap; any thread may call it."""
        return self._encoder.stats()

    def swap_runner(self, model: EncoderModel) -> None:
        """Go over to another model of the same texts and results."""
        self._encoder.swap_runner(model)

    def close(self) -> None:
        """Let go of the model, once what runs has ended."""
        self._encoder.close()


def shortened(vectors: Vectors, dimensions: int | None) -> Vectors:
    """Return the first numbers of each vector [n, dim], with length 1 again; None for all as they are.

    Models that were trained so (Matryoshka representations, arXiv:2205.13147) keep their sense then. Raises
    RequestError for more numbers than there are, or fewer than one.
    """
    if dimensions is None:
        return vectors
    if not 1 <= dimensions <= vectors.shape[1]:
        raise RequestError(
            asked=f"vectors of {dimensions} dimensions",
            found=f"a model that gives {vectors.shape[1]}",
            try_=f"1 to {vectors.shape[1]}",
        )
    cut = vectors[:, :dimensions]
    lengths = numpy.linalg.norm(cut, axis=1, keepdims=True)
    made: Vectors = cut / numpy.maximum(lengths, 1e-12)
    return made
