"""The page in a real browser, of a swarm of 10,000 nodes that is not there: how fast it is, and how much it keeps."""

from collections.abc import Iterator

import pytest
from browser import Visit, chromium, needs_chromium, served, visit
from playwright.sync_api import Browser
from simulated_readings import Asked, large_swarm

pytestmark = [needs_chromium, pytest.mark.timeout(300)]

NODES = 10_000
_FIRST_PAINT_MS = 1000
_FIGURES_MS = 4000
_TRIES = 5
"""The best of so many counts: other programs need the processor too."""
_HEAP_BYTES = 48 * 2**20


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    asked = Asked(tmp_path_factory.mktemp("many"), large_swarm(NODES, grid=(256, 256)))
    with served(asked.app) as address:
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


def first_paint_and_figures_ms(browser: Browser, address: str) -> tuple[float, float]:
    """From the start of the navigation until the page paints, and until the swarm's figures are there."""
    with visit(browser, address) as seen:
        assert seen.text("#tile-nodes .figure") == "10,000"
        figures = float(seen.page.evaluate("performance.now()"))
        paint = "performance.getEntriesByName('first-contentful-paint')"
        seen.until(f"{paint}.length > 0")
        return float(seen.page.evaluate(f"{paint}[0].startTime")), figures


def test_first_paint_takes_less_than_a_second(browser: Browser, address: str) -> None:
    taken = [first_paint_and_figures_ms(browser, address) for _ in range(_TRIES)]
    print(f"first paint and figures, ms: {taken}")
    assert min(paint for paint, _ in taken) < _FIRST_PAINT_MS, taken
    assert min(figures for _, figures in taken) < _FIGURES_MS, taken


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


def test_memory_is_bounded_over_many_readings(seen: Visit) -> None:
    session = seen.page.context.new_cdp_session(seen.page)
    for _ in range(20):  # as many readings, each of which is read and drawn again
        seen.page.evaluate("dispatchEvent(new CustomEvent('theme'))")
        seen.page.locator("#ranges button").last.click()
        seen.page.wait_for_timeout(50)
    session.send("HeapProfiler.collectGarbage")
    assert session.send("Runtime.getHeapUsage")["usedSize"] < _HEAP_BYTES
