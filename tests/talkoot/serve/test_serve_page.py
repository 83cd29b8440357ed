"""The page for trying a model, in a real browser."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from browser import Visit, chromium, needs_chromium, visit
from playwright.sync_api import Browser
from served_model import answering, served, small_model
from shelf import QUESTIONS, SHELF, learned

from peer.loop import LoopThread
from talkoot.serve.app import STATIC
from talkoot.serve.model import ServedModel

pytestmark = pytest.mark.timeout(300)
INDEX = (STATIC / "index.html").read_text()
SCRIPTS = sorted(STATIC.glob("*.js"))
NODES = frozenset({'<img src=x onerror="alert(1)"> (abc)', "aino (def)"})


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return small_model()


@pytest.fixture(scope="module")
def address(loop: LoopThread, model: ServedModel) -> Iterator[str]:
    with served(loop, model, max_tokens=10**6) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def seen(browser: Browser, address: str) -> Iterator[Visit]:
    with visit(browser, address, ready=READY) as seen:
        yield seen


READY = "document.querySelector('#state').textContent.includes('experts')"


def continues(seen: Visit, prompt: str, tokens: int = 30) -> None:
    seen.page.get_by_label("Text to continue").fill(prompt)
    seen.page.get_by_label("Tokens").fill(str(tokens))
    seen.page.get_by_role("button", name="Continue").click()


def written(seen: Visit) -> str:
    return str(seen.page.evaluate("document.querySelector('#written').textContent"))


@needs_chromium
def test_an_answer_is_written(seen: Visit) -> None:
    assert seen.text("#model") == "village"
    assert seen.text("#state") == "8 of 8 experts on this machine, context of 64 tokens"
    seen.page.get_by_label("Seed").fill("7")
    continues(seen, "In the sauna", tokens=30)
    seen.until("document.querySelector('#speed').textContent.startsWith('30 tokens in ')")
    first = written(seen)
    assert first
    assert seen.text("#given") == "In the sauna"
    for prompt in ("one must behave", "In the sauna"):
        seen.page.get_by_label("Text to continue").fill(prompt)
        seen.page.get_by_label("Text to continue").press("Control+Enter")
        seen.until(f"document.querySelector('#given').textContent === '{prompt}'")
        seen.until("document.querySelector('#speed').textContent.startsWith('30 tokens in ')")
    assert written(seen) == first, "the same seed"
    seen.page.get_by_role("button", name="Use as prompt").click()
    assert seen.page.get_by_label("Text to continue").input_value() == "In the sauna" + first


@needs_chromium
def test_a_question_is_answered_and_what_was_read_is_named(browser: Browser, loop: LoopThread) -> None:
    model, *_ = learned("rag-token", 60)
    with served(loop, answering(model, SHELF)) as address, visit(browser, address, ready=READY) as seen:
        assert seen.page.get_by_label("Temperature").is_hidden()
        seen.page.get_by_label("Question").fill(QUESTIONS[0].text)
        seen.page.get_by_role("button", name="Ask").click()
        seen.page.locator("#sources").wait_for()
        assert written(seen) == QUESTIONS[0].answer
        assert seen.text("#sources").startswith("Read: kiuas (sauna.txt, CC0-1.0)")


@needs_chromium
def test_an_answer_can_be_stopped_by_key_and_by_button(seen: Visit) -> None:
    seen.page.get_by_label("Text to continue").fill("In the sauna")
    seen.page.get_by_label("Tokens").fill("1000000")
    for stop in ("key", "button"):
        seen.page.get_by_role("button", name="Continue").click()
        seen.until("document.querySelector('#written').textContent.length > 20")
        if stop == "key":
            seen.page.keyboard.press("Escape")
        else:
            seen.page.get_by_role("button", name="Stop").click()
        seen.until("document.querySelector('#speed').textContent.endsWith('stopped')")
        assert seen.page.locator("#problem").is_hidden()


@needs_chromium
def test_a_refusal_is_told(seen: Visit) -> None:
    continues(seen, "x" * 65)
    seen.page.locator("#problem").wait_for()
    assert "65 tokens, but the model's context is 64" in seen.text("#problem")
    seen.complaints.clear()  # the browser writes each refusal to the console


@needs_chromium
def test_a_key_is_asked_for_where_one_is_needed(
    browser: Browser, loop: LoopThread, model: ServedModel, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("sauna-key\n")
    keys = tmp_path / "keys"
    with served(loop, model, api_key_file=keys) as address, visit(browser, address, ready=READY) as seen:
        continues(seen, "In the sauna")
        seen.page.locator("#problem").wait_for()
        assert "an API key is needed" in seen.text("#problem")
        seen.complaints.clear()
        seen.page.get_by_label("API key").fill("sauna-key")
        seen.page.get_by_role("button", name="Continue").click()
        seen.until("document.querySelector('#speed').textContent.includes(' tokens in ')")


@needs_chromium
def test_nodes_that_answered_are_named_as_text_alone(
    browser: Browser, loop: LoopThread, model: ServedModel
) -> None:
    model = replace(model, nodes=lambda: NODES)
    with served(loop, model) as address, visit(browser, address, ready=READY) as seen:
        continues(seen, "In the sauna")
        seen.page.locator("#nodes").wait_for()
        assert all(node in seen.text("#nodes") for node in NODES)
        assert seen.page.locator("img").count() == 0


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_nothing_is_wider_than_the_window(
    browser: Browser, address: str, scheme: Literal["light", "dark"], tmp_path: Path
) -> None:
    with visit(browser, address, scheme=scheme, height=1100, ready=READY) as seen:
        continues(seen, "In the sauna one must behave as in church.")
        seen.until("document.querySelector('#speed').textContent.includes(' tokens in ')")
        for width in (1440, 820, 360):
            seen.page.set_viewport_size({"width": width, "height": 1100})
            assert seen.overflow() == 0, width
            seen.page.screenshot(path=tmp_path / f"{scheme}-{width}.png")


def test_nothing_comes_from_elsewhere_and_no_text_becomes_markup() -> None:
    for path in (*SCRIPTS, STATIC / "index.html", STATIC / "page.css"):
        assert not re.search(r"https?:|//[a-z]+\.[a-z]+/|@import|url\(", path.read_text()), path
    for path in SCRIPTS:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(", path.read_text())
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", INDEX)
