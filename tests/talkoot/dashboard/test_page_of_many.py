"""The page in a real browser, with an invented swarm of 10,000 nodes: how fast it is, and how much memory it keeps."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from browser import WAIT_MS, Visit, chromium, needs_chromium, served, visit
from playwright.sync_api import Browser
from simulated_readings import Asked, large_swarm

pytestmark = [needs_chromium, pytest.mark.timeout(600)]

NODES = 10_000
_HEAP_BYTES = 48 * 2**20


@pytest.fixture(scope="module")
def may_answer() -> threading.Event:
    """Until it is set, the server sends only the page, without data."""
    event = threading.Event()
    event.set()
    return event


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, may_answer: threading.Event) -> Iterator[str]:
    asked = Asked(tmp_path_factory.mktemp("many"), large_swarm(NODES, grid=(256, 256)))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"].startswith(("/api/", "/events")):
            await asyncio.to_thread(may_answer.wait)
        await asked.app(scope, receive, send)

    with served(app) as address:
        yield address
    asked.history.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def seen(browser: Browser, address: str) -> Iterator[Visit]:
    with visit(browser, address) as seen:
        seen.until("document.querySelectorAll('#nodes-table tbody tr').length === 25")
        seen.until("document.querySelector('#grid-side h3') !== null")
        yield seen


def test_the_page_paints_before_the_server_says_what_it_shows(
    browser: Browser, address: str, may_answer: threading.Event
) -> None:
    may_answer.clear()
    try:
        with browser.new_context() as context:
            context.set_default_timeout(WAIT_MS)
            seen = Visit(context.new_page())
            seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
            seen.page.goto(address)
            seen.until("performance.getEntriesByName('first-contentful-paint').length > 0")
            assert "10,000" not in seen.text("body")
            seen.page.get_by_role("button", name="Freshness").click()
            may_answer.set()
            seen.until("document.querySelector('#tile-nodes .figure')?.textContent === '10,000'")
            assert not seen.complaints, seen.complaints
    finally:
        may_answer.set()


def test_the_figures_need_few_bytes(seen: Visit) -> None:
    """So they take little time: they are not sent together with all nodes and experts."""
    entries = "performance.getEntriesByType('resource').map(entry => [entry.name, entry.decodedBodySize])"
    sizes: Counter[str] = Counter()
    for name, size in seen.page.evaluate(entries):
        if "/api/v1/" in name:
            sizes[name.split("/api/v1/")[1].split("?")[0]] += size
    print(sizes)
    assert max(sizes["nodes"], sizes["trainers"], sizes["leaderboard"], sizes["history"]) < 32 * 1024, sizes
    assert sizes["experts"] < 2**20, sizes  # of a layer of 65,536, for the map


def test_all_are_counted_and_one_page_is_shown(seen: Visit) -> None:
    assert seen.text("#tile-nodes .figure") == "10,000"
    assert seen.text("#tile-experts .figure") == "65,536"
    assert seen.text("#nodes-table .pager .note") == "1–25 of 10,000 nodes"
    assert seen.overflow() == 0


def test_pages_are_turned_and_nodes_found_at_the_server(seen: Visit) -> None:
    seen.page.locator("#nodes-table").get_by_role("button", name="Last page").click()
    seen.until("document.querySelector('#nodes-table .note').textContent.startsWith('9,976–10,000 of')")
    seen.page.locator("#nodes-filter").fill("volunteer 4321")
    seen.until("document.querySelectorAll('#nodes-table tbody tr').length === 1")
    assert "volunteer 4321" in seen.text("#nodes-table tbody")


def test_sort_by_a_column(seen: Visit) -> None:
    seen.page.locator("#nodes-table").get_by_role("button", name="Rows/s").click()
    seen.until("document.querySelector('#nodes-table tbody tr').textContent.includes('volunteer 9999')")
    assert seen.page.locator("#nodes-table th[aria-sort=descending]").inner_text().startswith("Rows/s")


def test_grid_of_65536_experts_is_drawn_and_listed(seen: Visit) -> None:
    seen.page.locator("#heatmap").focus()
    seen.page.keyboard.press("End")
    assert seen.text("#heatmap-cell").startswith("Expert 0.255.255: ")
    seen.page.locator("#grid-as-table").click()
    seen.until("document.querySelector('#grid-table .note').textContent.includes('of 65,536 experts')")
    assert seen.page.locator("#grid-table tbody tr").count() == 50


@pytest.mark.parametrize("readings", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_memory_is_bounded_over_many_readings(seen: Visit, readings: int) -> None:
    session = seen.page.context.new_cdp_session(seen.page)
    for _ in range(readings):  # each of them is read and drawn again
        seen.page.evaluate("dispatchEvent(new CustomEvent('theme'))")
        seen.page.locator("#ranges button").last.click()
        seen.page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    session.send("HeapProfiler.collectGarbage")
    assert session.send("Runtime.getHeapUsage")["usedSize"] < _HEAP_BYTES
