"""`talkoot status`: looks at a swarm from outside and lists its nodes, trainers and experts."""

import asyncio
import tempfile
import time
from pathlib import Path

import uvloop
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dht.directory import View
from dht.invites import Invite
from dht.swarm import Stage, Swarm, join_swarm
from dht.uid import UID
from peer.errors import UnreachableError
from peer.identity import Identity
from peer.formatting import counted
from talkoot.terminal import Terminal, age_in_words, quiet_hivemind
from talkoot.fitting import FittingTable
from talkoot.joining import invite_of
from talkoot.reading import Reading, SwarmReader
from talkoot.signals import run_until_stopped

_WATCH_EVERY_S = 2.0
_LIST_EVERY_S = 20.0


def run_status(terminal: Terminal, join: str | None, watch: bool = False) -> None:
    """Prints one reading of the swarm, with `watch` one after the other. Raises UserError when it can't be reached."""
    quiet_hivemind()
    invite = invite_of(join)
    with (
        tempfile.TemporaryDirectory(prefix="talkoot-status-") as folder,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(run_until_stopped(_look(terminal, invite, Path(folder), watch)))


async def _look(terminal: Terminal, invite: Invite, folder: Path, watch: bool) -> None:
    with terminal.stages("making ready") as stage:
        swarm = await _join(invite, folder, stage)
    try:
        reader = SwarmReader(swarm, list_every_s=_LIST_EVERY_S)
        if not watch:
            _show(terminal, await reader.read())
        elif terminal.json or not terminal.out.is_terminal:
            await _show_again_and_again(terminal, reader)
        else:
            await _show_live(terminal, reader)
    finally:
        await swarm.stop()


async def _join(invite: Invite, folder: Path, stage: Stage) -> Swarm:
    identity = Identity.load_or_create(folder / "identity.key")
    return await join_swarm(identity, invite, listen="127.0.0.1", serves_dht=False, stage=stage)


async def _show_again_and_again(terminal: Terminal, reader: SwarmReader) -> None:
    while True:
        _show(terminal, await reader.read())
        await asyncio.sleep(_WATCH_EVERY_S)


async def _show_live(terminal: Terminal, reader: SwarmReader) -> None:
    """In place, until a signal comes. When the swarm does not answer, the last reading stays, with its age."""
    reading, trouble = await reader.read(), ""
    with Live(console=terminal.out, auto_refresh=False, screen=True, vertical_overflow="crop") as live:
        while True:
            live.update(Group(*_renderables(reading), Text(trouble, style="red")), refresh=True)
            await asyncio.sleep(_WATCH_EVERY_S)
            try:
                reading, trouble = await reader.read(), ""
            except UnreachableError as error:
                trouble = f"cannot reach the swarm: {error}"


def _show(terminal: Terminal, reading: Reading) -> None:
    if terminal.json:
        terminal.event("status", reading.to_dict())
        return
    for part in _renderables(reading):
        terminal.out.print(part)
    terminal.out.file.flush()


def _renderables(reading: Reading) -> list[RenderableType]:
    view = reading.view
    head = (
        f"swarm {reading.swarm}: {counted(len(reading.nodes), 'node')}, {view.live_experts()} of "
        f"{counted(view.manifest.experts_total, 'expert')} alive, {counted(len(reading.trainers), 'trainer')}, "
        f"read {time.time() - view.read_at:.1f} s ago"
    )
    layers = [_layer_table(view, layer) for layer in range(view.manifest.model.layers)]
    return [
        Text(head),
        *([Text(f"warning: {reading.warning}", style="yellow")] if reading.warning else []),
        _nodes_table(reading),
        *([_trainers_table(reading)] if reading.trainers else []),
        *layers,
    ]


def _nodes_table(reading: Reading) -> FittingTable:
    columns = (
        "peer",
        "name",
        "state",
        "address",
        "reached",
        "experts",
        "updates",
        "rows",
        "rows/s",
        "version",
        "up",
        "expires",
    )
    table = FittingTable(
        "nodes", columns, ("expires", "rows", "version", "updates", "up", "rows/s", "address", "reached")
    )
    for node in reading.nodes.values():
        table.add_row(
            node.peer_id.to_base58()[-8:],
            node.name or "-",
            node.activity.name.lower(),
            ", ".join(node.addresses) or "-",
            node.reachability.name.lower(),
            f"{node.expert_count}/{node.expert_capacity}",
            str(node.updates),
            str(node.rows_processed),
            _shown(node.rows_per_s, ".0f"),
            f"{node.software_version}/{node.protocol_version}",
            age_in_words(reading.view.read_at - node.started_at),
            f"{node.expires_at - reading.view.read_at:.0f} s",
        )
    return table


def _trainers_table(reading: Reading) -> FittingTable:
    columns = (
        "peer",
        "name",
        "step",
        "loss",
        "validation loss",
        "bits/byte",
        "tokens/s",
        "failures",
        "version",
        "up",
    )
    table = FittingTable("trainers", columns, ("version", "up", "bits/byte", "failures", "tokens/s", "loss"))
    for trainer in reading.trainers.values():
        table.add_row(
            trainer.peer_id.to_base58()[-8:],
            trainer.name or "-",
            f"{trainer.step}/{trainer.steps}",
            _shown(trainer.loss, ".3f"),
            _shown(trainer.validation_loss, ".3f"),
            _shown(trainer.bits_per_byte, ".3f"),
            _shown(trainer.tokens_per_s, ".0f"),
            ", ".join(f"{count} {cause}" for cause, count in sorted(trainer.failures.items())) or "none",
            f"{trainer.software_version}/{trainer.protocol_version}",
            age_in_words(reading.view.read_at - trainer.started_at),
        )
    return table


def _shown(value: float | None, form: str) -> str:
    """`?` for what is not known, which is not 0."""
    return "?" if value is None else format(value, form)


def _layer_table(view: View, layer: int) -> Table:
    """Replicas that serve, at each place of the layer's grid; a row for all dimensions but the last."""
    columns = view.manifest.experts.grid[-1]
    table = Table(title=f"layer {layer}: replicas of each expert")
    table.add_column("")
    for column in range(columns):
        table.add_column(str(column), justify="right")
    by_row: dict[tuple[int, ...], list[UID]] = {}
    for uid in view.manifest.uids():
        if uid.layer == layer:
            by_row.setdefault(uid.coordinate[:-1], []).append(uid)
    for coordinate, uids in by_row.items():
        counts = [len(view.hosts(uid)) for uid in uids]
        table.add_row(".".join(map(str, coordinate)), *(str(count) if count else "-" for count in counts))
    return table
