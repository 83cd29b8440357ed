"""The page in a real browser, on a real running swarm of three nodes and a trainer."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from browser import Visit, chromium, needs_chromium, visit
from live_swarm import ANNOUNCE_EVERY_S, EXPERTS, HOSTILE_NAME, LiveSwarm, live_swarm
from playwright.sync_api import Browser

WIDTHS = (1440, 820, 360)

pytestmark = [needs_chromium, pytest.mark.timeout(300)]  # the first test starts the swarm


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveSwarm]:
    with live_swarm(tmp_path_factory.mktemp("swarm")) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the screenshots are; pass --basetemp to choose the place."""
    return tmp_path_factory.mktemp("screenshots")


@pytest.fixture
def seen(browser: Browser, swarm: LiveSwarm) -> Iterator[Visit]:
    with visit(browser, swarm.address) as seen:
        yield seen


def figure(seen: Visit, tile: str) -> str:
    return seen.text(f"#tile-{tile} .figure")


def test_head_has_the_right_counts(swarm: LiveSwarm, seen: Visit) -> None:
    assert seen.text("#swarm-name") == "talkoot-test"
    assert seen.text("#state-words") == "healthy"
    assert seen.page.title().startswith("✓ talkoot-test: healthy")
    assert figure(seen, "nodes") == "3"
    assert figure(seen, "experts") == str(EXPERTS)
    assert seen.text("#tile-experts .sub") == f"of {EXPERTS}, 100 %"
    assert figure(seen, "trainers") == "1"
    assert figure(seen, "replicas") == str(swarm.api("swarm")["replicas"])
    assert figure(seen, "speed") != "–"
    seen.until("document.querySelectorAll('#nodes-table tbody tr').length === 3")
    assert seen.page.locator("#nodes-table .badge[data-level=ok]").count() == 3


def test_charts_move(seen: Visit) -> None:
    seen.page.get_by_role("button", name="15 min").click()
    canvas = "document.querySelector('#chart-cards article:nth-child(3) canvas')"
    seen.until(f"{canvas} !== null")
    before = seen.page.evaluate(f"{canvas}.toDataURL()")
    seen.until(f"{canvas}.toDataURL() !== {before!r}")
    latest = "document.querySelector('#chart-cards article .plot').getAttribute('aria-label')"
    seen.until(f"/Latest: .* \\d/.test({latest})")


def test_chart_has_a_table_behind_it(seen: Visit) -> None:
    seen.page.get_by_role("button", name="Live nodes as a table").click()
    seen.until("document.querySelectorAll('.plot-table:not([hidden]) tbody tr').length > 0")
    assert seen.text(".plot-table:not([hidden]) thead").split() == ["Time", "live", "nodes"]


def test_click_opens_an_expert(swarm: LiveSwarm, seen: Visit, pictures: Path) -> None:
    seen.until("document.querySelector('#heatmap').width > 300 || document.querySelector('#grid-side h3')")
    seen.page.locator("#heatmap").click(position={"x": 5, "y": 5})
    seen.until("document.querySelectorAll('#panel .replicas li').length > 0")
    assert seen.page.url.endswith("#/expert/0.0.0")
    assert seen.text("#panel-title") == "0.0.0"
    replicas = swarm.api("experts/0.0.0")["replicas"]
    assert seen.page.locator("#panel .replicas li").count() == len(replicas)
    seen.page.screenshot(path=pictures / "expert.png")
    seen.page.locator("#panel .replicas a").first.click()
    seen.until("document.querySelector('#panel .facts') !== null")
    assert replicas[0]["peer_id"] in seen.text("#panel .facts")
    seen.page.keyboard.press("Escape")
    assert seen.page.locator("#panel").is_hidden()


