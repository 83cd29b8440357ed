"""`talkoot node`: starts a node, shows what it does, and stops it.

The port that a node's DHT had last, so that it comes back to where invites and other peers' memories lead.
"""

import asyncio
import ipaddress
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import uvloop
from rich.live import Live

from dht.admission import Denylist, Role
from dht.invites import Invite
from dht.manifest import Manifest
from dht.records import SwarmKeys
from dht.swarm import Stage, Swarm, found_swarm, join_swarm, was_member
from expert_server.blocks import builder_of
from expert_server.experts.devices import check_devices
from expert_server.node import Node
from expert_server.resources import keep_freed_memory, within_memory
from expert_server.settings import NodeSettings
from expert_server.status import NodeStatus
from peer.errors import PortError, SettingsError, StartError, UnreachableError, UserError
from peer.files import StateFolder, write_atomically
from peer.identity import Identity
from peer.kademlia.hivemind import quiet_hivemind
from peer.kademlia.storage import StoreBounds
from peer.settings import DENYLIST
from peer.transport.addresses import (
    NetworkConfig,
    default_listen_address,
    is_multiaddress,
    multiaddress,
    require_free_port,
)
from talkoot.node.control import LOG_FILE, ControlServer, node_folder
from talkoot.node.invites import FoundedSwarm, invite_advice
from talkoot.node.view import Pace, PaceMeter, line, panel
from talkoot.signals import Stopped, run_until_stopped
from talkoot.terminal import Terminal, log_file

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_LINE_EVERY_S = 10.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 2.0, 60.0
"""Between two tries to come back to a swarm of which nobody answers."""
_LAST_PORT = "dht-port"


@dataclass(frozen=True)
class Origin:
    """Where a node gets its swarm from: a manifest to found one, or an invite to join one."""

    new: Path | None
    join: str | None
    bootstrap: tuple[str, ...]

    def swarm_starter(self) -> "SwarmStarter":
        """Reads the manifest or the invite. Raises UserError when it is not valid."""
        if (self.new is None) == (self.join is None):
            raise SettingsError(
                "pass either --new swarm.toml to found a swarm, or --join INVITE to join one"
                + ("; not both" if self.new else "")
            )
        for address in self.bootstrap:
            if not is_multiaddress(address):
                raise SettingsError(
                    f"--bootstrap {address}: no multiaddress that names a peer, such as /ip4/10.0.0.1/tcp/31337/p2p/Qm…"
                )
        if self.new is not None:
            manifest = Manifest.from_toml(self.new)
            builder_of(manifest.experts.kind)  # better known now than when the manifest is published
            return SwarmStarter(manifest, None, self.bootstrap)
        assert self.join is not None
        invite = Invite.read(self.join)
        return SwarmStarter(None, replace(invite, bootstrap=(*invite.bootstrap, *self.bootstrap)), ())


@dataclass(frozen=True)
class SwarmStarter:
    """A manifest or an invite that was found valid."""

    manifest: Manifest | None
    invite: Invite | None
    bootstrap: tuple[str, ...]

    def comes_back(self, identity: Identity, state: Path) -> bool:
        """Whether the node was in this swarm before."""
        if self.invite is not None:
            return was_member(state, self.invite.keys)
        assert self.manifest is not None
        return was_member(state, SwarmKeys(self.manifest.name, identity.peer_id))

    async def start(
        self, identity: Identity, settings: NodeSettings, host: str, state: Path, stage: Stage
    ) -> Swarm:
        announce = announced_address(settings, host)
        port = settings.dht_port or last_port(state, host)
        denylist = Denylist(settings.denylist or state / DENYLIST, settings.deny)
        maps_port = settings.upnp and announce is None and not host.startswith("127.")
        config = NetworkConfig(host, port, announce, maps_port=maps_port)
        bounds = StoreBounds(settings.max_dht_bytes)
        if self.manifest is not None:
            return await found_swarm(
                identity,
                self.manifest,
                config,
                bootstrap=self.bootstrap,
                state=state,
                denylist=denylist,
                store_bounds=bounds,
                stage=stage,
            )
        assert self.invite is not None
        return await join_swarm(
            identity,
            self.invite,
            config,
            state=state,
            roles=(Role.NODE,),
            denylist=denylist,
            store_bounds=bounds,
            stage=stage,
        )


def run_node(terminal: Terminal, origin: Origin, settings: NodeSettings, invite_file: Path | None) -> None:
    """Runs until a signal comes. Raises UserError when it can't start, and Stopped when stopped before it served."""
    keep_freed_memory()
    quiet_hivemind()
    check_devices(settings.device, settings.precision)  # better known before others are bothered
    starter = origin.swarm_starter()
    if starter.manifest is not None:
        within_memory(settings, starter.manifest)  # better known before it is published
    host = listen_address(settings)
    _be_nice(settings.niceness)
    folder = StateFolder(node_folder(settings.state))
    try:
        with log_file(folder.path / LOG_FILE):
            command = _NodeCommand(terminal, starter, settings, host, folder.path, invite_file)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(command.run())
    finally:
        folder.close()


