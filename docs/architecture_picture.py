"""Prints docs/img/architecture.svg: the floors of the code and their modules, as docs/architecture.md lists them.

python docs/architecture_picture.py > docs/img/architecture.svg
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]

_WIDTH, _LEFT, _RIGHT = 1000, 44, 984
_PADDING, _GAP, _TOP = 12, 8, 42
"""Pixels inside a floor, between rooms, and above a floor's first room."""
_LINE, _LETTER, _TITLE_LETTER, _INSET = 20, 8.75, 11.2, 10
_MOST_LINES = 8
"""The largest number of modules below one another in a room."""
_FLOORS = (
    (("talkoot", "the program", "a"),),
    (("expert_server", "a volunteer's node", "b"), ("trainer_client", "a trainer's side", "b")),
    (("dht", "what the swarm publishes and how it is found", "c"),),
    (("peer", "how two peers talk, and the plain things all floors need", "d"),),
)
_STYLE = """\
  <style>
    .sheet { fill: #ffffff } .floor { stroke-width: 1.2 } .room { fill: #ffffff; stroke: #9aa5ab; stroke-width: .8 }
    .a { fill: #e0f2f1; stroke: #00796b } .b { fill: #e8eef7; stroke: #3f66a0 } .c { fill: #f3ecf7; stroke: #7b529c }
    .d { fill: #fdf1e3; stroke: #b0541e } .e { fill: #f0f1f2; stroke: #6b767c }
    .p { font: 600 18px ui-monospace, monospace; fill: #1d2629 } .w { font-size: 16px; fill: #3d4a4f }
    .f { font: 600 15px ui-monospace, monospace; fill: #1d2629 }
    .m { font: 14.5px ui-monospace, monospace; fill: #1d2629 } .down { font-size: 15px; fill: #3d4a4f }
    .arrow { stroke: #6b767c; stroke-width: 1.6; fill: none } .tip { fill: #6b767c }
    @media (prefers-color-scheme: dark) {
      .sheet { fill: #1b2226 } .room { fill: #1b2226; stroke: #6b767c }
      .a { fill: #123c39; stroke: #4db6ac } .b { fill: #1c2d45; stroke: #8cb0e6 } .c { fill: #33243f; stroke: #c39be2 }
      .d { fill: #40280f; stroke: #e6a05c } .e { fill: #2a3136; stroke: #97a3a9 }
      .p, .f, .m { fill: #eef2f3 } .w, .down { fill: #c3ccd0 } .arrow { stroke: #97a3a9 } .tip { fill: #97a3a9 }
    }
  </style>"""


