"""`talkoot node`: starts a node in the foreground, shows what it does, and stops it."""

import asyncio
import errno
import logging
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path

from rich.live import Live

from dht.admission import Denylist, Role
from dht.invites import Invite, read_bootstrap
from dht.manifest import Manifest, set_keys
from dht.records import SwarmKeys
from dht.swarm import Stage, Swarm, found_swarm, join_swarm, other_swarms, was_member
from expert_server.blocks import read_manifest
from expert_server.experts.devices import check_devices
from expert_server.node import Node
from expert_server.resources import within_memory
from expert_server.settings import NodeSettings
from expert_server.status import NodeStatus
from peer.errors import AddressError, PortError, SettingsError, StartError, UnreachableError, UserError
from peer.files import StateFolder, write_atomically
from peer.host import NetworkConfig
from peer.identity import Identity
from peer.kademlia.storage import StoreBounds
from peer.loop import keep_running, new_loop
from peer.platform.processes import keep_freed_memory, lower_priority
from peer.settings import DENYLIST, read_toml
from peer.transport.addresses import Multiaddress, default_listen_address, require_free_port
from peer.transport.endpoints import Endpoint, ip_address
from talkoot.node.control import LOG_FILE, ControlServer, node_folder, state_option
from talkoot.node.invites import FoundedSwarm, invite_advice, require_no_other_swarm
from talkoot.node.remote import given_up
from talkoot.node.view import NodeRates, RateMeter, line, live_panel, summary
from talkoot.node.week import WeeklySummary
from talkoot.signals import Stopped, run_until_stopped
from talkoot.terminal import Terminal, log_file

logger: logging.Logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_FIRST_LINE_PAUSE_S, _LONGEST_LINE_PAUSE_S = 10.0, 600.0
"""Pauses between lines of the log that tell the node's state. They grow, so that the log still has what happened weeks
ago.
"""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 2.0, 60.0
"""Pauses between attempts to rejoin a swarm if none of its peers answers."""
_LAST_PORT = "port"
"""The file with the node's last port. A node that keeps its port can be found by old invites and by peers that remember
it.
"""


@dataclass(frozen=True)
class Origin:
    """The swarm that a node founds with a manifest or joins with an invite, as given on the command line."""

    new: Path | None
    join: str | None
    bootstrap: tuple[str, ...]

    def read(self) -> Manifest | Invite:
        """The new swarm's manifest, or the invite to join with. Raises UserError if it is not valid."""
        if (self.new is None) == (self.join is None):
            raise SettingsError(
                "pass either --new swarm.toml to start a swarm, or --join INVITE to join one"
                + ("; not both" if self.new else "")
            )
        addresses = self.addresses()
        if self.new is not None:
            return read_manifest(self.new)
        return Invite.read(self.join or "").through(addresses)

    def given(self) -> frozenset[str]:
        """The keys that the new swarm's file sets; none if an invite is given. Raises SettingsError."""
        return frozenset(() if self.new is None else set_keys(read_toml(self.new)))

    def addresses(self) -> tuple[Multiaddress, ...]:
        """The addresses in `bootstrap`. Raises SettingsError and InviteError."""
        return read_bootstrap(self.bootstrap)


def run_node(terminal: Terminal, origin: Origin, settings: NodeSettings, invite_file: Path | None) -> None:
    """Runs until a signal arrives. Raises UserError if it can't start, and Stopped if it is stopped before it
    serves.
    """
    keep_freed_memory()
    check_devices(settings.device, settings.precision)  # fails before other peers are contacted
    source = origin.read()
    if invite_file is not None:
        _check_folder(invite_file)
    if isinstance(source, Manifest):
        within_memory(settings, source)  # fails before it is published
        require_no_other_swarm(node_folder(settings.state), source.name)
    host = listen_address(settings, () if isinstance(source, Manifest) else source.bootstrap)
    lower_priority(settings.niceness)
    folder = StateFolder(node_folder(settings.state))
    try:
        with log_file(folder.path / LOG_FILE):
            run = _NodeRun(terminal, source, origin, settings, host, folder.path, invite_file)
            with asyncio.Runner(loop_factory=new_loop) as runner:
                runner.run(run.run())
    finally:
        folder.close()


