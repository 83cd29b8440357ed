"""The bar of a training, with what its last step brought."""

from collections.abc import Iterable
from typing import Any

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.text import Text


class StepBar(Progress):
    """A bar, and below it a task's description, which takes several lines where the terminal is narrow."""

    def __init__(self, **options: Any) -> None:
        super().__init__(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), **options)

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            # the terminal's console leaves lines whole unless told otherwise
            yield Text(task.description, no_wrap=False, overflow="fold")
