"""What a request may ask of the sampler."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import piecework
from piecework.engine.sampling_params import SamplingParams, StructuredOutput
from piecework.errors import RequestError


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"min_tokens": -1}, "min_tokens -1"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens 9"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -2}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logit_bias": {3: 101.0}}, "for token 3"),
        ({"logit_bias": {-3: 1.0}}, "token id -3"),
        ({"stop_token_ids": [4, -1]}, "token id -1"),
        ({"stop": ["a", ""]}, 'the stop string ""'),
        ({"seed": 2**63}, "seed"),
        ({"logprobs": -1}, "logprobs -1"),
        ({"prompt_logprobs": -1}, "prompt_logprobs -1"),
        ({"n": 0}, "n 0"),
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any], found: str) -> None:
    with pytest.raises(RequestError, match=found):
        SamplingParams(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [{}, {"regex": "a", "json_object": True}, {"json_schema": {}, "regex": ""}, {"json_schema": {"a": {1, 2}}}],
)
def test_structured_output_is_one_thing(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        StructuredOutput(**wrong)


def test_equal_constraints_have_equal_keys() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    assert StructuredOutput(json_schema=schema).key == StructuredOutput(json_schema=dict(schema)).key
    turned = {"type": "object", "properties": {"a": {}, "b": {}}}
    assert StructuredOutput(json_schema=schema).key != StructuredOutput(json_schema=turned).key
    assert StructuredOutput(regex="{}").key != StructuredOutput(json_schema={}).key


def test_lists_and_single_strings_are_taken() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[3])
    assert (params.stop, params.stop_token_ids) == (("end",), (3,))
    assert params == SamplingParams(stop=["end"], stop_token_ids=(3,))
    assert hash(params) == hash(SamplingParams(stop=["end"], stop_token_ids=(3,)))


def test_a_top_k_of_minus_one_is_all_tokens() -> None:
    assert SamplingParams(top_k=-1).top_k == 0


def test_what_is_given_can_be_changed_later() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 1000.0
    assert params.logit_bias == {1: 2.0}


@pytest.mark.parametrize(
    ("params", "plain"),
    [
        ({}, True),
        ({"stop": "a", "n": 3, "seed": 1, "top_k": 4, "temperature": 1e-6, "ignore_eos": True}, True),
        ({"temperature": 1.0}, False),
        ({"logprobs": 0}, False),
        ({"presence_penalty": 0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"frequency_penalty": 0.1}, False),
        ({"logit_bias": {1: 1.0}}, False),
        ({"min_tokens": 1}, False),
        ({"structured": StructuredOutput(regex="a")}, False),
    ],
)
def test_plain_is_an_argmax_and_nothing_else(params: dict[str, Any], plain: bool) -> None:
    assert SamplingParams(**params).plain is plain


def test_it_is_public_and_needs_no_torch() -> None:
    assert piecework.SamplingParams is SamplingParams
    code = "import sys, piecework; piecework.SamplingParams(n=2); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
