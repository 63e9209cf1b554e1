"""Encoders on packed texts, run eagerly, against transformers' own forward of each text alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from piecework.bundle.facts import check
from piecework.bundle.recipes import Take
from piecework.errors import UnsupportedModelError
from piecework.models.adapter import build_request
from piecework.spec.model_spec import ModelSpec
from tests.choice import slow_but
from tests.unit.models.encoders import (
    DENSE,
    ENCODERS,
    NORMALIZE,
    packed_encoder,
    reference_encoder,
    write_encoder,
    write_plain,
)

TEXTS = [[2, 7, 9, 30, 4, 3], [2, 5, 3], [2, *range(4, 34), 3], [2, 50, 3], [3]]


def hidden_states(reference: Any, text: list[int]) -> Tensor:
    with torch.inference_mode():
        states: Tensor = reference(input_ids=torch.tensor([text])).last_hidden_state[0]
    return states


@pytest.mark.parametrize("family", slow_but(ENCODERS, "bert", "roberta", "modernbert", "mpnet", "t5"))
def test_means_of_packed_texts_equal_those_of_each_text_alone(tmp_path: Path, family: str) -> None:
    directory = write_encoder(tmp_path, family)
    reference = reference_encoder(directory)
    vectors = packed_encoder(directory, reference)(TEXTS)
    for vector, text in zip(vectors, TEXTS, strict=True):
        wanted = hidden_states(reference, text).mean(0)
        assert (vector - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max())


def pooled(states: Tensor, name: str) -> Tensor:
    """Write sentence-transformers' poolings out."""
    counts = torch.arange(1.0, len(states) + 1).unsqueeze(1)
    return {
        "cls": states[0],
        "lasttoken": states[-1],
        "max": states.max(0).values,
        "mean": states.mean(0),
        "mean_sqrt_len_tokens": states.sum(0) / len(states) ** 0.5,
        "weightedmean": (states * counts).sum(0) / counts.sum(),
    }[name]


@pytest.mark.parametrize(
    "names",
    [["cls"], ["lasttoken"], ["max"], ["mean_sqrt_len_tokens"], ["weightedmean"], ["mean", "cls"]],
    ids="+".join,
)
def test_poolings_are_those_of_sentence_transformers(tmp_path: Path, names: list[str]) -> None:
    directory = write_encoder(tmp_path, pooling=names, rest=[NORMALIZE])
    reference = reference_encoder(directory)
    vectors = packed_encoder(directory, reference)(TEXTS)
    states = [hidden_states(reference, text) for text in TEXTS]
    wanted = torch.stack([torch.cat([pooled(s, name) for name in names]) for s in states])
    torch.testing.assert_close(vectors, normalize(wanted, dim=-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bert", {"architectures": ["BertForSequenceClassification"]}),
        ("roberta", {"architectures": ["RobertaForSequenceClassification"]}),
        ("deberta-v2", {"architectures": ["DebertaV2ForSequenceClassification"]}),
        pytest.param(
            "modernbert",
            {"architectures": ["ModernBertForSequenceClassification"], "classifier_pooling": "mean"},
            marks=pytest.mark.slow,
        ),
        pytest.param("distilbert", {"architectures": ["DistilBertForSequenceClassification"]}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_scores_equal_those_of_the_models_own_head(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    directory = write_plain(tmp_path, family, **changes, id2label={"0": "LABEL_0"})
    reference = reference_encoder(directory)
    types = (
        [[0] * (len(text) // 2) + [1] * (len(text) - len(text) // 2) for text in TEXTS] if family == "bert" else None
    )
    scores = packed_encoder(directory, reference)(TEXTS, types)
    for number, text in enumerate(TEXTS):
        kinds = {} if types is None else {"token_type_ids": torch.tensor([types[number]])}
        with torch.inference_mode():
            logit = reference(input_ids=torch.tensor([text]), **kinds).logits[0]
        torch.testing.assert_close(scores[number], logit.sigmoid(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "found"),
    [
        ("fnet", "takes no attention_mask"),
        ("convbert", "mixes tokens of different texts"),
    ],
)
def test_what_the_interfaces_do_not_reach_is_refused(tmp_path: Path, family: str, found: str) -> None:
    name = {"fnet": "FNetModel", "convbert": "ConvBertModel"}[family]
    with pytest.raises(UnsupportedModelError, match=found):
        build_request(ModelSpec.of(write_plain(tmp_path, family, architectures=[name])))


def test_a_text_longer_than_the_table_of_positions_is_refused(tmp_path: Path) -> None:
    directory = write_plain(tmp_path, "roberta")
    (directory / "tokenizer_config.json").unlink()  # so that all 66 rows count, of which the first is number 2
    with pytest.raises(UnsupportedModelError, match="positions for 64"):
        build_request(ModelSpec.of(directory))


def test_a_bundle_is_of_texts_that_the_table_of_positions_has_room_for(tmp_path: Path) -> None:
    directory = write_encoder(tmp_path, "roberta")  # of texts of up to 48 tokens
    facts = build_request(ModelSpec.of(directory)).facts
    for longest, fit in ((60, True), (65, False)):
        (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}))
        differing = [d for d in check(facts, asked=ModelSpec.of(directory).asked) if d.fact.kind == "most"]
        assert [str(d) for d in differing] == ([] if fit else ["most text tokens: bundle 64, here 65"])


def test_weights_may_be_named_as_a_model_with_a_head_has_them(tmp_path: Path) -> None:
    request = build_request(ModelSpec.of(write_encoder(tmp_path, rest=[DENSE])))
    name = "embeddings.LayerNorm.weight"
    assert request.sources[f"model.{name}"] == Take(name, (32,), f"bert.{name}")
    assert request.sources["dense.0.weight"] == Take("2_Dense/linear.weight", (20, 32))
    assert not any("pooler" in parameter for parameter, _ in request.module.named_parameters())