def test_keyboard_opens_an_expert(seen: Visit) -> None:
    seen.until("document.querySelector('#grid-side h3') !== null")
    seen.page.locator("#heatmap").focus()
    for key in ("Home", "ArrowRight", "ArrowDown"):
        seen.page.keyboard.press(key)
    assert seen.text("#heatmap-cell").startswith("Expert 0.1.1: ")
    seen.page.keyboard.press("Enter")
    seen.until("location.hash === '#/expert/0.1.1'")
    assert seen.page.evaluate("document.activeElement.id") == "panel-title"
    seen.page.keyboard.press("Escape")
    assert seen.page.evaluate("document.activeElement.id") == "heatmap"


def test_hostile_name_is_shown_as_text_alone(seen: Visit) -> None:
    name = seen.page.locator("#nodes-table .name", has_text=HOSTILE_NAME)
    assert name.inner_text() == HOSTILE_NAME
    name.click()
    seen.until("document.querySelector('#panel .facts') !== null")
    assert seen.text("#panel-title").startswith(HOSTILE_NAME)
    assert seen.page.locator("img").count() == 0
    assert seen.page.evaluate("typeof pwned") == "undefined"


def test_join_box_has_the_command(swarm: LiveSwarm, seen: Visit) -> None:
    assert seen.text("[data-command=node] code") == swarm.api("swarm")["join"]["node"]
    seen.page.locator("[data-command=node] button").click()
    seen.until("document.querySelector('[data-command=node] button')?.textContent === 'Copied'")


def test_choice_of_colours_is_kept(seen: Visit) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = seen.page.evaluate(ground)
    seen.page.locator("#theme").click()
    dark = seen.page.evaluate(ground)
    assert dark != light
    seen.page.reload()
    assert seen.page.evaluate(ground) == dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(
    browser: Browser, swarm: LiveSwarm, pictures: Path, scheme: Literal["light", "dark"]
) -> None:
    with visit(browser, swarm.address, height=6000, scheme=scheme) as seen:
        seen.until("document.querySelectorAll('.plot canvas').length >= 4")
        seen.until("document.querySelectorAll('#leaders-table tbody tr').length === 3")
        for width in WIDTHS:
            seen.page.set_viewport_size({"width": width, "height": 6000})
            assert seen.overflow() == 0, width
            seen.page.screenshot(path=pictures / f"{scheme}-{width}.png")
        seen.page.goto(f"{swarm.address}/#/node/{swarm.api('nodes')['nodes'][0]['peer_id']}")
        seen.until("document.querySelector('#panel .facts') !== null")
        assert seen.overflow() == 0


def test_killed_node_turns_red_within_two_announcements(
    swarm: LiveSwarm, seen: Visit, pictures: Path
) -> None:
    row = seen.page.locator("#nodes-table tr", has_text="doomed")
    assert row.locator(".badge").inner_text() == "serving"
    # in one go: rows are made anew with every picture, and one that has just gone has no colour
    found = (
        "[...document.querySelectorAll('#nodes-table tr')].find(row => row.textContent.includes('doomed'))"
    )
    colour = f"getComputedStyle({found}).backgroundColor"
    ground = seen.page.evaluate(colour)
    killed_at = time.monotonic()
    swarm.nodes["doomed"].kill()
    seen.page.locator("#nodes-table tr.lost", has_text="doomed").wait_for()
    assert time.monotonic() - killed_at < 2 * ANNOUNCE_EVERY_S
    assert row.locator(".badge").inner_text() == "gone"
    assert seen.page.evaluate(colour) != ground
    seen.until("document.querySelector('#tile-nodes .figure')?.textContent === '2'")
    assert seen.text("#tile-nodes .sub") == "1 gone in a day"
    seen.page.screenshot(path=pictures / "killed.png")


def test_lost_server_is_told_and_the_last_state_stays(swarm: LiveSwarm, browser: Browser) -> None:
    with visit(browser, swarm.address) as seen:
        swarm.dashboard.kill()
        seen.page.locator("#banner").wait_for()
        assert "The dashboard's server has not answered since" in seen.text("#banner")
        assert "What you see is" in seen.text("#banner")
        assert figure(seen, "nodes") == "2"
        assert seen.text("#age").startswith("read ")
        seen.complaints.clear()  # the browser writes each failed request to the console
