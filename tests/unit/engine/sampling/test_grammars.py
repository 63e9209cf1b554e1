"""Output that has to match a schema or a regular expression, of models that know nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from piecework.engine.sampling.sampler import Sampler, SamplingRow
from piecework.engine.sampling_params import SamplingParams, StructuredOutput
from piecework.engine.text.tokenizer import Tokenizer
from piecework.errors import MissingPackageError, RequestError
from tests.unit.engine import tokenizers_of_tests as small

SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 6},
                       "age": {"type": "integer", "maximum": 120, "minimum": 0}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "choices": {"type": "object", "properties": {"c": {"enum": ["red", 7, None, True]}}, "required": ["c"],
                "additionalProperties": False},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "nested": {
        "$defs": {"point": {"type": "object", "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 9}},
                            "required": ["x"], "additionalProperties": False}},
        "type": "object",
        "properties": {"points": {"type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 1, "maxItems": 2},
                       "kind": {"const": "a"}},
        "required": ["points", "kind"],
        "additionalProperties": False,
    },
    "either": {"anyOf": [{"type": "string", "pattern": "^[a-c]{1,3}$"}, {"type": "null"}]},
}  # fmt: skip


def generate(
    tokenizer: Tokenizer, params: SamplingParams, *, seed: int, vocab: int, most: int = 600, others: int = 2
) -> list[int]:
    """Return what random logits come to, with other rows in the batch; it has to end by itself."""
    sampler = Sampler(vocab_size=vocab, eos_token_ids=(small.EOS,), tokenizer=tokenizer)
    sampler.check(params)
    random = torch.Generator().manual_seed(seed)
    generated: list[int] = []
    rows = [SamplingRow((f"other{place}", 0), SamplingParams(), (1,), ()) for place in range(others)]
    row = SamplingRow(("r", 0), params, (1,), generated)
    while len(generated) < most:
        logits = torch.randn(others + 1, vocab, generator=random)
        logits[:, small.EOS] += 2.0
        token = sampler.sample(logits, [*rows, row])[-1].token
        if token == small.EOS:
            return generated
        generated.append(token)
    raise AssertionError(f"no end after {tokenizer.decode(generated)!r}")


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "top_p": 0.9, "top_k": 40}]
)
def test_json_always_parses(schema: dict[str, Any], params: dict[str, Any]) -> None:
    tokenizer = small.byte_level()
    structured = StructuredOutput(json_schema=schema)
    for seed in range(4):
        tokens = generate(tokenizer, SamplingParams(structured=structured, **params), seed=seed, vocab=417)
        check(json.loads(tokenizer.decode(tokens)), schema)


def check(value: Any, schema: dict[str, Any]) -> None:
    """Fail where the value doesn't match, as far as the schemas above go."""
    if schema is SCHEMAS["flat"]:
        assert set(value) == {"name", "age"}
        assert len(value["name"]) <= 6
        assert type(value["age"]) is int
        assert 0 <= value["age"] <= 120
    elif schema is SCHEMAS["choices"]:
        assert value["c"] in ("red", 7, None, True)
    elif schema is SCHEMAS["array"]:
        assert 2 <= len(value) <= 4
        assert all(type(item) is bool for item in value)
    elif schema is SCHEMAS["nested"]:
        assert value["kind"] == "a"
        assert all(set(point) == {"x"} and -9 <= point["x"] <= 9 for point in value["points"])
    else:
        assert value is None or re.fullmatch("[a-c]{1,3}", value)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace"])
@pytest.mark.parametrize("regex", ["[0-9]{2}-[0-9]{2}", "(cat|at){1,3}", "a[.]b|c:d"])
def test_regular_expressions_with_every_kind_of_tokenizer(kind: str, regex: str) -> None:
    tokenizer: Tokenizer = getattr(small, kind)()
    params = SamplingParams(structured=StructuredOutput(regex=regex), temperature=1.0, seed=2)
    for seed in range(4):
        tokens = generate(tokenizer, params, seed=seed, vocab=tokenizer.num_tokens + 3)
        assert re.fullmatch(regex, b"".join(tokenizer.token_bytes(tokens)).decode())


@pytest.mark.parametrize(
    ("structured", "texts"),
    [
        (StructuredOutput(choice=["red", "a b", 'c"d']), {"red", "a b", 'c"d'}),
        (StructuredOutput(grammar='start: "x" digit\ndigit: "1" | "2"'), {"x1", "x2"}),
        (StructuredOutput(grammar='root ::= "y" [ab]'), {"ya", "yb"}),
        (StructuredOutput(json_schema='{"enum": [7]}'), {"7"}),
    ],
)
def test_choices_and_grammars(structured: StructuredOutput, texts: set[str]) -> None:
    tokenizer = small.byte_level()
    params = SamplingParams(structured=structured, temperature=1.0, seed=5)
    assert {tokenizer.decode(generate(tokenizer, params, seed=seed, vocab=417)) for seed in range(6)} <= texts


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace"])
def test_text_that_is_given_is_written_as_the_model_knows_it(kind: str) -> None:
    tokenizer: Tokenizer = getattr(small, kind)()
    text = 'the "name": "weather" at'
    params = SamplingParams(structured=StructuredOutput(regex=re.escape(text)))
    tokens = generate(tokenizer, params, seed=1, vocab=tokenizer.num_tokens + 3)
    assert b"".join(tokenizer.token_bytes(tokens)).decode() == text
    if kind == "byte_level":
        assert tokens == tokenizer.encode(text, add_special_tokens=False)
    assert len(tokens) <= len(text.encode())


