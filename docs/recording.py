"""Prints docs/img/demo.svg: a recording of `talkoot demo`, from a real run, sped up.

    python docs/recording.py > docs/img/demo.svg

It runs the demo on a pseudo-terminal, which takes a minute or two, and records what the terminal shows. Readers who
prefer less motion see the last frame.
"""

import codecs
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from rich.console import Console
from rich.text import Text

_COLUMNS, _ROWS = 92, 32
_SPEED = 4
_EVERY_S = 1.0
"""Seconds of the run between two frames. What changes in between is not shown."""
_REST_S = 4.0
"""How long the last frame stays when the picture is played."""
_LIMIT_S = 600.0
_ADVANCE, _LINE, _PADDING, _BAR = 8.0, 18, 16, 34
"""Pixels: width of a character, height of a line, space around the text, and height of the bar above it."""
_REDRAWN = re.compile(r"\r?\x1b\[2K(?:\x1b\[1A\x1b\[2K)*")
"""The escape sequences with which rich.live returns to the top of what it drew."""
_CURSOR = re.compile(r"\x1b\[\?25[lh]")
_CLASSES = {1: "r", 2: "g", 3: "y", 5: "m", 6: "c", 8: "d"}
"""The CSS classes of the terminal's colours, by number."""
_STYLE = """\
  <style>
    text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #1d2629;
      white-space: pre }
    .sheet { fill: #fbfcfc; stroke: #c3ccd0 } .title { fill: #56646a } .dot { fill: #c3ccd0 }
    .b { font-weight: 600 } .i { font-style: italic } .d { fill: #66747a }
    .m { fill: #8a3f9e } .g { fill: #1f7a3d } .r { fill: #b3261e } .c { fill: #00707a } .y { fill: #7a5b00 }
    .curve { fill: #00796b; shape-rendering: crispEdges }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6ecee } .sheet { fill: #14191c; stroke: #3d4a4f } .title { fill: #a9b5ba } .dot { fill: #56646a }
      .d { fill: #9aa7ad } .m { fill: #d7a0e6 } .g { fill: #7fd69b } .r { fill: #ff9c94 } .c { fill: #6fd3dc }
      .y { fill: #e5c563 } .curve { fill: #4db6ac }
    }
"""


@dataclass(frozen=True)
class Frame:
    """What the terminal showed from some moment of the run."""

    at_s: float
    lines: tuple[str, ...]
    """The lines, with the escape sequences of their colours."""

    @classmethod
    def of(cls, at_s: float, shown: str) -> "Frame":
        return cls(at_s, tuple(line.rstrip() for line in shown.replace("\r", "").split("\n")))