class _NodeRun:
    """One run of a node."""

    def __init__(
        self,
        terminal: Terminal,
        source: Manifest | Invite,
        origin: Origin,
        settings: NodeSettings,
        host: str,
        state: Path,
        invite_file: Path | None,
    ) -> None:
        """`source`: what was read from `origin`."""
        self._terminal = terminal
        self._source = source
        self._bootstrap, self._given = origin.addresses(), origin.given()
        self._settings = settings
        self._host = host
        self._state = state
        self._invite_file = invite_file
        self._served = False
        self._control = ControlServer(state)
        self._node: Node | None = None

    async def run(self) -> None:
        """Serves until a signal arrives. Stopping after it has served is not an error."""
        try:
            await run_until_stopped(self._serve_with_control(), self._hurry)
        except Stopped:
            if not self._served:
                raise
            logger.info("left the swarm")
        except ExceptionGroup as group:
            user_errors = group.subgroup(UserError)
            if user_errors is None:
                raise
            raise _first(user_errors) from group

    async def _serve_with_control(self) -> None:
        async with self._control:
            await self._serve()

    async def _serve(self) -> None:
        with self._terminal.stages("making ready") as stage:
            identity = Identity.load_or_create(self._state / "identity.key")
            swarm = await self._start_swarm(identity, stage)
            # from here on the node owns the swarm and stops it
            node = await Node.start(self._settings, swarm, host=self._host, state=self._state, stage=stage)
        try:
            remember_port(self._state, swarm.host.port)
            self._control.attach(node, swarm.invite)
            self._served = True
            self._node = node
            invite = await swarm.invite()
            if others := other_swarms(self._state, swarm.keys):
                logger.info(
                    "this state folder was used in %s before: all totals here are of this swarm alone",
                    ", ".join(others),
                )
            self._show_invite(node, invite)
            async with asyncio.TaskGroup() as group:
                group.create_task(node.run())
                group.create_task(self._show_wider_invite(node, invite))
                show = partial(self._show_state, node)
                group.create_task(keep_running("show the node's state", show, node.restarts))
                week = WeeklySummary(self._state / "weeks" / f"{swarm.keys.swarm_id}.json")
                tell = partial(week.keep_telling, node.status)
                group.create_task(keep_running("tell what the week brought", tell, node.restarts))
        finally:
            status = node.status()
            if status.experts and not node.is_token_over and self._terminal.live:
                # not logged, because the log is also shown where `talkoot stop` runs
                self._terminal.err.print("Ctrl-C again leaves at once")
            await node.stop()
            if status.experts and (offline := node.hosting.offline) is not None:
                logger.info("%s", given_up(status.experts, offline, "starts again"))
            logger.info("%s", summary(status))

    async def _start_swarm(self, identity: Identity, stage: Stage) -> Swarm:
        """Keeps trying if the node was in the swarm before: the network or the other peers may still be down."""
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                return await self._found_or_join(identity, stage)
            except UnreachableError as error:
                if not was_member(self._state, self._keys(identity)):
                    raise
                logger.warning("%s. Trying again in %.0f s", error, wait_s)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    async def _found_or_join(self, identity: Identity, stage: Stage) -> Swarm:
        settings, host, state = self._settings, self._host, self._state
        config = replace(
            network_config(settings, host),
            port=settings.port or last_port(state, host),
            relay_mbit=settings.relay_mbit,
            store=StoreBounds(settings.max_dht_bytes),
        )
        denylist = Denylist(settings.denylist or state / DENYLIST, settings.deny)
        if isinstance(self._source, Manifest):
            return await found_swarm(
                identity,
                self._source,
                config,
                given=self._given,
                bootstrap=self._bootstrap,
                state=state,
                denylist=denylist,
                stage=stage,
            )
        return await join_swarm(
            identity,
            self._source,
            config,
            state=state,
            roles=(Role.NODE,),
            denylist=denylist,
            stage=stage,
        )

    def _keys(self, identity: Identity) -> SwarmKeys:
        if isinstance(self._source, Manifest):
            return SwarmKeys(self._source.name, identity.peer_id)
        return self._source.keys

    def _hurry(self) -> None:
        if self._node is not None:
            self._node.hurry()

    def _show_invite(self, node: Node, made: Invite) -> None:
        invite = str(made)
        if node.swarm.host.peer_id == node.swarm.keys.author:
            try:
                FoundedSwarm(invite=invite, admission=node.swarm.admission.mode).save(self._state)
            except StartError as error:  # it is only for `talkoot invite`, so the node serves without it
                logger.warning("%s", error)
        if self._invite_file is not None:
            _write(self._invite_file, invite + "\n")
        peer_id, by_token = node.swarm.host.peer_id.to_base58(), node.swarm.admission.mode == "token"
        if self._terminal.json:
            self._terminal.event("invite", {"peer_id": peer_id, "invite": invite})
        elif isinstance(self._source, Manifest):
            if self._terminal.live:
                self._terminal.err.rule("others look with" if by_token else "others join with")
            self._terminal.line(f"invite: {invite}")
            if by_token:
                logger.info(
                    "this invite only lets people look: `talkoot invite%s` makes invites that let them take part",
                    state_option(self._state),
                )
            if self._terminal.live:
                self._terminal.err.rule()
        if narrow := self._invite_advice(made):
            logger.warning("%s", narrow)
        logger.info("peer %s serves on %s; metrics at %s", peer_id, node.address, node.metrics_address)
        if made.bootstrap and made.bootstrap[0].peer_id == node.swarm.host.peer_id:
            logger.info("others can join through this node with --bootstrap %s", made.bootstrap[0])

    async def _show_wider_invite(self, node: Node, shown: Invite) -> None:
        """Shows a new invite once the router forwards the port of a founder at home, so that people elsewhere
        can join.
        """
        if not self._invite_advice(shown):
            return
        while self._invite_advice(shown):
            await asyncio.sleep(_LOOK_EVERY_S)
            shown = await node.swarm.invite()
        self._show_invite(node, shown)

    def _invite_advice(self, made: Invite) -> str:
        """Why nobody outside this network can join with a founder's invite, and what to do; empty if others can."""
        settings = self._settings
        if not isinstance(self._source, Manifest):
            return ""
        return invite_advice(made.bootstrap, self._host, settings.port, chosen=settings.host is not None)

    async def _show_state(self, node: Node) -> None:
        if self._terminal.json:
            peer_id = node.swarm.host.peer_id.to_base58()
            await _watch(
                node, repeat(_LOOK_EVERY_S), lambda status, rates: self._event(peer_id, status, rates)
            )
        elif self._terminal.live:
            swarm = node.swarm.manifest.name
            with Live(console=self._terminal.err, auto_refresh=False, transient=True) as live:
                await _watch(
                    node,
                    repeat(_LOOK_EVERY_S),
                    lambda status, rates: live.update(live_panel(swarm, status, rates), refresh=True),
                )
        else:
            await _watch(node, line_pauses(), lambda status, rates: logger.info(line(status, rates)))

    def _event(self, peer_id: str, status: NodeStatus, rates: NodeRates) -> None:
        values = asdict(status) | {"state": status.state.value, "peer_id": peer_id, "rows_per_s": rates.rows}
        self._terminal.event("state", values)


