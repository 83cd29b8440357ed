"""What the demo shows while it runs, and at its end."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from peer.formatting import counted
from talkoot.terminal import Terminal
from talkoot.progress import StepBar

_NEWS_SHOWN = 8
_LINE_EVERY_STEPS = 10
_COLUMNS = ("peer", "process", "state", "experts", "adopted", "updates", "rows/s")


class DemoDisplay:
    """One picture of all processes when somebody watches, else a line for each thing that happens."""

    def __init__(self, terminal: Terminal, steps: int) -> None:
        self._terminal = terminal
        self._steps = steps
        self._began = time.monotonic()
        self._nodes: dict[str, tuple[str, ...]] = {}
        self._news: deque[str] = deque(maxlen=_NEWS_SHOWN)
        self._bar = StepBar(auto_refresh=False)
        self._task = self._bar.add_task("the trainer has not begun", total=steps)

    @contextmanager
    def shown(self) -> Iterator[None]:
        if not self._terminal.live:
            yield
            return
        with Live(console=self._terminal.err, get_renderable=self._picture, refresh_per_second=4):
            yield

    def tell(self, news: str) -> None:
        """Something happened."""
        line = f"{time.monotonic() - self._began:5.1f} s  {news}"
        self._news.append(line)
        if not self._terminal.live:
            self._terminal.err.print(line)

    def show_node(self, name: str, pid: int, status: Mapping[str, Any]) -> None:
        self._nodes[name] = (
            name,
            str(pid),
            str(status["state"]),
            str(status["experts"]),
            str(status["adopted"]),
            str(status["updates"]),
            f"{status['rows_per_s']:.0f}",
        )

    def show_node_state(self, name: str, pid: int, state: str) -> None:
        """A node of which no more is known than this."""
        self._nodes[name] = (name, str(pid), state, "", "", "", "")

    def show_step(self, event: Mapping[str, Any]) -> None:
        loss = "skipped" if event["loss"] is None else f"loss {event['loss']:.3f}"
        failures = ", ".join(
            f"{counted(count, 'call')} {cause}" for cause, count in sorted(event["failures"].items())
        )
        words = (
            f"{loss}, {event['tokens_per_s']:.0f} tokens/s, "
            f"{event['experts_live']} of {counted(event['experts_total'], 'expert')} live, "
            f"{failures or 'no failed calls'}"
        )
        self._bar.update(self._task, completed=event["step"], description=words)
        step = event["step"]
        if not self._terminal.live and (step % _LINE_EVERY_STEPS == 0 or step in {1, self._steps}):
            self.tell(f"step {step} of {self._steps}: {words}")

    def _picture(self) -> Group:
        table = Table(*_COLUMNS, title="a swarm on this machine")
        for row in list(self._nodes.values()):
            table.add_row(*row)
        return Group(table, self._bar.get_renderable(), Text("\n".join(self._news)))


def print_summary(terminal: Terminal, values: Mapping[str, Any]) -> None:
    """The figures that --json writes, for people."""
    table = Table(title="the demo", show_header=False)
    for name, value in values.items():
        shown = f"{value:.2f}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), shown)
    terminal.out.print(table)
