"""Prints docs/img/headline.svg: some figures from the table in docs/benchmarks.md, with those of hivemind.moe.

python docs/headline_picture.py > docs/img/headline.svg
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]

_NUMBER = r"([\d,]+(?:\.\d+)?)"
_HIVEMIND = rf"hivemind\.moe \({_NUMBER}\)"
_ROWS = (
    ("Feed-forward experts", rf"16 FFN experts, [^|]*\| {_NUMBER} samples/s .*{_HIVEMIND}"),
    ("Transformer experts", rf"16 Transformer experts, the same \| {_NUMBER} samples/s .*{_HIVEMIND}"),
    ("64 narrow Transformer experts", rf"64 Transformer experts [^|]*\| {_NUMBER} samples/s .*{_HIVEMIND}"),
    (
        "Over a line with 200 ms of delay",
        rf"at 200 ms, [^|]*\| {_NUMBER} samples/s.*\(hivemind\.moe {_NUMBER}\)",
    ),
    (
        "Over a line with a second of delay",
        rf"at 1,000 ms, [^|]*\| {_NUMBER} samples/s.*\(hivemind\.moe {_NUMBER}\)",
    ),
)
_WIDTH, _LEFT, _BAR, _ROW, _TOP = 760, 280, 320, 52, 44
_STYLE = """\
  <style>
    text { font: 14px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1d2629 }
    .sheet { fill: #ffffff } .ours { fill: #00796b } .theirs { fill: #9aa5ab }
    .title, .times { font-weight: 600 } .small { font-size: 12.5px; fill: #4a565b }
    @media (prefers-color-scheme: dark) {
      text { fill: #eef2f3 } .sheet { fill: #1b2226 } .ours { fill: #4db6ac } .theirs { fill: #7b878d }
      .small { fill: #c3ccd0 }
    }
  </style>"""


@dataclass(frozen=True)
class Comparison:
    """Samples per second of Talkoot and of hivemind.moe, measured in one run."""

    title: str
    ours: float
    theirs: float


def read(table: str) -> list[Comparison]:
    """Reads the table. Raises LookupError if it lacks a figure that the picture shows."""
    found = []
    for title, pattern in _ROWS:
        match = re.search(pattern, table)
        if match is None:
            raise LookupError(f"docs/benchmarks.md has no row for {title!r}: mend the pattern {pattern}")
        found.append(Comparison(title, *(float(number.replace(",", "")) for number in match.groups())))
    return found


def picture(rows: Sequence[Comparison]) -> str:
    """Draws bars. Their lengths are in proportion only within a row, since each row is different work."""
    height = _TOP + _ROW * len(rows) + 30
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" aria-labelledby="title">',
        '  <title id="title">Samples trained per second by Talkoot and by hivemind.moe: '
        + "; ".join(f"{row.title} {row.ours:,g} against {row.theirs:,g}" for row in rows)
        + "</title>",
        _STYLE,
        f'  <rect class="sheet" width="{_WIDTH}" height="{height}" rx="8"/>',
        '  <text class="title" x="20" y="27">Samples trained per second</text>',
        f'  <rect class="ours" x="{_LEFT}" y="16" width="12" height="12"/>',
        f'  <text x="{_LEFT + 18}" y="27">Talkoot</text>',
        f'  <rect class="theirs" x="{_LEFT + 92}" y="16" width="12" height="12"/>',
        f'  <text x="{_LEFT + 110}" y="27">hivemind.moe</text>',
    ]
    for number, row in enumerate(rows):
        y = _TOP + _ROW * number
        times = (
            f"{row.ours / row.theirs:.0f}" if row.ours >= 10 * row.theirs else f"{row.ours / row.theirs:.1f}"
        )
        lines.append(f'  <text x="20" y="{y + 24}">{escape(row.title)}</text>')
        longest = max(row.ours, row.theirs)
        for kind, value, down in (("ours", row.ours, 6), ("theirs", row.theirs, 24)):
            length = max(2.0, _BAR * value / longest)
            lines.append(
                f'  <rect class="{kind}" x="{_LEFT}" y="{y + down}" width="{length:.1f}" height="15" rx="2"/>'
            )
            lines.append(
                f'  <text class="small" x="{_LEFT + length + 8:.1f}" y="{y + down + 12}">{value:,g}</text>'
            )
        lines.append(
            f'  <text class="times" x="{_WIDTH - 20}" y="{y + 24}" text-anchor="end">{times} times</text>'
        )
    lines += [
        f'  <text class="small" x="20" y="{height - 12}">Server and client on the same two cores, no GPU. '
        "Each row is one run of both. See docs/benchmarks.md.</text>",
        "</svg>",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(picture(read((ROOT / "docs" / "benchmarks.md").read_text())))