def line_pauses() -> Iterator[float]:
    pause_s = _FIRST_LINE_PAUSE_S
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, _LONGEST_LINE_PAUSE_S)


async def _watch(node: Node, pauses: Iterable[float], show: Callable[[NodeStatus, NodeRates], None]) -> None:
    """Shows the node's status and rates whenever they have changed, with these pauses. A new state ends a pause
    early.
    """
    meter = RateMeter()
    shown: tuple[NodeStatus, NodeRates] | None = None
    for pause_s in pauses:
        status = node.status()
        now = status, meter.note(status, time.monotonic())
        if now != shown:
            show(*now)
        shown = now
        while pause_s > 0 and node.state is status.state:
            await asyncio.sleep(min(pause_s, _FIRST_LINE_PAUSE_S))
            pause_s -= _FIRST_LINE_PAUSE_S


def _first(error: BaseException) -> BaseException:
    """The error itself, or the first in the group."""
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def network_config(settings: NodeSettings, host: str) -> NetworkConfig:
    """Where a peer with these settings listens, and how others reach it. It does not relay."""
    announce = None
    if settings.announce_host or settings.announce_port:
        announce = Endpoint.of(settings.announce_host or host, settings.announce_port or settings.port)
    return NetworkConfig(
        host,
        settings.port,
        announce,
        most_calls=settings.max_calls,
        p2pd=settings.p2pd == "auto",
        p2pd_port=settings.p2pd_port,
        maps_port=settings.asks_router and not host.startswith("127."),
        upload_mbit=settings.upload_mbit,
    )


def listen_address(settings: NodeSettings, swarm: Collection[Multiaddress]) -> str:
    """The IP address that a node listens on and announces. `swarm`: known addresses of the swarm that it joins. Raises
    SettingsError.
    """
    host = settings.host or default_listen_address(swarm)
    try:
        address = ip_address(host)
        Endpoint.of(host, 1)
    except (ValueError, AddressError):
        raise SettingsError(
            f"host {host!r} is not an IP address: pass this machine's address, such as 192.0.2.7"
        ) from None
    if address.is_unspecified:
        raise SettingsError(f"nobody can reach a node at {host}: pass the address that others see as --host")
    return host


def last_port(state: Path, host: str) -> int:
    """The port of the last run; 0 if there is none, or if another program uses it."""
    try:
        port = int((state / _LAST_PORT).read_text())
        require_free_port(host, port)
    except (OSError, ValueError, OverflowError, PortError):
        return 0
    return port


def remember_port(state: Path, port: int) -> None:
    """A full disk only causes a warning."""
    try:
        write_atomically(state / _LAST_PORT, f"{port}\n".encode())
    except OSError as error:
        logger.warning("can't write %s: %s", state / _LAST_PORT, error.strerror)


def _check_folder(path: Path) -> None:
    """Checks whether the invite file can be written, before a swarm is founded. Raises StartError."""
    with _writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tempfile.TemporaryFile(dir=path.parent).close()


def _write(path: Path, text: str) -> None:
    """Raises StartError."""
    with _writing(path):
        write_atomically(path, text.encode())


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raises StartError, but only warns if the disk is full: a node that restarts can serve anyway."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            logger.warning("can't write %s: %s", path, error.strerror)
            return
        raise StartError(f"can't write {path}: {error.strerror}; pass another --invite-file") from error