def test_any_json_object() -> None:
    tokenizer = small.byte_level()
    braces = dict.fromkeys(tokenizer.encode("{") + tokenizer.encode("}"), 100.0)
    params = SamplingParams(structured=StructuredOutput(json_object=True), logit_bias=braces)
    assert json.loads(tokenizer.decode(generate(tokenizer, params, seed=0, vocab=400))) == {}


def test_characters_outside_ascii_come_whole() -> None:
    tokenizer = small.byte_level()
    structured = StructuredOutput(regex="[漢字🙂]{5}")
    tokens = generate(tokenizer, SamplingParams(structured=structured), seed=1, vocab=400)
    assert re.fullmatch("[漢字🙂]{5}", tokenizer.decode(tokens))


def test_spaces_end() -> None:
    tokenizer = small.byte_level()
    space = tokenizer.encode(" ")[0]
    structured = StructuredOutput(json_schema=SCHEMAS["choices"])
    params = SamplingParams(structured=structured, logit_bias={space: 50.0})
    tokens = generate(tokenizer, params, seed=1, vocab=400)
    assert json.loads(tokenizer.decode(tokens))["c"] in ("red", 7, None, True)


def test_the_end_of_a_text_beats_min_tokens() -> None:
    tokenizer = small.byte_level()
    params = SamplingParams(structured=StructuredOutput(regex="ab"), min_tokens=20)
    assert tokenizer.decode(generate(tokenizer, params, seed=1, vocab=400)) == "ab"


def test_a_preempted_or_repeated_sequence_is_constrained_alike() -> None:
    tokenizer = small.byte_level()
    sampler = Sampler(vocab_size=400, eos_token_ids=(small.EOS,), tokenizer=tokenizer)
    params = SamplingParams(structured=StructuredOutput(regex="abc"))
    a, b, c = tokenizer.encode("a") + tokenizer.encode("b") + tokenizer.encode("c")
    logits = torch.zeros(1, 400)

    def choose(generated: Sequence[int]) -> int:
        return sampler.sample(logits, [SamplingRow(("r", 0), params, (1,), generated)])[0].token

    assert choose([a]) == b
    assert choose([a, b]) == c
    assert choose([]) == a
    sampler.forget(("r", 0))
    assert choose([a, b]) == c
    assert choose([a, b, c]) == small.EOS


@pytest.mark.parametrize(
    ("structured", "found"),
    [
        (StructuredOutput(regex="(ab"), "unclosed group"),
        (StructuredOutput(regex="(?=a)b"), "look-around"),
        (StructuredOutput(json_schema={"type": "foo"}), "foo"),
        (StructuredOutput(json_schema={"type": "object", "properties": 3}), "properties"),
        (StructuredOutput(json_schema={"$ref": "#/$defs/missing"}), "missing"),
        (StructuredOutput(grammar="no grammar"), "Ref|grammar|rule"),
        (StructuredOutput(grammar="".join(f"r{i}: r{i + 1}\n" for i in range(20_000))), "too deep"),
        (
            StructuredOutput(json_schema={"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(9_000)}}),
            "too deep",
        ),
    ],
)
def test_what_cannot_be_matched_is_refused(structured: StructuredOutput, found: str) -> None:
    sampler = Sampler(vocab_size=400, eos_token_ids=(small.EOS,), tokenizer=small.byte_level())
    for _ in range(2):
        with pytest.raises(RequestError, match=found):
            sampler.check(SamplingParams(structured=structured))


def test_without_a_tokenizer_it_is_refused() -> None:
    with pytest.raises(RequestError, match="tokenizer"):
        Sampler(vocab_size=400, eos_token_ids=(1,)).check(SamplingParams(structured=StructuredOutput(json_object=True)))


def test_without_the_extra_it_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    sampler = Sampler(vocab_size=400, eos_token_ids=(1,), tokenizer=small.byte_level())
    with pytest.raises(MissingPackageError, match=r"pip install 'piecework\[structured\]'"):
        sampler.check(SamplingParams(structured=StructuredOutput(json_object=True)))


def test_the_extra_is_imported_only_when_needed_and_brings_no_compiler() -> None:
    code = """
import sys
from piecework.engine.sampling.sampler import Sampler
from piecework.engine.sampling_params import SamplingParams, StructuredOutput
from tests.unit.engine.tokenizers_of_tests import byte_level
sampler = Sampler(vocab_size=400, eos_token_ids=(1,), tokenizer=byte_level())
sampler.check(SamplingParams())
assert "llguidance" not in sys.modules
sampler.check(SamplingParams(structured=StructuredOutput(json_object=True)))
assert "llguidance" in sys.modules
banned = {"transformers", "triton", "sympy", "torch._dynamo", "torch._inductor"} & set(sys.modules)
assert not banned, banned
"""
    subprocess.run([sys.executable, "-c", code], check=True)