class _NodeCommand:
    """One run of the command."""

    def __init__(
        self,
        terminal: Terminal,
        starter: SwarmStarter,
        settings: NodeSettings,
        host: str,
        state: Path,
        invite_file: Path | None,
    ) -> None:
        self._terminal = terminal
        self._starter = starter
        self._settings = settings
        self._host = host
        self._state = state
        self._invite_file = invite_file
        self._served = False
        self._control = ControlServer(state)
        self._node: Node | None = None

    async def run(self) -> None:
        """Serves until a signal comes. A node that served and was stopped has done its work: no error."""
        try:
            await run_until_stopped(self._serve_steered(), self._hurry)
        except Stopped:
            if not self._served:
                raise
            logger.info("left the swarm")
        except ExceptionGroup as group:
            mendable = group.subgroup(UserError)
            if mendable is None:
                raise
            raise _first(mendable) from group

    async def _serve_steered(self) -> None:
        async with self._control:
            await self._serve()

    async def _serve(self) -> None:
        with self._terminal.stages("making ready") as stage:
            identity = Identity.load_or_create(self._state / "identity.key")
            swarm = await self._start_swarm(identity, stage)
            # from here on the node stops the swarm
            node = await Node.start(self._settings, swarm, host=self._host, state=self._state, stage=stage)
        try:
            remember_port(self._state, swarm.host.config.port)
            self._control.attach(node)
            self._served = True
            self._node = node
            self._show_invite(node, await swarm.invite())
            async with asyncio.TaskGroup() as group:
                group.create_task(node.run())
                group.create_task(self._show_state(node))
        finally:
            if experts := node.status().experts:
                what = "1 expert goes" if experts == 1 else f"{experts} experts go"
                logger.info("leaving: %s to others with room; Ctrl-C again leaves at once", what)
            await node.stop()

    async def _start_swarm(self, identity: Identity, stage: Stage) -> Swarm:
        """A node that was in the swarm before is patient: the network may be down yet, or the others."""
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                return await self._starter.start(identity, self._settings, self._host, self._state, stage)
            except UnreachableError as error:
                if not self._starter.comes_back(identity, self._state):
                    raise
                logger.warning("%s. Trying again in %.0f s", error, wait_s)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _hurry(self) -> None:
        if self._node is not None:
            self._node.hurry()

    def _show_invite(self, node: Node, made: Invite) -> None:
        invite = str(made)
        if node.swarm.host.peer_id == node.swarm.keys.author:
            FoundedSwarm(invite=invite, admission=node.swarm.admission.mode).save(self._state)
        if self._invite_file is not None:
            _write(self._invite_file, invite + "\n")
        peer_id = node.swarm.host.peer_id.to_base58()
        if self._terminal.json:
            self._terminal.event("invite", {"peer_id": peer_id, "invite": invite})
        elif self._starter.manifest is not None:
            if self._terminal.live:
                self._terminal.err.rule("others join with")
            self._terminal.line(f"invite: {invite}")
            if node.swarm.admission.mode == "token":
                logger.info(
                    "this invite lets people look only: `talkoot invite` makes those that let them in"
                )
            if self._terminal.live:
                self._terminal.err.rule()
        settings = self._settings
        if self._starter.manifest is not None and (
            narrow := invite_advice(
                made.bootstrap,
                self._host,
                settings.dht_port,
                settings.grpc_port,
                chosen=settings.host is not None,
            )
        ):
            logger.warning("%s", narrow)
        logger.info("peer %s serves on %s; metrics at %s", peer_id, node.address, node.metrics_address)

    async def _show_state(self, node: Node) -> None:
        if self._terminal.json:
            peer_id = node.swarm.host.peer_id.to_base58()
            await _watch(node, _LOOK_EVERY_S, lambda status, pace: self._event(peer_id, status, pace))
        elif self._terminal.live:
            swarm = node.swarm.manifest.name
            with Live(console=self._terminal.err, auto_refresh=False, transient=True) as live:
                await _watch(
                    node,
                    _LOOK_EVERY_S,
                    lambda status, pace: live.update(panel(swarm, status, pace), refresh=True),
                )
        else:
            await _watch(node, _LINE_EVERY_S, lambda status, pace: logger.info(line(status, pace)))

    def _event(self, peer_id: str, status: NodeStatus, pace: Pace) -> None:
        values = asdict(status) | {"state": status.state.value, "peer_id": peer_id, "rows_per_s": pace.rows}
        self._terminal.event("state", values)


async def _watch(node: Node, every_s: float, show: Callable[[NodeStatus, Pace], None]) -> None:
    """Shows the node's status and pace, whenever one of them has changed. For ever."""
    meter = PaceMeter()
    shown: tuple[NodeStatus, Pace] | None = None
    while True:
        status = node.status()
        now = status, meter.note(status, time.monotonic())
        if now != shown:
            show(*now)
        shown = now
        await asyncio.sleep(every_s)


def _be_nice(niceness: int) -> None:
    """Lets other programs go first. Before threads begin: each has a priority of its own, from who starts it."""
    os.nice(max(0, niceness - os.nice(0)))


def _first(error: BaseException) -> BaseException:
    """The error itself, or the first in the group."""
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def announced_address(settings: NodeSettings, host: str) -> str | None:
    """The multiaddress by which others reach this node's DHT; None when it is where it listens."""
    if not (settings.announce_host or settings.announce_dht_port):
        return None
    return multiaddress(settings.announce_host or host, settings.announce_dht_port or settings.dht_port)


def listen_address(settings: NodeSettings) -> str:
    """Where a node listens, which is what it announces. Raises SettingsError."""
    host = settings.host or default_listen_address()
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise SettingsError(
            f"host {host!r} is no IP address: pass this machine's, such as 192.0.2.7"
        ) from None
    if address.is_unspecified:
        raise SettingsError(f"nobody can reach a node at {host}: pass the address that others see as --host")
    return host


def last_port(state: Path, host: str) -> int:
    """0 when there is none, or when it is taken."""
    try:
        port = int((state / _LAST_PORT).read_text())
        require_free_port(host, port)
    except (OSError, ValueError, OverflowError, PortError):
        return 0
    return port


def remember_port(state: Path, port: int) -> None:
    write_atomically(state / _LAST_PORT, f"{port}\n".encode())


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise StartError(f"can't write {path}: {error.strerror}; pass another --invite-file") from error
