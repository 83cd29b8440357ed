"""`talkoot train`: joins a swarm, trains, and shows how it goes."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import platformdirs
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from dht.invite import Invite
from peer.errors import SettingsError
from talkoot.console import Terminal, quiet_hivemind, to_json, write_json
from talkoot.signals import StopSignals
from trainer_client.client import SwarmClient
from trainer_client.data import ByteDataset, load_text
from trainer_client.model import LanguageModel
from trainer_client.settings import TrainerSettings
from trainer_client.training import Progress, Summary, train

logger = logging.getLogger(__name__)

_WAIT_FOR_EXPERTS_S = 60.0
_LINE_EVERY_STEPS = 10


def run_train(
    terminal: Terminal,
    signals: StopSignals,
    join: str | None,
    data: Path | None,
    config: Path | None,
    flags: Mapping[str, Any],
    json_file: Path | None,
) -> None:
    """Raises UserError when it can't train, and Stopped after a signal; a run that was stopped has its summary too."""
    quiet_hivemind()
    settings = TrainerSettings.load(config, **flags)
    if join is None:
        raise SettingsError("pass --join INVITE: the line that the founder's node printed")
    invite = Invite.parse(join)
    text = load_text(data)
    if json_file is not None:
        # better known now than after the training
        write_json(json_file, "")
    state = settings.state or platformdirs.user_state_path("talkoot") / "trainer"
    with terminal.stages("making ready") as stage:
        client = SwarmClient(invite, settings, state, stage=stage)
    try:
        summary = _train(terminal, signals, client, text, settings)
        values = asdict(summary) | _dispatched(client) | {"stopped": signals.received is not None}
    finally:
        signals.ignore()
        client.close()
    if json_file is not None:
        write_json(json_file, to_json(values) + "\n")
    if terminal.json:
        terminal.event("summary", values)
    else:
        terminal.out.print(_summary_table(values))
    if signals.received is not None:
        raise signals.received


def _train(
    terminal: Terminal, signals: StopSignals, client: SwarmClient, text: bytes, settings: TrainerSettings
) -> Summary:
    seed = client.own_seed if settings.seed is None else settings.seed
    dataset = ByteDataset(text, client.manifest.model.context, seed=seed)
    with terminal.stages("looking for experts") as stage:
        client.wait_for_experts(_WAIT_FOR_EXPERTS_S, _once(stage))
    model = LanguageModel(client.manifest, client.make_mixture)
    stop = threading.Event()
    with _observer(terminal, client, settings.steps) as show, signals.gently(stop):

        def observe(progress: Progress) -> None:
            client.presence.note(progress)
            show(progress)
            _pause_without_experts(client, stop)

        return train(model, dataset, settings, observe=observe, stop=stop)


def _pause_without_experts(client: SwarmClient, stop: threading.Event) -> None:
    """Without experts only the dense part would learn. Raises SwarmError when none comes back in time."""
    if client.dispatcher.live_experts() or stop.is_set():
        return
    logger.warning("no expert answers: training pauses until one does, at most %.0f s", _WAIT_FOR_EXPERTS_S)
    client.wait_for_experts(_WAIT_FOR_EXPERTS_S, lambda text: None, share=1 / client.manifest.experts_total)
    logger.info("training goes on with %d live experts", client.dispatcher.live_experts())


def _once(stage: Callable[[str], None]) -> Callable[[str], None]:
    """Leaves out what was just said."""
    said = [""]

    def say(text: str) -> None:
        if text != said[0]:
            said[0] = text
            stage(text)

    return say


@contextmanager
def _observer(terminal: Terminal, client: SwarmClient, steps: int) -> Iterator[Callable[[Progress], None]]:
    """Gives the function that shows each step: a bar when somebody watches, else JSON or log lines."""
    if terminal.json:
        yield lambda progress: terminal.event("step", asdict(progress) | _swarm_now(client))
        return
    if not terminal.live:
        yield lambda progress: _log_step(progress, client)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with ProgressBar(*columns, console=terminal.err) as bar:
        task = bar.add_task("validating before the first step", total=steps)
        yield lambda progress: bar.update(task, completed=progress.step, description=_words(progress, client))


def _log_step(progress: Progress, client: SwarmClient) -> None:
    if progress.step % _LINE_EVERY_STEPS == 0 or progress.step in {1, progress.steps}:
        logger.info("step %d of %d: %s", progress.step, progress.steps, _words(progress, client))


def _words(progress: Progress, client: SwarmClient) -> str:
    now = _swarm_now(client)
    failures = (
        ", ".join(f"{count} {cause}" for cause, count in sorted(now["failures"].items())) or "no failures"
    )
    validation = (
        "" if progress.validation_loss is None else f", validation loss {progress.validation_loss:.3f}"
    )
    return (
        f"loss {progress.loss:.3f}{validation}, {progress.tokens_per_s:.0f} tokens/s, "
        f"{now['experts_live']} of {now['experts_total']} experts live, {failures}"
    )


def _swarm_now(client: SwarmClient) -> dict[str, Any]:
    return {
        "experts_live": client.dispatcher.live_experts(),
        "experts_total": client.manifest.experts_total,
        "failures": dict(client.dispatcher.stats.failures),
    }


def _dispatched(client: SwarmClient) -> dict[str, Any]:
    stats = client.dispatcher.stats
    return _swarm_now(client) | {
        "calls": stats.calls,
        "reselected_rows": stats.reselected_rows,
        "unanswered_rows": stats.unanswered_rows,
        "late_backward": stats.late_backward,
        "skipped_updates": stats.skipped_updates,
        "rollbacks": stats.rollbacks,
    }


def _summary_table(values: Mapping[str, Any]) -> Table:
    table = Table(title="stopped" if values["stopped"] else "done", show_header=False)
    for name, value in values.items():
        if name != "stopped":
            shown = f"{value:.3f}" if isinstance(value, float) else "not measured" if value is None else value
            if isinstance(value, dict):
                shown = ", ".join(f"{count} {cause}" for cause, count in value.items()) or "none"
            table.add_row(name.replace("_", " "), str(shown))
    return table
