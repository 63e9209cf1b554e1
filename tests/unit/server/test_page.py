"""The page at /, in a headless Chromium where there is one."""

from __future__ import annotations

import time

import httpx
import pytest

from piecework.server.pages.routes import content_policy
from piecework.server.settings import ServerSettings
from tests.unit.server.browser import browser_page, find_browser
from tests.unit.server.fake import FakeService, ready
from tests.unit.server.live import eventually, live_server

BROWSER = find_browser()
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")
SETTINGS = ServerSettings(model_names=("fake",))


@pytest.fixture(scope="module")
def page():
    with browser_page(BROWSER) as page:
        yield page
        assert page.problems == []


def _press(page) -> None:
    page.evaluate("document.getElementById('go').click()")


def _is_ready(page) -> None:
    page.wait("document.getElementById('state').dataset.state === 'ready'")


@in_browser
def test_a_prompt_is_continued_token_by_token(page):
    service = FakeService(step_s=0.02)
    with live_server(ready(service), SETTINGS) as url:
        page.open(url)
        _is_ready(page)
        page.evaluate("document.getElementById('prompt').value = 'Hello <b>world</b>'")
        page.evaluate("document.getElementById('tokens').value = 60")
        _press(page)
        seen = set()
        while page.text("#reason") == "–":
            seen.add(len(page.text("#output")))
            time.sleep(0.01)
        assert len(seen) > 10  # it grew, and didn't come at once
        asked = {"model": "fake", "prompt": "Hello <b>world</b>", "max_tokens": 60, "temperature": 0}
        expected = httpx.post(f"{url}/v1/completions", json=asked, timeout=10).json()["choices"][0]["text"]
        assert page.text("#output") == "Hello <b>world</b>" + expected
        assert (page.text("#reason"), page.text("#count")) == ("length", "60")
        assert page.text("#ttft").endswith("ms")
        assert float(page.text("#rate")) > 1


@in_browser
def test_it_shows_the_start_the_bundle_and_the_figures(page):
    service = FakeService(step_s=0.005)
    with live_server(ready(service), SETTINGS) as url:
        page.open(url)
        _is_ready(page)
        assert page.text("#model") == "fake"
        names = "[...document.querySelectorAll('.phase b')].map(each => each.textContent).join()"
        assert page.wait(names) == "weights,tokenizer"
        page.wait("!document.getElementById('bundle-card').hidden")
        assert "3 compiled for 9 places" in page.text("#bundle")
        assert page.text("#bundle-hit") == "from the store"
        rects = "[...document.querySelectorAll('#plan rect title')].map(each => each.textContent).join()"
        assert page.evaluate(rects) == "piece 0 [aa] model.layers 0,piece 1 [bb] model.layers 0-1"
        cut_off = "[...document.querySelectorAll('.phase b')].some(each => each.scrollWidth > each.clientWidth + 1)"
        assert not page.evaluate(cut_off)
        page.evaluate("document.getElementById('prompt').value = 'Hello'")
        page.evaluate("document.getElementById('tokens').value = 2000")
        _press(page)
        page.wait("document.getElementById('running').textContent === '1'")
        assert page.text("#kv-text") == "KV cache: 4 of 100 blocks"
        page.wait("parseFloat(document.getElementById('tps').textContent) > 0")
        _press(page)  # it stops
        page.wait("document.getElementById('between').textContent.endsWith('ms')")


@in_browser
def test_a_conversation_goes_on_and_another_begins(page):
    service = FakeService()
    service.says = "Yes."
    with live_server(ready(service), SETTINGS) as url:
        page.open(url)
        _is_ready(page)
        assert page.evaluate("document.getElementById('prompt').value") == ""
        page.evaluate("document.querySelector('input[value=chat]').click()")
        for number, text in enumerate(("Hello?", "And now?"), start=1):
            page.evaluate(f"document.getElementById('prompt').value = '{text}'")
            _press(page)
            page.wait(f"state.turns.length === {2 * number}")
        assert page.text("#output") == "Hello?Yes.And now?Yes."
        prompt = service.decode(service.seen[-1].prompt)
        assert prompt == "user: Hello?\nassistant: Yes.\nuser: And now?\nassistant:"
        page.evaluate("document.getElementById('new').click()")
        assert (page.text("#output"), page.evaluate("state.turns.length")) == ("", 0)


