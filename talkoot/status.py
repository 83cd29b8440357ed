"""`talkoot status`: looks at a swarm from outside and lists its nodes and experts."""

import asyncio
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from hivemind.p2p import PeerID
from rich.table import Table

from dht.directory import Directory, View
from dht.invite import Invite
from dht.registry import NodeInfo, Replica
from dht.swarm import Stage, join_swarm
from dht.uid import UID
from peer.errors import SettingsError
from peer.identity import Identity
from talkoot.console import Terminal, quiet_hivemind
from talkoot.signals import run_until_stopped


@dataclass(frozen=True)
class Reading:
    """A swarm at one moment, as the DHT knows it."""

    swarm: str
    view: View
    nodes: dict[PeerID, NodeInfo]
    """Nodes that host nothing included."""

    def to_dict(self) -> dict[str, Any]:
        """The form of `talkoot status --json`. Ages and times in seconds."""
        uids = self.view.manifest.uids()
        return {
            "swarm": self.swarm,
            "read_at": self.view.read_at,
            "nodes": [_node_dict(node, self.view.read_at) for node in self.nodes.values()],
            "experts": {
                "total": len(uids),
                "alive": self.view.live_experts(),
                "list": [
                    {"uid": str(uid), "replicas": [_replica_dict(r) for r in self.view.replicas.get(uid, ())]}
                    for uid in uids
                ],
            },
        }


def run_status(terminal: Terminal, join: str | None) -> None:
    """Prints one reading of the swarm. Raises UserError when it can't be reached."""
    quiet_hivemind()
    if join is None:
        raise SettingsError("pass --join INVITE: the line that the founder's node printed")
    invite = Invite.parse(join)
    with (
        tempfile.TemporaryDirectory(prefix="talkoot-status-") as folder,
        terminal.stages("making ready") as stage,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        reading = runner.run(run_until_stopped(_read(invite, Path(folder), stage)))
    if terminal.json:
        terminal.event("status", reading.to_dict())
    else:
        _print_tables(terminal, reading)


async def _read(invite: Invite, folder: Path, stage: Stage) -> Reading:
    identity = Identity.load_or_create(folder / "identity.key")
    swarm = await join_swarm(identity, invite, listen="127.0.0.1", serves_dht=False, stage=stage)
    try:
        stage("reading who is there")
        directory = Directory(swarm.registry, swarm.manifest, refresh_every_s=1.0)
        view = await directory.refresh()
        listed = await swarm.registry.node_ids()
        others = await swarm.registry.nodes(listed - set(view.nodes))
        return Reading(swarm.keys.swarm_id, view, {**view.nodes, **others})
    finally:
        await swarm.stop()


def _node_dict(node: NodeInfo, read_at: float) -> dict[str, Any]:
    return {
        "peer_id": node.peer_id.to_base58(),
        "addresses": list(node.addresses),
        "experts": node.expert_count,
        "capacity": node.expert_capacity,
        "updates": node.updates,
        "rows": node.rows_processed,
        "protocol_version": node.protocol_version,
        "software_version": node.software_version,
        "up_s": read_at - node.started_at,
        "expires_in_s": node.expires_at - read_at,
    }


def _replica_dict(replica: Replica) -> dict[str, Any]:
    return {
        "peer_id": replica.peer_id.to_base58(),
        "state": replica.state.name.lower(),
        "update_count": replica.update_count,
    }


def _print_tables(terminal: Terminal, reading: Reading) -> None:
    view = reading.view
    terminal.line(
        f"swarm {reading.swarm}: {len(reading.nodes)} nodes, {view.live_experts()} of "
        f"{view.manifest.experts_total} experts alive, read {time.time() - view.read_at:.1f} s ago"
    )
    terminal.out.print(_nodes_table(reading))
    for layer in range(view.manifest.model.layers):
        terminal.out.print(_layer_table(view, layer))


def _nodes_table(reading: Reading) -> Table:
    table = Table(title="nodes")
    for column in ("peer", "address", "experts", "updates", "rows", "version", "up", "expires"):
        table.add_column(column, overflow="fold")
    for node in reading.nodes.values():
        table.add_row(
            node.peer_id.to_base58()[-8:],
            ", ".join(node.addresses),
            f"{node.expert_count}/{node.expert_capacity}",
            str(node.updates),
            str(node.rows_processed),
            f"{node.software_version}/{node.protocol_version}",
            f"{reading.view.read_at - node.started_at:.0f} s",
            f"{node.expires_at - reading.view.read_at:.0f} s",
        )
    return table


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
