"""Checks of a page in a browser: by axe-core, and by the browser's own measure of layout shifts."""

from pathlib import Path
from typing import Any

from playwright.sync_api import Page

_AXE = Path(__file__).parent / "axe" / "axe.min.js"
"""axe-core 4.10.2 by Deque Systems, as in its npm package, with its licence next to it (MPL-2.0)."""
_TAGS = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice")
_WATCH_SHIFTS = """
globalThis.shifts = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) {
    if (!entry.hadRecentInput)
      shifts.push({
        at: entry.startTime,
        value: entry.value,
        of: entry.sources.map(({ node, previousRect: a, currentRect: b }) =>
          `${node?.id || node?.className || node?.nodeName}: ${a.y} to ${b.y}`),
      });
  }
}).observe({ type: "layout-shift", buffered: true });
"""


def violations(page: Page) -> list[str]:
    """The rules of axe that the page breaks, each with the first element that breaks it."""
    page.evaluate(_AXE.read_text())
    options = {"runOnly": {"type": "tag", "values": _TAGS}, "resultTypes": ["violations"]}
    found: dict[str, Any] = page.evaluate("options => axe.run(document, options)", options)
    return [f"{broken['id']}: {broken['nodes'][0]['html']}" for broken in found["violations"]]


def watch_shifts(page: Page) -> None:
    """Starts to record layout shifts. Call it before the page is opened."""
    page.add_init_script(_WATCH_SHIFTS)


def layout_shift(page: Page) -> tuple[float, list[Any]]:
    """CLS (the largest sum of shifts within five seconds), and the shifts themselves."""
    shifts = page.evaluate("shifts")
    most = max(
        (sum(s["value"] for s in shifts if 0 <= s["at"] - first["at"] < 5000) for first in shifts),
        default=0.0,
    )
    return most, shifts
