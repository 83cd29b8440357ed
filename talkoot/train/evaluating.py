"""`talkoot evaluate`: how well a trained model knows a text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from talkoot.terminal import Terminal, to_json
from talkoot.signals import StopSignals
from talkoot.train.trained import TrainedModel, trained_model
from trainer_client.corpus import Corpus, prepare
from trainer_client.evaluate import Evaluation, evaluate
from trainer_client.settings import TrainerSettings
from trainer_client.data.sources import find_files
from trainer_client.data.tokenizer import Tokenizer


def run_evaluate(
    terminal: Terminal,
    signals: StopSignals,
    join: str | None,
    paths: Sequence[str],
    flags: Mapping[str, Any],
) -> None:
    """Raises UserError when it can't, and Stopped after a signal."""
    files = find_files(paths)
    read: list[Corpus] = []

    def read_files(tokenizer: Tokenizer, settings: TrainerSettings, folder: Path) -> None:
        read.append(prepare(files, settings.field, tokenizer, folder / "text"))

    with trained_model(terminal, signals, join, flags, read_files) as trained:
        evaluation = _evaluate(terminal, trained, read[0])
        unanswered = trained.client.dispatcher.stats.unanswered_rows
    values = asdict(evaluation) | {"step": trained.step, "unanswered_rows": unanswered}
    if terminal.json:
        terminal.line(to_json(values))
    else:
        terminal.out.print(_table(values))


def _evaluate(terminal: Terminal, trained: TrainedModel, corpus: Corpus) -> Evaluation:
    with _shown(terminal, len(corpus.tokens) - trained.model.first_scored) as show:

        def observe(done: int) -> bool:
            show(done)
            return trained.has_experts()

        return evaluate(
            trained.model,
            corpus.tokens,
            trained.tokenizer.token_bytes,
            trained.settings.batch_size,
            observe,
        )


@contextmanager
def _shown(terminal: Terminal, total: int) -> Iterator[Callable[[int], None]]:
    if not terminal.live:
        yield lambda done: None
        return
    columns = (
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} tokens"),
        TimeRemainingColumn(),
    )
    with ProgressBar(*columns, console=terminal.err, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)


def _table(values: Mapping[str, Any]) -> Table:
    table = Table(show_header=False)
    for name, value in values.items():
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), shown)
    return table
