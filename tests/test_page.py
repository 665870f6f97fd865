"""The chat page in a real browser: it streams, shows calls and statistics, and asks nobody else."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import chromium, is_here

pytest.importorskip("selenium", reason="needs the extra dev")

from scripted import END, Scripted, runtime
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from serving import Served, scripted, serving, until

from mimo_edge.api import Runtime
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.nano.commands import DEMO_TOOLS
from mimo_edge.serve.limits import Limits

pytestmark = pytest.mark.skipif(
    not is_here(), reason="needs Chromium and its driver (Debian: chromium, chromium-driver)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


def texts(browser: Any, selector: str) -> list[str]:
    # One script: what is looked up one by one may be gone meanwhile.
    found = browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
    )
    return [str(text) for text in found]


def text(browser: Any, identity: str) -> str:
    return texts(browser, f"#{identity}")[0]


def opened(browser: Any, served: Served) -> None:
    browser.get(served.url + "/")
    until(lambda: text(browser, "ram") != "–")


def say(browser: Any, words: str) -> None:
    browser.find_element(By.ID, "text").send_keys(words, Keys.ENTER)


def answered(browser: Any) -> None:
    until(lambda: not texts(browser, ".waiting") and bool(texts(browser, ".assistant, .error")))


def held_at(backend: Scripted, count: int) -> threading.Event:
    """The model goes on beyond so many tokens once the event is set."""
    whole, go_on = backend.next_logits, threading.Event()

    def held(tokens: list[int]) -> Any:
        if len(tokens) > count:
            assert go_on.wait(60)
        return whole(tokens)

    backend.next_logits = held  # type: ignore[method-assign]
    return go_on


def complaints(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def test_mimo_nano_dims_the_light(browser: Any, tmp_path: Path) -> None:
    export_bundle("mimo-nano", tmp_path / "nano").close()
    rt = Runtime.open(tmp_path / "nano", ram="2GiB")
    limits = Limits(concurrent=1, conversations=rt.planned_conversations or 1)
    with serving(rt, limits=limits, thinking=False, tools=DEMO_TOOLS) as served:
        opened(browser, served)
        assert text(browser, "model") == "mimo-nano"
        want = served.runtime.session(tools=DEMO_TOOLS, enable_thinking=False)
        (call,) = want.generate("把客厅的灯调暗一点").tool_calls
        say(browser, "把客厅的灯调暗一点")
        answered(browser)
        (shown,) = texts(browser, ".call")
        name, _, arguments = shown.partition("(")
        assert name == call.name
        assert json.loads(arguments.removesuffix(")")) == call.arguments
        # Its result goes back, and the model ends the turn.
        browser.find_element(By.CSS_SELECTOR, "form.results button").click()
        until(lambda: len(texts(browser, ".assistant")) == 2)
        answered(browser)
        assert texts(browser, ".assistant .text")[1] == want_after(want)
        # Live statistics: all of them numbers of this server.
        assert float(text(browser, "tps")) > 0
        assert float(text(browser, "accepted")) > 0
        assert text(browser, "first").endswith(" ms")
        assert text(browser, "ram").endswith(" of 2.00 GiB")
        assert text(browser, "hits") == "all in RAM" or text(browser, "hits").endswith(" %")
        assert not texts(browser, ".error")
        assert complaints(browser) == []


def want_after(session: Any) -> str:
    session.tool_result('{"status": "ok"}')
    return str(session.generate().text)


def test_text_streams_and_markup_stays_text(browser: Any) -> None:
    answer = "<think>hm</think><img src=x onerror=document.title=1><b>bold</b> " + "word " * 400
    with scripted([answer + END], draft=0) as (served, backend):
        go_on = held_at(backend, 300)
        opened(browser, served)
        say(browser, "hello <script>document.title=2</script>")
        # The model has not finished, and cannot: what is shown was streamed.
        until(lambda: " word" in "".join(texts(browser, ".text")))
        go_on.set()
        answered(browser)
        (shown,) = texts(browser, ".text")
        assert shown.startswith("<img src=x onerror=document.title=1><b>bold</b> word")
        assert texts(browser, ".reasoning") == ["hm"]
        assert texts(browser, ".user") == ["hello <script>document.title=2</script>"]
        assert browser.title == "mimo-edge"
        assert complaints(browser) == []


def test_the_page_asks_nobody_else(browser: Any) -> None:
    with scripted(["Hi." + END]) as (served, _):
        browser.get_log("performance")
        opened(browser, served)
        say(browser, "hello")
        answered(browser)
        asked = [
            message["params"]["request"]["url"]
            for entry in browser.get_log("performance")
            if (message := json.loads(entry["message"])["message"])["method"]
            == "Network.requestWillBeSent"
        ]
        assert f"{served.url}/v1/chat/completions" in asked
        assert all(url.startswith((served.url + "/", "data:")) for url in asked), asked
        # And could not: the policy forbids it.
        blocked = browser.execute_async_script(
            "const done = arguments[0];"
            "fetch('http://127.0.0.1:9/').then(() => done('sent'), () => done('no'));"
        )
        assert blocked == "no"
        assert any("Content Security Policy" in c for c in complaints(browser))


def test_stop_keeps_what_was_said(browser: Any) -> None:
    with scripted(["word " * 1800], draft=0) as (served, backend):
        go_on = held_at(backend, 300)
        opened(browser, served)
        say(browser, "hello")
        until(lambda: bool(texts(browser, ".text")) and len(texts(browser, ".text")[0]) > 20)
        browser.execute_script("document.getElementById('stop').click()")
        answered(browser)
        until(lambda: served.metric("abandoned_total") == 1)
        go_on.set()
        (shown,) = texts(browser, ".text")
        served.settled()
        assert 20 < len(shown) < 300
        assert not texts(browser, ".error")


def test_a_key_is_asked_for(browser: Any) -> None:
    rt, _ = runtime(["Hi." + END])
    with serving(rt, api_key="s3cret") as served:
        browser.get(served.url + "/")
        until(lambda: bool(texts(browser, ".error")))
        field = browser.find_element(By.ID, "key")
        assert field.is_displayed()
        field.send_keys("s3cret", Keys.ENTER)
        until(lambda: text(browser, "ram") != "–")
        say(browser, "hello")
        until(lambda: texts(browser, ".text") == ["Hi."])
        answered(browser)
        browser.get_log("browser")  # Chromium remarks on the 401


def test_errors_are_shown(browser: Any) -> None:
    with scripted(["Hi." + END]) as (served, _):
        opened(browser, served)
        browser.execute_script("document.getElementById('temperature').value = '-1'")
        say(browser, "hello")
        until(lambda: bool(texts(browser, ".error")))
        assert "temperature" in texts(browser, ".error")[0]
        assert not texts(browser, ".assistant")
        browser.get_log("browser")