@in_browser
def test_stopping_frees_the_memory(page):
    service = FakeService(step_s=0.02)
    with live_server(ready(service), SETTINGS) as url:
        page.open(url)
        _is_ready(page)
        page.evaluate("document.querySelector('input[value=chat]').click()")
        page.evaluate("document.getElementById('prompt').value = 'Hello'")
        page.evaluate("document.getElementById('tokens').value = 1000")
        _press(page)
        page.wait("Number(document.getElementById('count').textContent) > 3")
        assert len(service.active) == 1
        _press(page)
        assert eventually(lambda: not service.active, seconds=1)
        page.wait("document.getElementById('go').textContent === 'Generate'")
        assert page.text("#reason") == "you"


@in_browser
def test_it_asks_for_the_key_and_says_what_goes_wrong(page):
    service = FakeService()
    with live_server(ready(service), ServerSettings(model_names=("fake",), api_key="sesame")) as url:
        page.open(url)
        page.wait("!document.getElementById('key-card').hidden")
        assert page.text("#state span") == "locked"
        page.problems.clear()  # that the browser was refused is what this is about
        page.evaluate("document.getElementById('key').value = 'sesame'")
        page.evaluate("document.getElementById('key-form').requestSubmit()")
        _is_ready(page)
        assert page.evaluate("document.getElementById('key-card').hidden")
        page.evaluate("document.getElementById('prompt').value = 'x'.repeat(5000)")
        _press(page)
        page.wait("!!document.querySelector('#output .error')")
        assert "prompt: 5000 tokens" in page.text("#output .error")
        page.problems.clear()
        service.fail_after = 2
        page.evaluate("document.getElementById('prompt').value = 'x'")
        _press(page)
        page.wait("document.querySelector('#output .error')?.textContent.includes('failed while generating')")


@in_browser
def test_it_shows_a_compile_that_is_under_way(page):
    service = FakeService()
    status = ready(service)
    status.compile_begins(reason="torch version: bundle 1, here 2", backend="aoti")
    status.compile_goes_on("compiling", done=1, total=3)
    with live_server(status, SETTINGS) as url:
        page.open(url)
        page.wait("!document.getElementById('compile-card').hidden")
        assert page.text("#compile-reason") == "torch version: bundle 1, here 2"
        assert page.text("#compile-stage") == "aoti: compiling, 1 of 3"
        assert not page.evaluate("document.getElementById('go').disabled")
        status.compile_ends()
        page.wait("document.getElementById('compile-card').hidden")


@in_browser
def test_it_fits_a_phone(page):
    with live_server(ready(FakeService()), SETTINGS) as url:
        page.open(url, width=360, height=700)
        _is_ready(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_page_loads_nothing_and_runs_only_itself(url):
    response = httpx.get(url)
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert policy.count("sha256-") == 2
    for word in ("http://", "https://", "src=", "@import"):
        assert word not in response.text.replace("http://www.w3.org/2000/svg", "")


def test_the_interface_is_shown_without_scripts(url):
    response = httpx.get(f"{url}/docs")
    assert "script-src 'none'" in response.headers["content-security-policy"]
    for word in ("/v1/chat/completions", "tool_choice", "none | auto | required", "/tokenize", "The request asks"):
        assert word in response.text
    assert "<script" not in response.text


def test_a_policy_without_scripts_allows_none():
    assert "script-src 'none'" in content_policy("<p>hello</p>")
