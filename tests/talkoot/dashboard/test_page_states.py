"""The page in a real browser, for swarms that do badly or cannot be read."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browser import Visit, chromium, needs_chromium, served, visit
from playwright.sync_api import Browser, Route
from simulated_readings import NOW, Asked, manifest, memory, node, peer, picture_of, replica, trainer

from dht.manifest import AdmissionSpec
from peer.metrics import total
from talkoot.dashboard.history import Sample
from talkoot.dashboard.picture import HostChecks

pytestmark = [needs_chromium, pytest.mark.timeout(300)]

UIDS = manifest().uids()
UNREAD = "document.querySelector('#age').textContent.startsWith('not read')"
HEALTHY = picture_of([node(1), node(2)], [trainer(1)], replicas=[replica(uid, 1) for uid in UIDS])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def figures(seen: Visit) -> list[str]:
    return [
        seen.text(f"#tile-{tile} .figure") for tile in ("nodes", "experts", "replicas", "trainers", "loss")
    ]


def test_unreachable_swarm_is_told_and_its_last_state_stays(browser: Browser, tmp_path: Path) -> None:
    asked = Asked(tmp_path, HEALTHY)
    asked.watcher.unreachable_since = NOW - 60
    with served(asked.app) as address, visit(browser, address) as seen:
        seen.page.locator("#banner").wait_for()
        assert seen.text("#banner-words").startswith("The swarm has been out of reach since ")
        assert seen.text("#state-words") == "cannot reach the swarm"
        assert seen.page.locator("#state").get_attribute("data-level") == "unknown"
        assert figures(seen) == ["2", "32", "32", "1", "2.250"]
        assert seen.text("#tile-nodes .sub") == "when last seen"
        assert seen.page.locator("#banner-retry").is_hidden()
    asked.history.close()


def test_manifest_that_expires_soon_is_told(browser: Browser, tmp_path: Path) -> None:
    asked = Asked(tmp_path, picture_of([node(1)], warning="nobody can join this swarm in 3.0 days"))
    with served(asked.app) as address, visit(browser, address) as seen:
        seen.page.locator("#banner").wait_for()
        assert seen.text("#banner-words") == "Nobody can join this swarm in 3.0 days."
        assert seen.page.locator("#banner-retry").is_hidden()
    asked.history.close()


def test_where_the_founder_invites_each_person_the_page_says_so(browser: Browser, tmp_path: Path) -> None:
    by_token = manifest().model_copy(update={"admission": AdmissionSpec(mode="token")})
    asked = Asked(tmp_path, picture_of([node(1)], swarm=by_token, memories=[memory()]))
    with served(asked.app) as address, visit(browser, address) as seen:
        seen.page.locator("#by-invite").wait_for()
        assert "talkoot" not in seen.text("#join")
        assert seen.page.locator("#join button:visible").count() == 0
    asked.history.close()


def test_what_fails_again_and_again_is_told(browser: Browser, tmp_path: Path) -> None:
    asked = Asked(tmp_path, picture_of([node(1), node(2, unsteady=True)]))
    for _ in range(3):
        asked.watcher.restarts.note("watch the swarm")
    with served(asked.app) as address, visit(browser, address) as seen:
        assert seen.text("#tile-nodes .sub") == "none missing, 1 unsteady"
        seen.page.locator(".unsteady-link").click()
        seen.until("document.querySelector('#nodes-table tbody tr')?.textContent.includes('unsteady')")
        assert re.fullmatch(
            r"In the last two minutes, this dashboard paused for at most .*s\. (Its machine may be overloaded\. )?"
            r"It fails again and again: watch the swarm\.",
            seen.text("#own-state"),
        )
        seen.page.locator("#nodes-table .peer").first.click()
        seen.until("document.querySelector('#panel-body .badge[data-level=warn]') !== null")
    asked.history.close()


def test_swarm_that_was_never_seen_has_no_figures(browser: Browser, tmp_path: Path) -> None:
    asked = Asked(tmp_path, None)
    with served(asked.app) as address, visit(browser, address, ready=UNREAD) as seen:
        assert figures(seen) == ["–"] * 5
        assert seen.text("#tile-nodes .sub") == "–"
        assert seen.page.locator("#tiles .figure .unseen[title]").count() == 6
        seen.complaints.clear()  # its experts can't be asked for: 503
    asked.history.close()


def test_swarm_of_no_node_has_zeros(browser: Browser, tmp_path: Path) -> None:
    asked = Asked(tmp_path, picture_of([]))
    with served(asked.app) as address, visit(browser, address) as seen:
        assert seen.text("#state-words") == "no node is there"
        assert seen.page.locator("#state").get_attribute("data-level") == "bad"
        assert figures(seen) == ["0", "0", "0", "0", "–"]
        seen.until("document.querySelector('#nodes-table .empty') !== null")
        assert seen.text("#nodes-table tbody").strip() == "No node so far."
    asked.history.close()


def test_expert_without_a_host_is_named_and_says_so(browser: Browser, tmp_path: Path) -> None:
    asked = Asked(tmp_path, picture_of([node(1)], replicas=[replica(uid, 1) for uid in UIDS[1:]]))
    with served(asked.app) as address, visit(browser, address) as seen:
        assert seen.text("#state-words") == "1 expert has no host"
        seen.page.locator("#grid-side .chip").click()
        seen.until("document.querySelector('#panel .lonely') !== null")
        assert seen.text("#panel-title") == str(UIDS[0])
    asked.history.close()


def test_unknown_node_in_the_address_is_told(browser: Browser, tmp_path: Path) -> None:
    asked = Asked(tmp_path, HEALTHY)
    with served(asked.app) as address, visit(browser, f"{address}/#/node/%E0%A4%A") as seen:
        seen.until("document.querySelector('#panel .problem').textContent.startsWith('no node ')")
        seen.until(lambda: bool(seen.complaints))
        seen.complaints.clear()  # the browser tells each 404
    asked.history.close()


def test_colours_tell_how_long_ago_experts_learned(browser: Browser, tmp_path: Path) -> None:
    learned = picture_of(
        [node(1)],
        replicas=[replica(uid, 1, updated_at=NOW if uid == UIDS[0] else None) for uid in UIDS],
    )
    asked = Asked(tmp_path, learned)
    with served(asked.app) as address, visit(browser, address) as seen:
        seen.page.get_by_role("button", name="Freshness").click()
        seen.until("document.querySelector('#grid-side h3')?.textContent === 'Experts by last update'")
        counts = seen.page.locator("#grid-side .bar-count").all_inner_texts()
        assert counts == ["1", "0", "0", "0", "0", "15", "0"]
        assert seen.text("#grid-side .edge li:first-child") == "0.0.1\nno update yet"
        seen.page.get_by_role("button", name="Table", exact=True).first.click()
        top = "document.querySelector('#grid-table tbody td:last-child').textContent"
        for words in ("no update yet", "updated 0 s ago"):  # the largest first, then the smallest
            seen.page.locator("#grid-table").get_by_role("button", name="Freshness").click()
            seen.until(f"{top} === '{words}'")
    asked.history.close()


def test_load_is_each_experts_share_of_rows(browser: Browser, tmp_path: Path) -> None:
    rows = [700, 250, 30, 20] + [0] * 12
    replicas = [replica(uid, 1, recent_rows=count) for uid, count in zip(UIDS, rows, strict=False)]
    asked = Asked(tmp_path, picture_of([node(1)], replicas=replicas))
    with served(asked.app) as address, visit(browser, address) as seen:
        seen.page.get_by_role("button", name="Load").click()
        seen.until("document.querySelector('#grid-side h3')?.textContent === 'Experts by share of rows'")
        words = "The busiest expert has 11.2 times the mean; 12 experts starve (less than a tenth of it)."
        assert seen.page.locator("#grid-side .note").first.inner_text() == words
        assert seen.page.locator("#grid-side .chip").all_inner_texts() == [str(uid) for uid in UIDS[4:16]]
        assert seen.text("#grid-side .edge li:first-child") == "0.0.0\n70% of rows"
        seen.page.locator("#grid-side .edge a").first.click()
        seen.until("document.querySelector('#panel .replicas')?.textContent.includes('700 rows lately')")
    asked.history.close()


def test_what_ended_in_order_is_not_red(browser: Browser, tmp_path: Path) -> None:
    ended = [trainer(1, step=100, validation_loss=1.5), trainer(2)]
    asked = Asked(
        tmp_path, picture_of([node(1)], [trainer(0, steps=0)], left=[node(2)], gone=[node(3)], ended=ended)
    )
    with served(asked.app) as address, visit(browser, address) as seen:
        seen.until("document.querySelectorAll('#trainers-table tbody tr').length === 3")
        badges = seen.page.locator("#trainers-table .badge").all_inner_texts()
        assert sorted(badges) == ["finished", "own loop", "stopped"]
        assert "1.500" in seen.text("#trainers-table tbody tr:has-text('finished')")
        assert seen.page.locator("#trainers-table .lost").count() == 0
        seen.until("document.querySelectorAll('#nodes-table tbody tr').length === 3")
        assert seen.page.locator("#nodes-table .lost").all_inner_texts()[0].startswith("volunteer 3")
        assert seen.page.locator("#nodes-table .lost").count() == 1
        assert seen.text("#tile-nodes .sub") == "1 gone"
    asked.history.close()


def test_a_chart_of_what_is_counted_has_whole_numbers_alone(browser: Browser, tmp_path: Path) -> None:
    asked = Asked(tmp_path, HEALTHY)
    asked.history.add([Sample("live_nodes", "live nodes", 1)], NOW - 8)
    asked.history.add([Sample("live_nodes", "live nodes", 2)], NOW - 9)
    with served(asked.app) as address, visit(browser, address) as seen:
        seen.page.get_by_role("button", name="Live nodes as a table").click()
        seen.until("document.querySelectorAll('.plot-table:not([hidden]) tbody tr').length > 0")
        values = seen.page.locator(".plot-table:not([hidden]) tbody td").all_inner_texts()
        assert values
        assert all(value.isdigit() for value in values), values
    asked.history.close()


def test_the_axis_of_a_loss_has_several_numbers(browser: Browser, tmp_path: Path) -> None:
    asked = Asked(tmp_path, HEALTHY)
    for age, loss in ((600, 5.6), (8, 2.3)):
        asked.history.add([Sample("loss", "c", loss)], NOW - age)
    with served(asked.app) as address, visit(browser, address) as seen:
        seen.page.add_init_script("""
            const write = CanvasRenderingContext2D.prototype.fillText;
            CanvasRenderingContext2D.prototype.fillText = function (text, ...where) {
                (this.canvas.written ??= new Set()).add(text);
                return write.call(this, text, ...where);
            };
        """)
        seen.page.reload()
        written = "[...(document.querySelector('#chart-cards canvas')?.written ?? [])]"
        seen.until(f"{written}.some((text) => Number(text))")
        numbers = {float(text) for text in seen.page.evaluate(written) if ":" not in text}
        assert len({number for number in numbers if 2 < number < 6}) >= 2, numbers
    asked.history.close()


def test_a_small_loss_of_experts_looks_small_in_its_tile(browser: Browser, tmp_path: Path) -> None:
    asked = Asked(tmp_path, HEALTHY)
    for age, live in ((600, 32), (8, 30)):
        asked.history.add([Sample("live_experts", "live experts", live)], NOW - age)
    with served(asked.app) as address, visit(browser, address) as seen:
        line = seen.page.locator("#tile-experts .spark-line")
        line.wait_for(state="attached")
        *_, height = re.findall(r"[\d.]+", line.get_attribute("d") or "")
        assert float(height) < 8  # of 32 from the top
    asked.history.close()


def test_a_trainer_has_the_same_colour_in_all_charts(browser: Browser, tmp_path: Path) -> None:
    """Also in one where others before it are missing."""
    asked = Asked(tmp_path, HEALTHY)
    for age in (8, 23):
        losses = [Sample("loss", name, 2) for name in ("a", "b", "b validation", "c")]
        asked.history.add(
            [*losses, Sample("bits_per_byte", "c", 1), Sample("bits_per_byte", "b", 1)], NOW - age
        )

    def colours(title: str) -> dict[str, str]:
        entries = seen.page.locator(".chart", has_text=title).locator(".legend li")
        return dict(
            entries.evaluate_all(
                "all => all.map((li) => [li.querySelector('bdi').textContent, "
                "li.querySelector('.dash').style.borderColor])"
            )
        )

    with served(asked.app) as address, visit(browser, address) as seen:
        seen.until(lambda: seen.page.locator(".legend-value").count() >= 6)
        loss, bits = colours("Loss"), colours("Bits per byte")
        assert len({loss["a"], loss["b"], loss["c"]}) == 3
        assert loss["b validation"] == loss["b"]
        assert bits == {"b": loss["b"], "c": loss["c"]}
    asked.history.close()


def test_a_node_that_offers_no_room_has_no_capacity(browser: Browser, tmp_path: Path) -> None:
    """It pauses or leaves, and what it said last may still count experts."""
    asked = Asked(
        tmp_path,
        picture_of([node(1, expert_count=3, expert_capacity=4), node(2, expert_count=16, expert_capacity=0)]),
    )
    with served(asked.app) as address, visit(browser, address) as seen:
        seen.until("document.querySelectorAll('#nodes-table tbody tr').length === 2")
        experts = seen.page.locator("#nodes-table tbody td:nth-child(3)").all_inner_texts()
        assert sorted(experts) == ["16", "3 / 4"]
    asked.history.close()


def test_a_chart_shows_no_old_speed_as_the_present_one(browser: Browser, tmp_path: Path) -> None:
    asked = Asked(tmp_path, HEALTHY)
    for age in (600, 615):
        asked.history.add([Sample("tokens_per_s", "all trainers", 700), Sample("loss", "c", 2)], NOW - age)
    for age in (8, 23):
        asked.history.add([Sample("live_experts", "live experts", 32)], NOW - age)
    with served(asked.app) as address, visit(browser, address) as seen:
        seen.until(lambda: seen.page.locator(".legend-value").count() >= 3)
        shown = [legend(seen, title) for title in ("Tokens per second", "Live experts", "Loss")]
        assert shown == ["–", "32", "2.000"]
    asked.history.close()


def legend(seen: Visit, title: str) -> str:
    return seen.page.locator(".chart", has_text=title).locator(".legend-value").first.inner_text()


def test_charts_end_with_the_counts_of_the_tiles_as_soon_as_these_change(
    browser: Browser, tmp_path: Path
) -> None:
    """Not with the mean of a step in which a node died."""
    asked = Asked(tmp_path, HEALTHY)
    for age in (7, 8):
        asked.history.add(
            [Sample("live_experts", "live experts", 8 * age), Sample("live_nodes", "live nodes", age)],
            NOW - age,
        )
    with served(asked.app) as address, visit(browser, address) as seen:
        seen.until(lambda: legend(seen, "Live experts") == "32")
        assert legend(seen, "Live nodes") == "2"
        seen.until("document.querySelector('#charts .problem').hidden")
        few = [replica(uid, 1) for uid in UIDS[:16]]
        asked.watcher.picture = replace(picture_of([node(1)], replicas=few, gone=[node(2)]), read_at=NOW + 1)
        asked.watcher.tell()
        seen.until(lambda: seen.text("#tile-experts .figure") == "16", 20)
        seen.until(lambda: (legend(seen, "Live experts"), legend(seen, "Live nodes")) == ("16", "1"), 8)
    asked.history.close()


def test_a_measure_can_be_chosen_before_the_experts_have_come(browser: Browser, tmp_path: Path) -> None:
    asked = Asked(tmp_path, HEALTHY)
    with served(asked.app) as address, visit(browser, address) as seen:
        held: list[Route] = []
        seen.page.route("**/api/v1/experts*", lambda route: held.append(route))
        seen.page.reload()
        seen.page.get_by_role("button", name="Freshness").click()
        seen.until(lambda: bool(held))
        held[0].continue_()
        seen.until("document.querySelector('#grid-side h3')?.textContent === 'Experts by last update'")
    asked.history.close()


def test_page_that_nobody_sees_holds_no_stream_and_still_has_its_title(
    browser: Browser, tmp_path: Path
) -> None:
    asked = Asked(tmp_path, HEALTHY)
    look = (
        "Object.defineProperty(document, 'hidden', {{value: {}, configurable: true}});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    with served(asked.app) as address, visit(browser, address) as seen:
        assert total(asked.streams.open) == 1
        seen.page.clock.install()
        seen.page.evaluate(look.format("true"))
        seen.until(lambda: total(asked.streams.open) == 0)
        asked.watcher.picture = picture_of([])
        seen.page.clock.fast_forward(31_000)
        seen.until("document.title.includes('no node is there')")
        assert total(asked.streams.open) == 0
        seen.page.evaluate(look.format("false"))
        seen.until(lambda: total(asked.streams.open) == 1)
    asked.history.close()


def test_memories_are_shown_where_there_are_any(browser: Browser, tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    memories = [
        memory("safe"),
        memory("alone", (2, 1), about=hostile, licenses=(hostile,)),
        memory("lost", (1,)),
    ]
    checks = {
        memories[0].entry.memory: HostChecks(120),
        memories[2].entry.memory: HostChecks(1200, 2, 1, {peer(1): None, peer(2): None}),
    }
    asked = Asked(tmp_path, picture_of([node(1), node(2)], memories=memories, checks=checks))
    with served(asked.app) as address, visit(browser, address) as seen:
        seen.until("document.querySelectorAll('#memories-table tbody tr').length === 3")
        rows = seen.page.locator("#memories-table tbody tr")
        badges = [rows.nth(number).locator(".badge").count() for number in range(3)]
        assert badges == [2, 1, 0]  # those with the fewest replicas come first
        assert "lost" in rows.nth(0).inner_text()
        assert rows.nth(0).locator(".badge").first.get_attribute("data-level") == "bad"
        caught = rows.nth(0).locator(".badge").last
        assert caught.inner_text().split() == ["1,200", "/", "2", "omissions,", "1", "lie"]
        title = caught.get_attribute("title") or ""
        assert all(peer(number).to_base58()[-8:] in title for number in (1, 2)), title
        assert rows.nth(2).get_by_role("cell", name="120", exact=True).count() == 1
        assert "alone" in rows.nth(1).inner_text()
        assert hostile in rows.nth(1).inner_text()
        assert seen.page.locator("img").count() == 0
        assert seen.text("#memories .pager").startswith("3 memories")
        assert seen.text("#memories-note") == "3 queries per second"
        assert seen.page.locator(".charts article:visible").count() == 10
        assert seen.overflow() == 0
        seen.page.goto(f"{address}/#/node/{node(2).peer_id.to_base58()}")
        seen.until(
            "document.querySelector('#panel .facts')?.textContent.includes('2 shards, 2 kB, 2 queries')"
        )
    asked.history.close()


def test_a_swarm_without_memories_shows_nothing_of_them(browser: Browser, tmp_path: Path) -> None:
    asked = Asked(tmp_path, HEALTHY)
    with served(asked.app) as address, visit(browser, address) as seen:
        assert seen.page.locator("#memories").is_hidden()
        assert seen.page.locator("nav a[href='#memories']").is_hidden()
        assert seen.page.locator(".charts article:visible").count() == 8
    asked.history.close()
