"""The page in a real browser, on a real running swarm of three nodes and a trainer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from browser import Visit, chromium, needs_chromium, visit
from live_swarm import DOOMED, EXPERTS, HOSTILE_NAME, LiveSwarm, live_swarm
from playwright.sync_api import Browser

WIDTHS = (1440, 820, 360)

pytestmark = [needs_chromium, pytest.mark.timeout(600)]  # the first test starts the swarm


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
    """The folder of the screenshots. Choose another with --basetemp."""
    return tmp_path_factory.mktemp("screenshots")


@pytest.fixture
def seen(browser: Browser, swarm: LiveSwarm) -> Iterator[Visit]:
    with visit(browser, swarm.address) as seen:
        yield seen


def figure(seen: Visit, tile: str) -> str:
    return seen.text(f"#tile-{tile} .figure")


def until_figures(seen: Visit, **expected: str) -> None:
    """Waits until tiles show these figures. The page follows the swarm, in which a node may be late for a moment."""

    def are_shown() -> bool:
        return {tile: figure(seen, tile) for tile in expected} == expected

    seen.until(are_shown)


def test_head_has_the_right_counts(swarm: LiveSwarm, seen: Visit) -> None:
    assert seen.text("#swarm-name") == "talkoot-test"
    seen.until(lambda: seen.text("#state-words") == "healthy")
    seen.until(lambda: seen.page.title().startswith("✓ talkoot-test: healthy"))
    until_figures(seen, nodes="3", experts=str(EXPERTS), trainers="1")
    seen.until(lambda: seen.text("#tile-experts .sub") == f"of {EXPERTS}, 100 %")
    seen.until(lambda: figure(seen, "replicas") == str(swarm.api("swarm")["replicas"]))
    seen.until(lambda: figure(seen, "speed") != "–")
    seen.until("document.querySelectorAll('#nodes-table tbody tr').length === 3")
    seen.until("document.querySelectorAll('#nodes-table .badge[data-level=ok]').length === 3")


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

    def replicas() -> list[Any]:
        found: list[Any] = swarm.api("experts/0.0.0")["replicas"]
        return found

    seen.until(lambda: seen.page.locator("#panel .replicas li").count() == len(replicas()))
    seen.page.screenshot(path=pictures / "expert.png")
    hosts = {replica["peer_id"] for replica in replicas()}
    seen.page.locator("#panel .replicas a").first.click()
    seen.until("document.querySelector('#panel .facts') !== null")
    assert any(host in seen.text("#panel .facts") for host in hosts)
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
    seen.until("document.activeElement.id === 'panel-title'")  # a little later than the address
    seen.page.keyboard.press("Escape")
    seen.until("document.activeElement.id === 'heatmap'")


def focused(seen: Visit) -> str | None:
    """Where the link that has the focus leads."""
    href: str | None = seen.page.evaluate("document.activeElement.getAttribute('href')")
    return href


def drawn_anew(seen: Visit, selector: str) -> str | None:
    """Focuses a link, waits until the page has drawn another in its place, and returns where the first one led."""
    seen.until(f"document.querySelector({selector!r}) !== null")
    href: str | None = seen.page.evaluate(
        "(selector) => {const link = document.querySelector(selector); link.focus(); link.id = 'before';"
        " return link.getAttribute('href')}",
        selector,
    )
    seen.until("document.getElementById('before') === null")
    return href


def test_focus_stays_on_a_link_and_returns_to_it_though_all_is_drawn_anew_meanwhile(seen: Visit) -> None:
    opener = drawn_anew(seen, "#nodes-table tbody tr:nth-child(2) a")
    assert opener is not None
    assert focused(seen) == opener
    seen.page.keyboard.press("Enter")
    expert = drawn_anew(seen, "#panel-body .chips a:nth-child(2)")
    assert focused(seen) == expert
    seen.page.keyboard.press("Escape")
    seen.until(lambda: focused(seen) == opener)


def test_the_keyboard_reaches_nothing_behind_a_panel_that_hides_the_page(
    browser: Browser, swarm: LiveSwarm
) -> None:
    with visit(browser, swarm.address, width=360, height=800) as seen:
        link = seen.page.locator("#nodes-table tbody a").first
        link.focus()
        seen.page.keyboard.press("Enter")
        seen.until("document.querySelector('#panel .facts') !== null")
        seen.page.keyboard.press("Shift+Tab")
        assert not seen.page.evaluate(
            "[...document.querySelectorAll('main, header, footer')].some((e) => e.contains(document.activeElement))"
        )
        seen.page.keyboard.press("Escape")
        seen.until("document.activeElement.closest('#nodes-table') !== null")


def test_a_line_of_a_chart_and_its_value_are_two_words(seen: Visit) -> None:
    seen.until("document.querySelectorAll('#chart-cards .legend button').length > 0")
    legends = seen.page.locator("#chart-cards .legend button").all()
    assert all(" " in (legend.text_content() or "") for legend in legends)


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


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
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


def test_figures_that_differ_by_a_rounding_error_are_drawn(seen: Visit) -> None:
    """The means of equal figures differ like that. The chart used to look for ticks between them until its memory was
    full.
    """
    seen.page.evaluate(
        """async () => {
          const { Plot } = await import(new URL("plot.js", document.querySelector("script[type=module]").src));
          const plot = new Plot({ title: "Loss", write: String });
          document.querySelector("main").append(plot.element);
          const points = [[1000, 2.0], [1001, 2.0000000000000004]];
          plot.show([{ name: "loss", label: "loss", points }], "", 940, 1002);
          plot.element.id = "flat";
        }"""
    )
    seen.until("document.querySelector('#flat canvas') !== null")
    seen.page.wait_for_timeout(500)


def test_killed_node_turns_red(swarm: LiveSwarm, seen: Visit, pictures: Path) -> None:
    """It turns red after one and a half announcement periods, which `test_census` measures with its own clock."""
    # In one step: rows are recreated with every picture, and a removed row has no colour.
    row = (
        f"[...document.querySelectorAll('#nodes-table tr')].find(row => row.textContent.includes('{DOOMED}'))"
    )
    look = f"(row => [row?.querySelector('.badge').textContent, row && getComputedStyle(row).backgroundColor])({row})"

    def colour_as(badge: str) -> str:
        looked: list[str] = []

        def is_shown() -> bool:
            looked[:] = seen.page.evaluate(look)
            return looked[0] == badge

        seen.until(is_shown)
        return looked[1]

    ground = colour_as("serving")
    swarm.nodes[DOOMED].kill()
    seen.page.locator("#nodes-table tr.lost", has_text=DOOMED).wait_for()
    assert colour_as("gone") != ground
    until_figures(seen, nodes="2")
    seen.until(lambda: seen.text("#tile-nodes .sub") == "1 gone")
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
