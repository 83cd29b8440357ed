"""The page as checked by tools: axe, layout shifts while it loads, and forced colours."""

from collections.abc import Iterator
from typing import Any

import pytest
from browser import WAIT_MS, Visit, chromium, needs_chromium, served
from page_judges import layout_shift, violations, watch_shifts
from playwright.sync_api import Browser
from simulated_readings import NOW, Asked, manifest, memory, node, picture_of, replica, trainer

from talkoot.dashboard.watcher import expert_samples_of, samples_of

pytestmark = [needs_chromium, pytest.mark.timeout(600)]

MODEL = manifest((8, 8))
UIDS = MODEL.uids()
DESKTOP, PHONE = (1350, 940), (412, 823)
LONGEST_SHIFT = 0.05
PICTURE = picture_of(
    [node(number, unsteady=number == 3) for number in range(30)],
    [trainer(0), trainer(1, steps=0)],
    swarm=MODEL,
    replicas=[replica(uid, number % 30, recent_rows=10 * number) for number, uid in enumerate(UIDS[::5])],
    gone=[node(31)],
    left=[node(32)],
    ended=[trainer(2, step=100), trainer(3)],
    memories=[memory("safe"), memory("alone", (2, 1))],
)
SHOWN = (
    "!document.body.classList.contains('unread') && document.querySelectorAll('.plot canvas').length >= 8"
    " && document.querySelectorAll('#nodes-table tbody tr').length === 25"
    " && document.querySelectorAll('#leaders-table tbody tr').length === 10"
    " && document.querySelector('#grid-side .bars') !== null"
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A dashboard that has watched for a quarter of an hour a swarm that has everything."""
    asked = Asked(tmp_path_factory.mktemp("judged"), PICTURE)
    for minute in range(15):
        samples = [*samples_of(PICTURE), *expert_samples_of(PICTURE)]
        asked.history.add(samples, NOW - 60 * minute)
    with served(asked.app) as address:
        yield address
    asked.history.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def seen(browser: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """The page once it is complete. The fixture's parameter has the browser's options."""
    options: dict[str, Any] = dict(request.param)
    width, height = options.pop("size", DESKTOP)
    with browser.new_context(
        viewport={"width": width, "height": height}, reduced_motion="reduce", **options
    ) as context:
        context.set_default_timeout(WAIT_MS)
        seen = Visit(context.new_page())
        watch_shifts(seen.page)
        seen.page.goto(address)
        seen.until(SHOWN)
        yield seen


WAYS = pytest.mark.parametrize(
    "seen",
    [{"color_scheme": "light"}, {"color_scheme": "dark"}, {"size": PHONE}, {"forced_colors": "active"}],
    ids=["light", "dark", "phone", "forced-colours"],
    indirect=True,
)


@WAYS
def test_axe_finds_nothing(seen: Visit) -> None:
    seen.page.get_by_role("button", name="Load").click()
    seen.page.get_by_role("button", name="Latency as a table").click()
    seen.page.locator("#nodes-table .peer").first.click()
    seen.until("document.querySelector('#panel .facts') !== null")
    assert violations(seen.page) == []


@pytest.mark.parametrize("seen", [{}, {"size": PHONE}], ids=["desktop", "phone"], indirect=True)
def test_the_page_does_not_jump_while_it_loads(seen: Visit) -> None:
    cls, shifts = layout_shift(seen.page)
    assert cls <= LONGEST_SHIFT, shifts


@pytest.mark.parametrize("seen", [{"forced_colors": "active"}], indirect=True)
def test_forced_colours_leave_those_that_mean_something(seen: Visit) -> None:
    seen.page.get_by_role("button", name="Load").click()
    colours = """[...document.querySelectorAll('#grid-side .swatch')].map(s => getComputedStyle(s).backgroundColor)"""
    swatches = seen.page.evaluate(colours)
    assert len(set(swatches)) == len(swatches) > 2
    drawn = seen.page.evaluate("""(() => {
      const canvas = document.querySelector('#heatmap');
      const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
      return new Set(new Uint32Array(data.buffer)).size;
    })()""")
    assert drawn > len(swatches)
    grounds = """() => Object.fromEntries([...document.querySelectorAll('#measures button')]
      .map(button => [button.textContent, getComputedStyle(button).backgroundColor]))"""
    ground = seen.page.evaluate(grounds)
    assert ground["Load"] != ground["Replicas"] == ground["Updates"]
