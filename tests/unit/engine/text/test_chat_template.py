"""Chat templates: tools, content in parts, messages to be continued; the same text as transformers gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from piecework.engine.text.chat_template import ChatTemplate
from piecework.engine.text.tokenizer import load_tokenizer
from piecework.errors import RequestError
from tests.unit.engine import tokenizers_of_tests as small

TEMPLATE = """
{%- if tools %}
  {{- bos_token + "tools: " }}
  {%- for tool in tools %}
    {{- tool | tojson(indent=2) + "\\n" }}
  {%- endfor %}
{%- endif %}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
  {%- if message.role == "skip" %}{% continue %}{% endif %}
  {%- set ns.count = ns.count + 1 %}
<{{ message.role }}>
{%- if message.tool_calls %}
  {%- for call in message.tool_calls %}{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}
{%- endif %}
{%- if message.role == "assistant" %}{% generation %}{{ message.content }}{% endgeneration %}
{%- else %}{{ message.content | trim }}{% endif %}
{{- eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
<assistant {{ ns.count }}{% if thinking is defined and thinking %} thinking{% endif %}>
{%- endif %}
"""
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "title": "a<b>ü"}}}]
MESSAGES = [
    {"role": "user", "content": " Wetter? "},
    {"role": "skip", "content": "not shown"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "weather", "arguments": {"at": "Zürich"}}}],
    },
    {"role": "tool", "content": "sun"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def make_template(source: str = TEMPLATE) -> ChatTemplate:
    return ChatTemplate(source, special_tokens=SPECIAL)


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("extra", [{}, {"thinking": True}])
def test_the_text_is_that_of_transformers(tools: list[dict[str, Any]] | None, extra: dict[str, Any]) -> None:
    expected = render_jinja_template(
        [MESSAGES], tools=tools, chat_template=TEMPLATE, add_generation_prompt=True, **SPECIAL, **extra
    )[0]
    assert make_template().render(MESSAGES, tools=tools, extra=extra) == (
        expected if isinstance(expected, str) else expected[0]
    )


def test_arguments_of_tool_calls_and_content_may_come_as_openai_has_them() -> None:
    call = {"function": {"name": "weather", "arguments": '{"at": "Zürich"}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": " Wet"}, {"type": "text", "text": "ter?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sun"},
    ]
    plain = [{"role": "user", "content": " Wet\nter?"}, *MESSAGES[2:]]
    assert make_template().render(messages) == make_template().render(plain)


@pytest.mark.parametrize("arguments", ["not JSON", ""])
def test_what_a_model_wrote_as_arguments_need_not_be_json(arguments: str) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    text = make_template().render([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert f"f({'{}' if not arguments else chr(34) + arguments + chr(34)})" in text


def test_other_content_than_text_is_refused() -> None:
    with pytest.raises(RequestError, match="image_url"):
        make_template().render([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


def test_the_last_message_can_be_continued() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good "}]
    text = make_template().render(messages, continue_final_message=True)
    assert text == "<user>Hi</s><assistant>Good "
    with pytest.raises(RequestError, match="can't be continued"):
        make_template("{{ messages[0].role }}").render(messages, continue_final_message=True)
    with pytest.raises(RequestError, match="no last message"):
        make_template().render([], continue_final_message=True)


def test_what_a_request_adds_hides_nothing() -> None:
    template = make_template("{{ bos_token }}{{ messages | length }}{{ tools }}{{ strftime_now('%%') }}")
    assert template.render(MESSAGES, extra={"messages": [], "bos_token": "?", "tools": 1}) == "<s>4None%"


@pytest.mark.parametrize(
    "source", ["{{ 1 / 0 }}", "{{ messages[9].role }}", "{{ messages | tojson(indent='x') + 1 }}", "{% generation %}"]
)
def test_templates_that_fail_say_so(source: str) -> None:
    with pytest.raises(RequestError, match="template fails"):
        make_template(source).render(MESSAGES)


def test_a_template_for_tools_is_taken_where_there_are_tools(tmp_path: Path) -> None:
    small.byte_level_library_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("plain")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.render_chat(MESSAGES) == "plain"
    assert tokenizer.render_chat(MESSAGES, tools=TOOLS) == "with tools"
    with pytest.raises(RequestError, match="neither chat_template"):
        small.byte_level().render_chat(MESSAGES)


def test_developers_are_what_older_templates_call_the_system() -> None:
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": "Hi"}]
    assert make_template(source).render(messages) == "system: be kind;user: Hi;"