@dataclass(frozen=True)
class Room:
    """The modules of one folder, or those of a package that are in no folder."""

    title: str
    columns: Sequence[Sequence[str]]

    @classmethod
    def of(cls, title: str, modules: Sequence[str], most_lines: int = _MOST_LINES) -> "Room":
        count = -(-len(modules) // most_lines)
        height = -(-len(modules) // count)
        return cls(title, [modules[at : at + height] for at in range(0, len(modules), height)])

    def spread(self) -> "Room":
        """The same room with shorter columns, if there is space for them."""
        return Room.of(self.title, [module for column in self.columns for module in column], _MOST_LINES // 2)

    @property
    def lines(self) -> int:
        return max(map(len, self.columns)) + bool(self.title)

    @property
    def widths(self) -> list[float]:
        """The widths of the columns."""
        longest = [max(map(len, column)) for column in self.columns]
        longest[0] = max(longest[0], len(self.title) if len(self.columns) == 1 else 0)
        return [_LETTER * letters + _INSET for letters in longest]

    @property
    def width(self) -> float:
        return sum(self.widths) + _INSET

    def draw(self, x: float, y: float, width: float, lines: int) -> Iterator[str]:
        yield f'<rect class="room" x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{_height(lines)}" rx="6"/>'
        first = y + 22
        if self.title:
            yield _text("f", x + _INSET, first, self.title)
            first += _LINE
        share = (width - self.width) / len(self.columns)
        at = x + _INSET
        for column, column_width in zip(self.columns, self.widths, strict=True):
            for number, module in enumerate(column):
                yield _text("m", at, first + number * _LINE, module)
            at += column_width + share


def rooms_of(page: str) -> Mapping[str, list[Room]]:
    """The rooms of each package, in the order of the page. The modules without a folder come first."""
    found = {}
    for package, text in re.findall(r"^### (\w+)/$(.*?)(?=^##)", page, re.MULTILINE | re.DOTALL):
        folders: dict[str, list[str]] = {}
        for path in re.findall(r"^\| `([\w/]+)` \|", text, re.MULTILINE):
            folder, _, module = path.rpartition("/")
            folders.setdefault(folder, []).append(module)
        if package == "peer":
            folders["wire"] = ["generated", "from proto/"]
        found[package] = [Room.of(folder and f"{folder}/", modules) for folder, modules in folders.items()]
    return found


def picture() -> str:
    rooms = rooms_of((ROOT / "docs" / "architecture.md").read_text())
    y, body = 16, list[str]()
    for floor in _FLOORS:
        width = (_RIGHT - _LEFT - _PADDING * (len(floor) - 1)) / len(floor)
        height = 0
        for number, (package, words, color) in enumerate(floor):
            x = _LEFT + number * (width + _PADDING)
            shelves = _shelves(rooms[package], width - 2 * _PADDING)
            height = max(
                height, _TOP + sum(_height(_lines(shelf)) + _GAP for shelf in shelves) + _PADDING - _GAP
            )
            body += [f"FLOOR{color} {x} {width}", *_draw_floor(package, words, x, y, width, shelves)]
        # Both packages of a floor are as high as the higher one.
        body = [_floor(line, y, height) if line.startswith("FLOOR") else line for line in body]
        y += height + _PADDING
    body += [
        f'<rect class="floor e" x="{_LEFT}" y="{y}" width="{_RIGHT - _LEFT}" height="46" rx="8"/>',
        _text("p", _LEFT + 14, y + 29, "proto/"),
        _text("w", _LEFT + 90, y + 29, "the wire contract: messages and services as .proto files"),
    ]
    y += 46 + 16
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" role="img" aria-labelledby="title" '
        'font-family="system-ui, sans-serif">',
        '  <title id="title">The floors of Talkoot\'s code and the modules on each</title>',
        _STYLE,
        f'  <rect class="sheet" width="{_WIDTH}" height="{y}" rx="10"/>',
        f'  <path class="arrow" d="M24 20V{y - 26}"/><path class="tip" d="M18 {y - 28}h12l-6 12z"/>',
        f'  <text class="down" transform="translate(17 {y / 2:.0f}) rotate(-90)" text-anchor="middle">'
        "imports only go down</text>",
    ]
    return "\n".join([*head, *(f"  {line}" for line in body), "</svg>"]) + "\n"


def _draw_floor(
    package: str, words: str, x: float, y: float, width: float, shelves: Sequence[Sequence[Room]]
) -> Iterator[str]:
    yield _text("p", x + 14, y + 28, f"{package}/")
    yield _text("w", x + 14 + _TITLE_LETTER * (len(package) + 2), y + 28, words)
    top = y + _TOP
    for shelf in shelves:
        lines, left = _lines(shelf), x + _PADDING
        spare = width - 2 * _PADDING - sum(room.width for room in shelf) - _GAP * (len(shelf) - 1)
        for room in shelf:
            room_width = room.width + spare / len(shelf)
            yield from room.draw(left, top, room_width, lines)
            left += room_width + _GAP
        top += _height(lines) + _GAP


def _shelves(rooms: Sequence[Room], width: float) -> list[list[Room]]:
    """Arranges rooms in rows that are no wider than `width`."""
    shelves: list[list[Room]] = [[]]
    for room in rooms:
        taken = sum(other.width + _GAP for other in shelves[-1])
        if shelves[-1] and taken + room.width > width:
            shelves.append([])
        shelves[-1].append(room)
    return [
        [shelf[0].spread()] if len(shelf) == 1 and shelf[0].spread().width <= width else shelf
        for shelf in shelves
    ]


def _lines(shelf: Sequence[Room]) -> int:
    return max(room.lines for room in shelf)


def _height(lines: int) -> int:
    return lines * _LINE + 16


def _floor(line: str, y: int, height: int) -> str:
    color, x, width = line.removeprefix("FLOOR").split()
    place = f'x="{float(x):.0f}" y="{y}" width="{float(width):.0f}" height="{height}"'
    return f'<rect class="floor {color}" {place} rx="8"/>'


def _text(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" x="{x:.0f}" y="{y:.0f}">{escape(text)}</text>'


if __name__ == "__main__":
    print(picture(), end="")  # noqa: T201
