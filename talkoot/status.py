"""`talkoot status`: lists the nodes, trainers and experts of a swarm, from their records in the DHT."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dht.announcements import NodeInfo, PeerInfo, Reachability, Replica, TrainerInfo
from dht.directory import Directory, View
from dht.manifest import Manifest
from dht.swarm import Swarm
from dht.uid import UID, grid_coordinates
from peer import clock
from peer.errors import SettingsError, UnreachableError
from peer.formatting import age_in_words, counted
from peer.identity import PeerID
from talkoot.credit import Credit, CreditReader, signed_figures
from talkoot.ephemeral import run_in_swarm
from talkoot.node.control import invite_of_running, node_folder
from talkoot.terminal import FittingScreen, FittingTable, Terminal

_WATCH_EVERY_S = 2.0
_LIST_EVERY_S = 20.0
_NODES_AT_ONCE = 512
"""Node records in one look-up. A look-up has one deadline."""
_MOST_LISTED = 65536
"""The most experts shown one by one. In a larger swarm, whose manifest may have 2^26, only those with a replica are
shown.
"""
_MOST_CREDITED, _CREDIT_S = 64, 5.0
"""The most nodes whose receipts are read at a time, drawn at random if there are more, and the deadline for that."""
_LOOK_AGAIN_S = 300.0
"""How many seconds until a listed peer without a record is looked up again."""


@dataclass(frozen=True)
class SwarmReading:
    """A swarm at one moment, according to the DHT."""

    swarm: str
    view: View
    nodes: dict[PeerID, NodeInfo]
    """Includes nodes that host nothing."""
    trainers: dict[PeerID, TrainerInfo] = field(default_factory=dict)
    warning: str = ""
    """For example that the manifest expires soon; empty: none."""
    left_nodes: dict[PeerID, NodeInfo] = field(default_factory=dict)
    """Nodes that have recently left in an orderly way."""
    left_trainers: dict[PeerID, TrainerInfo] = field(default_factory=dict)
    credit: Mapping[PeerID, Credit] = field(default_factory=dict)
    """The work that trainers have signed, for nodes whose receipts were read."""

    def to_dict(self) -> dict[str, Any]:
        """The values as printed by `talkoot status --json`. Ages and times are in seconds."""
        manifest = self.view.manifest
        uids = manifest.uids() if _can_list(manifest) else sorted(self.view.replicas)
        return {
            "swarm": self.swarm,
            "read_at": self.view.read_at,
            "warning": self.warning or None,
            "nodes": [
                _node_dict(node, self.view.read_at) | signed_figures(node, self.credit.get(node.peer_id))
                for node in self.nodes.values()
            ],
            "trainers": [
                _trainer_dict(trainer, self.view.read_at)
                for trainer in (*self.trainers.values(), *self.left_trainers.values())
            ],
            "experts": {
                "total": manifest.experts_total,
                "alive": self.view.live_experts(),
                "list": [
                    {"uid": str(uid), "replicas": [_replica_dict(r) for r in self.view.replicas.get(uid, ())]}
                    for uid in uids
                ],
            },
        }


class SwarmReader:
    """Reads one swarm repeatedly. It only reads the DHT: it announces nothing and calls no node's services."""

    def __init__(
        self,
        swarm: Swarm,
        *,
        list_every_s: float = 0.0,
        most_nodes: int = 65536,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`list_every_s`: how often it lists all nodes. Each reading finds those that host experts. `now`: a clock that
        nobody sets.
        """
        self._swarm = swarm
        self._directory = Directory(swarm.experts, swarm.manifest, refresh_every_s=1.0)
        self._list_every_s = list_every_s
        self._most_nodes = most_nodes
        self._now = now
        self._listed_at = float("-inf")
        self._hosts: frozenset[PeerID] = frozenset()
        """Nodes that hosted experts at the last reading."""
        self._idle: set[PeerID] = set()
        """Nodes that hosted nothing at the last reading."""
        self._missing: dict[PeerID, float] = {}
        """When to look again for listed peers that had no record."""

    async def read(self) -> SwarmReading:
        """Raises UnreachableError if the DHT does not answer in time."""
        registry = self._swarm.registry
        view = await self._directory.refresh()
        if self._now() >= self._listed_at + self._list_every_s:
            await self._list()
        self._idle |= self._hosts - view.nodes.keys()
        self._hosts = frozenset(view.nodes)
        others = await self._nodes(self._idle - set(view.nodes))
        trainers = await registry.trainers(await registry.trainer_ids(), with_left=True)
        record = self._swarm.manifest_record
        await record.look()
        return SwarmReading(
            self._swarm.keys.swarm_id,
            view,
            {**view.nodes, **{peer: node for peer, node in others.items() if not node.left}},
            {peer: trainer for peer, trainer in trainers.items() if not trainer.left},
            record.warning,
            {peer: node for peer, node in others.items() if node.left},
            {peer: trainer for peer, trainer in trainers.items() if trainer.left},
        )

    async def _list(self) -> None:
        """Anybody can list peers that don't exist, so listed peers are looked up rarely, and at most `most_nodes` of
        them.
        """
        now = self._now()
        listed = await self._swarm.registry.node_ids(self._most_nodes)
        self._listed_at = now
        self._missing = {p: at for p, at in self._missing.items() if p in listed and now < at}
        self._idle = set(listed - self._missing.keys())

    async def _nodes(self, peers: Collection[PeerID]) -> dict[PeerID, NodeInfo]:
        """Includes nodes that have left in an orderly way."""
        wanted, found = list(peers), dict[PeerID, NodeInfo]()
        for start in range(0, len(wanted), _NODES_AT_ONCE):
            some = wanted[start : start + _NODES_AT_ONCE]
            found |= await self._swarm.registry.nodes(some, with_left=True)
        look_again = self._now() + _LOOK_AGAIN_S
        for peer in wanted:
            if peer not in found:
                self._missing[peer] = look_again
        self._idle -= self._missing.keys()
        return found


def run_status(terminal: Terminal, join: str | None, watch: bool = False, state: Path | None = None) -> None:
    """Prints a reading of the swarm; with `watch`, again and again. Raises UserError if it can't be reached.

    `state`: the folder of the node whose swarm it is if there is no invite.
    """
    if join is None:
        folder = node_folder(state)
        join = invite_of_running(folder)
        if join is None:
            raise SettingsError(
                f"pass --join INVITE, or the --state of a node that runs here: none runs with {folder}"
            )
    run_in_swarm(terminal, join, lambda swarm: _look(terminal, swarm, watch))


async def _look(terminal: Terminal, swarm: Swarm, watch: bool) -> None:
    reader, credit = SwarmReader(swarm, list_every_s=_LIST_EVERY_S), CreditReader.of(swarm)

    async def read() -> SwarmReading:
        reading = await reader.read()
        await credit.read(reading.nodes.values(), _MOST_CREDITED, _CREDIT_S)
        return replace(reading, credit=credit.credit)

    try:
        if not watch:
            _show(terminal, await read())
        elif terminal.out_is_live:
            await _show_live(terminal, read)
        else:
            await _show_repeatedly(terminal, read)
    finally:
        await credit.close()


Read = Callable[[], Awaitable[SwarmReading]]


async def _show_repeatedly(terminal: Terminal, read: Read) -> None:
    while True:
        _show(terminal, await read())
        await asyncio.sleep(_WATCH_EVERY_S)


async def _show_live(terminal: Terminal, read: Read) -> None:
    """Redraws in place until a signal arrives. If the swarm does not answer, the last reading stays, with its age."""
    reading, trouble = await read(), ""
    with Live(console=terminal.out, auto_refresh=False, screen=True, vertical_overflow="crop") as live:
        while True:
            # first, because the end does not fit into a low window
            warned = [Text(trouble, style="red")] if trouble else []
            live.update(FittingScreen(*warned, *_renderables(reading)), refresh=True)
            await asyncio.sleep(_WATCH_EVERY_S)
            try:
                reading, trouble = await read(), ""
            except UnreachableError as error:
                trouble = f"cannot reach the swarm: {error}"


def _show(terminal: Terminal, reading: SwarmReading) -> None:
    if terminal.json:
        terminal.event("status", reading.to_dict())
        return
    for part in _renderables(reading):
        terminal.out.print(part)
    terminal.out.file.flush()


def _renderables(reading: SwarmReading) -> list[RenderableType]:
    view = reading.view
    head = (
        f"swarm {reading.swarm}: {counted(len(reading.nodes), 'node')}, {view.live_experts()} of "
        f"{counted(view.manifest.experts_total, 'expert')} alive, {counted(len(reading.trainers), 'trainer')}, "
        f"read {clock.now() - view.read_at:.1f} s ago"
    )
    layers = range(view.manifest.model.layers if _can_list(view.manifest) else 0)
    return [
        Text(head),
        *([Text(f"warning: {reading.warning}", style="yellow")] if reading.warning else []),
        _nodes_table(reading),
        *([_trainers_table(reading)] if reading.trainers or reading.left_trainers else []),
        *(_layer_table(view, layer) for layer in layers),
    ]


def _nodes_table(reading: SwarmReading) -> FittingTable:
    columns = (
        "peer",
        "name",
        "state",
        "address",
        "reached",
        "experts/max",
        "updates",
        "computed",
        "signed",
        "rows/s",
        "shards",
        "version",
        "up",
        "expires",
    )
    first_to_go = [
        "expires",
        "version",
        "updates",
        "up",
        "rows/s",
        "address",
        "computed",
        "signed",
        "reached",
    ]
    has_memories = any(node.memory_shards for node in reading.nodes.values())
    first_to_go.insert(first_to_go.index("address") if has_memories else 0, "shards")
    table = FittingTable("nodes", columns, first_to_go)
    for node in reading.nodes.values():
        table.add_row(
            node.peer_id.short,
            node.name or "-",
            node.activity.name.lower() + (", unsteady" if node.unsteady else ""),
            ", ".join(node.addresses) or "-",
            "?" if node.reachability is Reachability.UNKNOWN else node.reachability.name.lower(),
            str(node.expert_count) + (f"/{node.expert_capacity}" if node.expert_capacity else ""),
            f"{node.contributed_updates:,}",
            f"{node.contributed_rows:,}",
            _signed(node, reading.credit.get(node.peer_id)),
            _shown(node.rows_per_s, ".0f"),
            str(node.memory_shards),
            f"{node.software_version}/{node.protocol_version}",
            _up(node, reading.view.read_at),
            f"{node.expires_at - reading.view.read_at:.0f} s",
        )
    return table


def _signed(node: NodeInfo, credit: Credit | None) -> str:
    """The work that trainers have signed for, such as `1,234 by 3`; `?`: its receipts were not read."""
    figures = signed_figures(node, credit)
    pairs, trainers = figures["signed_pairs"], figures["signed_trainers"]
    return "?" if pairs is None else f"{pairs:,} by {trainers}" if trainers else "0"


def _trainers_table(reading: SwarmReading) -> FittingTable:
    columns = (
        "peer",
        "name",
        "state",
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
    for trainer in (*reading.trainers.values(), *reading.left_trainers.values()):
        table.add_row(
            trainer.peer_id.short,
            trainer.name or "-",
            trainer_state(trainer, trainer.left),
            _shown(trainer.reported_step, "d") if trainer.is_own_loop else f"{trainer.step}/{trainer.steps}",
            _shown(trainer.loss, ".3f"),
            _shown(trainer.validation_loss, ".3f"),
            _shown(trainer.bits_per_byte, ".3f"),
            "-" if trainer.left else _shown(trainer.tokens_per_s, ".0f"),
            ", ".join(f"{count} {cause}" for cause, count in sorted(trainer.failures.items())) or "none",
            f"{trainer.software_version}/{trainer.protocol_version}",
            _up(trainer, reading.view.read_at),
        )
    return table


def trainer_state(trainer: TrainerInfo, left: bool) -> str:
    """The trainer's state in a word or two. `left`: whether it has left in an orderly way."""
    if left:
        return "finished" if trainer.step >= trainer.steps else "stopped"
    return "own loop" if trainer.is_own_loop else "training"


def up_s(peer: PeerInfo, now: float) -> float | None:
    """For how long a peer has run; None if it does not say when it started. 0 if its clock is ahead."""
    return max(0.0, now - peer.started_at) if peer.started_at else None


def _up(peer: PeerInfo, now: float) -> str:
    seconds = up_s(peer, now)
    return "?" if seconds is None else age_in_words(seconds)


def _shown(value: float | None, form: str) -> str:
    """`?` for an unknown value, to distinguish it from 0."""
    return "?" if value is None else format(value, form)


def _can_list(manifest: Manifest) -> bool:
    return manifest.experts_total <= _MOST_LISTED


def _layer_table(view: View, layer: int) -> Table:
    """The number of serving replicas at each place of the grid. The columns are its last dimension."""
    columns = view.manifest.experts.grid[-1]
    table = Table(title=f"layer {layer}: replicas of each expert")
    table.add_column("")
    for column in range(columns):
        table.add_column(str(column), justify="right")
    by_row: dict[tuple[int, ...], list[UID]] = {}
    for coordinate in grid_coordinates(view.manifest.experts.grid):
        by_row.setdefault(coordinate[:-1], []).append(UID(layer, coordinate))
    for coordinate, uids in by_row.items():
        counts = [len(view.hosts(uid)) for uid in uids]
        table.add_row(".".join(map(str, coordinate)), *(str(count) if count else "-" for count in counts))
    return table


def _node_dict(node: NodeInfo, read_at: float) -> dict[str, Any]:
    return {
        "peer_id": node.peer_id.to_base58(),
        "name": node.name or None,
        "activity": node.activity.name.lower(),
        "unsteady": node.unsteady,
        "addresses": list(node.addresses),
        "reachability": node.reachability.name.lower(),
        "experts": node.expert_count,
        "capacity": node.expert_capacity,
        "updates": node.updates,
        "rows": node.rows_processed,
        "contributed_rows": node.contributed_rows,
        "contributed_updates": node.contributed_updates,
        "rows_per_s": node.rows_per_s,
        "memory_shards": node.memory_shards,
        "memory_bytes": node.memory_bytes,
        "memory_queries": node.memory_queries,
        "contributed_hours": round(node.contributed_s / 3600, 1),
        "protocol_version": node.protocol_version,
        "software_version": node.software_version,
        "up_s": up_s(node, read_at),
        "expires_in_s": node.expires_at - read_at,
    }


def _trainer_dict(trainer: TrainerInfo, read_at: float) -> dict[str, Any]:
    return {
        "peer_id": trainer.peer_id.to_base58(),
        "name": trainer.name or None,
        "state": trainer_state(trainer, trainer.left),
        "step": trainer.reported_step,
        "steps": trainer.steps or None,
        "loss": trainer.loss,
        "validation_loss": trainer.validation_loss,
        "bits_per_byte": trainer.bits_per_byte,
        "tokens_per_s": None if trainer.left else trainer.tokens_per_s,
        "failures": dict(trainer.failures),
        "software_version": trainer.software_version,
        "up_s": up_s(trainer, read_at),
        "expires_in_s": trainer.expires_at - read_at,
    }


def _replica_dict(replica: Replica) -> dict[str, Any]:
    return {
        "peer_id": replica.peer_id.to_base58(),
        "state": replica.state.name.lower(),
        "update_count": replica.update_count,
    }