def record(command: Sequence[str]) -> list[Frame]:
    """Runs a command on a terminal. Raises CalledProcessError if it fails."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, _COLUMNS, 0, 0))
    environment = os.environ | {"TERM": "xterm", "COLUMNS": str(_COLUMNS), "LINES": str(_ROWS)}
    began = time.monotonic()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    decoder = codecs.getincrementaldecoder("utf-8")()
    shown, frames = "", [Frame(0.0, ())]
    try:
        while time.monotonic() < began + _LIMIT_S:
            try:
                data = os.read(ours, 65536)
            except OSError:  # Nothing writes to the terminal any more.
                break
            *whole, shown = _REDRAWN.split(shown + _CURSOR.sub("", decoder.decode(data)))
            now = time.monotonic() - began
            if whole and now - frames[-1].at_s >= _EVERY_S:
                frames.append(Frame.of(now, whole[-1]))
        status = process.wait(60)
    finally:
        process.kill()
        os.close(ours)
    if status:
        raise subprocess.CalledProcessError(status, list(command), output=shown)
    return [*frames, Frame.of(time.monotonic() - began, shown)]


def picture(frames: Sequence[Frame]) -> str:
    """An SVG that plays the frames forever. Lines that are equal in consecutive frames are drawn once."""
    rows = max(len(frame.lines) for frame in frames)
    ends = [frame.at_s / _SPEED for frame in frames[1:]]
    total = ends[-1] + _REST_S
    ends.append(total)
    begins = [0.0, *ends[:-1]]
    drawn: list[str] = []
    rules: dict[tuple[float, float], str] = {}
    for row in range(rows):
        at = 0
        while at < len(frames):
            line, first = _line_of(frames[at], row), at
            while at < len(frames) and _line_of(frames[at], row) == line:
                at += 1
            if not line:
                continue
            span = (begins[first], ends[at - 1])
            kind = rules.setdefault(span, f"t{len(rules)}")
            spans = "".join(_spans(line, _BAR + _PADDING + (row + 1) * _LINE - 4))
            drawn.append(f'  <g class="{kind}">{spans}</g>')
    width, height = 2 * _PADDING + _COLUMNS * _ADVANCE, _BAR + 2 * _PADDING + rows * _LINE
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
            'aria-labelledby="title">',
            f'  <title id="title">talkoot demo, recorded and played {_SPEED} times as fast: three nodes serve experts '
            "to a trainer, one node is killed half-way, its experts are adopted, and the loss keeps falling"
            "</title>",
            _STYLE + _animation(rules, total) + "  </style>",
            f'  <rect class="sheet" x=".5" y=".5" width="{width - 1:g}" height="{height - 1:g}" rx="8"/>',
            *(f'  <circle class="dot" cx="{18 + 16 * n}" cy="18" r="5"/>' for n in range(3)),
            f'  <text class="title" x="{width / 2:g}" y="22" text-anchor="middle">talkoot demo, {_SPEED}× speed</text>',
            *drawn,
            "</svg>",
            "",
        ]
    )


def _animation(rules: dict[tuple[float, float], str], total: float) -> str:
    """CSS that says what is visible when. Without motion, the last frame is visible."""
    lines, moving = [], []
    for (begin, end), kind in rules.items():
        from_, to = 100 * begin / total, 100 * end / total
        last = end >= total
        if not last:
            lines.append(f"    .{kind} {{ visibility: hidden }}")
        if begin <= 0 and last:
            continue
        steps = [] if begin <= 0 else ["0% { visibility: hidden }"]
        steps.append(f"{from_:.3f}% {{ visibility: visible }}")
        steps.append("100% { visibility: visible }" if last else f"{to:.3f}%, 100% {{ visibility: hidden }}")
        moving.append(f"      @keyframes {kind} {{ {' '.join(steps)} }}")
        moving.append(f"      .{kind} {{ animation: {kind} {total:.2f}s step-end infinite }}")
    return "\n".join([*lines, "    @media (prefers-reduced-motion: no-preference) {", *moving, "    }", ""])


def _line_of(frame: Frame, row: int) -> str:
    return frame.lines[row] if row < len(frame.lines) else ""


def _spans(line: str, y: float) -> Iterator[str]:
    """A line's pieces of text with one style each, every one as wide as its characters are in a terminal."""
    text = Text.from_ansi(line)
    console = Console(width=_COLUMNS)
    column = 0
    for segment in text.render(console):
        shown = segment.text.rstrip("\n")
        if segment.style is not None and set(shown) <= set(" ▁▂▃▄▅▆▇█") and shown.strip():
            yield f'<path class="curve" d="{"".join(_blocks(shown, column, y))}"/>'
        elif stripped := shown.strip(" "):
            start = column + len(shown) - len(shown.lstrip(" "))
            style = segment.style
            names = []
            if style is not None:
                names += ["b"] if style.bold else []
                names += ["i"] if style.italic else []
                names += ["d"] if style.dim else []
                if style.color is not None and style.color.number in _CLASSES:
                    names.append(_CLASSES[style.color.number])
            kind = f' class="{" ".join(names)}"' if names else ""
            yield (
                f'<text x="{_PADDING + start * _ADVANCE:g}" y="{y:g}" textLength="{len(stripped) * _ADVANCE:g}" '
                f'lengthAdjust="spacingAndGlyphs"{kind}>{escape(stripped)}</text>'
            )
        column += len(shown)


def _blocks(shown: str, column: int, y: float) -> Iterator[str]:
    """Draws block characters as rectangles, since fonts leave gaps between their lines."""
    for at, character in enumerate(shown, column):
        if eighths := " ▁▂▃▄▅▆▇█".index(character):
            height = eighths * _LINE / 8
            left, bottom = _PADDING + at * _ADVANCE, y + 4
            yield f"M{left:g} {bottom:g}v{-height:g}h{_ADVANCE:g}v{height:g}z"


if __name__ == "__main__":
    frames = record([sys.executable, "-W", "ignore", "-m", "talkoot", "demo", *sys.argv[1:]])
    sys.stdout.write(picture(frames))
