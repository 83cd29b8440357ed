"""`talkoot doctor` and `talkoot node --check`: find out whether this machine can host experts.

The findings are printed as a table or JSON, and saved in the state folder.
"""

import asyncio
import contextlib
import random
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.table import Table

from dht.invites import Invite
from dht.manifest import Manifest
from dht.swarm import Stage, Swarm, join_swarm
from expert_server.settings import NodeSettings
from peer.errors import ControlError, DaemonError, DataError, StartError, StateFolderError, UserError
from peer.files import StateFolder, write_atomically
from peer.formatting import age_in_words
from peer.host import NetworkConfig
from peer.identity import Identity, PeerID
from peer.loop import new_loop, to_daemon_thread
from peer.platform.p2pd import is_offered, why_unavailable
from peer.transport.dialling import Dialling
from peer.transport.endpoints import AddressScope
from peer.transport.libp2p import Libp2p
from peer.transport.p2pd_setup import Libp2pConfig
from talkoot.doctor.checks import (
    NO_NODE,
    OFFLINE,
    Finding,
    NodeHere,
    Verdict,
    ask_peers,
    check_clock_keeping,
    check_cores,
    check_device,
    check_disk,
    check_memory,
    check_ports,
    check_software,
    check_speed,
    check_state,
    check_traffic,
    judge_clock,
)
from talkoot.node.control import ControlClient, node_folder
from talkoot.node.launch import Origin, listen_address
from talkoot.signals import run_until_stopped
from talkoot.terminal import Terminal

REPORT_FILE = "check.json"
_REPORT_VERSION = 1
_MAX_BYTES = 100_000


class Report(BaseModel):
    """All findings of one check."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    version: int = _REPORT_VERSION
    checked_at: float
    """Unix time in seconds."""
    swarm: str | None
    """The swarm's id; None if no invite was given."""
    findings: tuple[Finding, ...]

    @property
    def can_serve(self) -> bool:
        return not any(finding.verdict is Verdict.PROBLEM for finding in self.findings)

    def save(self, state: Path) -> None:
        """Raises StartError."""
        path = state / REPORT_FILE
        try:
            write_atomically(path, (self.model_dump_json(indent=1) + "\n").encode())
        except OSError as error:
            raise StartError(f"can't write {path}: {error.strerror}; pass another --state") from error

    @classmethod
    def load(cls, state: Path) -> "Report":
        """Raises DataError if there is no report that this version can read."""
        path = state / REPORT_FILE
        again = "run `talkoot doctor` without --cached"
        try:
            with path.open("rb") as file:
                report = cls.model_validate_json(file.read(_MAX_BYTES))
        except FileNotFoundError:
            raise DataError(f"no check was made yet with {state}: {again}") from None
        except (OSError, ValidationError) as error:
            raise DataError(f"can't read {path}: {again}") from error
        if report.version != _REPORT_VERSION:
            raise DataError(f"{path} was written by another version: {again}")
        return report

    def to_dict(self, now: float) -> dict[str, Any]:
        """The values as printed by `talkoot doctor --json`. Ages are in seconds."""
        return {
            "can_serve": self.can_serve,
            "checked_at": self.checked_at,
            "age_s": now - self.checked_at,
            "swarm": self.swarm,
            "checks": [finding.model_dump(mode="json") for finding in self.findings],
        }


def run_check(terminal: Terminal, origin: Origin, settings: NodeSettings, *, cached: bool) -> bool:
    """Checks this machine, prints the findings and saves them. Returns whether a node can serve.

    `cached`: prints the last findings instead. Raises UserError if nothing can be checked.
    """
    folder = node_folder(settings.state)
    if cached:
        report = Report.load(folder)
    else:
        source = origin.read() if origin.join or origin.new else Manifest.founded({"name": "demo"})
        report = _check(terminal, source, settings, folder)
    show(terminal, report, cached=cached)
    return report.can_serve


def show(terminal: Terminal, report: Report, *, cached: bool) -> None:
    """Prints the findings, and their age if they are from an earlier check."""
    now = time.time()
    if terminal.json:
        terminal.event("check", report.to_dict(now))
        return
    if cached:
        terminal.line(f"checked {age_in_words(now - report.checked_at)} ago")
    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in report.findings:
        table.add_row(finding.verdict.value, finding.name, finding.says)
        if finding.fix and finding.verdict is not Verdict.OK:
            table.add_row("", "", f"→ {finding.fix}")
    terminal.out.print(table)
    if report.can_serve and any(OFFLINE in finding.values for finding in report.findings):
        terminal.line("this machine can host experts for others as soon as it has a network")
    elif report.can_serve:
        terminal.line("this machine can host experts")
    else:
        terminal.line("this machine can't host experts: fix the problems above first")


def _check(terminal: Terminal, source: Manifest | Invite, settings: NodeSettings, path: Path) -> Report:
    swarm = () if isinstance(source, Manifest) else source.bootstrap
    check = Check(source, settings, listen_address(settings, swarm), path)
    with (
        terminal.stages("making ready") as stage,
        asyncio.Runner(loop_factory=new_loop) as runner,
    ):
        return runner.run(run_until_stopped(check.run(stage)))


class Check:
    """One check of this machine."""

    def __init__(self, source: Manifest | Invite, settings: NodeSettings, host: str, state: Path) -> None:
        self._source = source
        self._settings = settings
        self._host = host
        self._state = state
        self._findings: list[Finding] = []
        self._here = NO_NODE
        self._own: PeerID | None = None
        """The node with this state folder."""

    async def run(self, stage: Stage) -> Report:
        """Saves the report in the state folder, if that is usable. A node may run with it meanwhile."""
        is_usable = self._look_at_state()
        # another identity than the node's: two peers with one would hide each other from the swarm
        with tempfile.TemporaryDirectory(prefix="talkoot-") as elsewhere:
            report = await self._check(Identity.load_or_create(Path(elsewhere) / "identity.key"), stage)
        if is_usable:
            report.save(self._state)
        return report

    def _look_at_state(self) -> bool:
        """Whether the report can be saved in the state folder."""
        found: StartError | None = None
        try:
            StateFolder(self._state).close()
        except StartError as error:
            found = error
        if isinstance(found, StateFolderError) and found.is_in_use:
            with contextlib.suppress(ControlError), ControlClient(self._state) as running:
                self._here = NodeHere.of_process(running.pid)
        is_usable = found is None or self._here.runs
        if is_usable and (key := self._state / "identity.key").exists():
            try:
                self._own = Identity.load_or_create(key).peer_id
            except StartError as error:
                found = error
        self._findings.append(check_state(self._state, found, self._here))
        return is_usable

    async def _check(self, identity: Identity, stage: Stage) -> Report:
        self._findings += [
            check_software(),
            await to_daemon_thread(check_device, self._settings),
            check_ports(self._settings, self._host, self._here),
        ]
        await self._check_p2pd(identity, stage)
        manifest, swarm_id = Manifest.founded({"name": "demo"}), None
        if isinstance(self._source, Manifest):
            manifest = self._source
            why = "pass --join INVITE to check against a swarm"
            self._skip(why, "swarm", "bandwidth", "reachability")
            self._findings.append(check_clock_keeping())
        else:
            swarm_id = self._source.keys.swarm_id
            manifest = await self._join_swarm(identity, self._source, stage) or manifest
        await self._check_machine(manifest, stage)
        return Report(checked_at=time.time(), swarm=swarm_id, findings=tuple(self._findings))

    async def _check_p2pd(self, identity: Identity, stage: Stage) -> None:
        """A node works without p2pd, so no finding about it is a problem."""
        if self._settings.p2pd == "off":
            self._skip("switched off: peers behind routers are reached through relays only", "p2pd")
            return
        if not is_offered() and (why := why_unavailable()):
            self._skip(why, "p2pd")
            return
        stage("starting p2pd, the libp2p daemon")
        began = time.monotonic()
        port = self._settings.p2pd_port
        config = Libp2pConfig(self._host, 0 if port in self._here.ports else port)
        libp2p = Libp2p(identity, config, Dialling(AddressScope.LOOPBACK))
        try:
            await libp2p.start()
        except DaemonError as error:
            says = "it does not start; peers behind routers are reached through relays only"
            self._note("p2pd", Verdict.WEAK, says, fix=f"{error}; or pass --p2pd off")
        else:
            seconds = time.monotonic() - began
            self._note("p2pd", Verdict.OK, f"starts, in {seconds:.1f} s", start_s=seconds)
        finally:
            await libp2p.stop()

    async def _join_swarm(self, identity: Identity, invite: Invite, stage: Stage) -> Manifest | None:
        began = time.monotonic()
        try:
            # stores no DHT records, since it leaves again at once
            config = NetworkConfig(self._host, serves_dht=False)
            swarm = await join_swarm(identity, invite, config, stage=stage)
        except UserError as error:
            self._note("swarm", Verdict.PROBLEM, "it can't be joined", fix=str(error))
            why = "the swarm can't be joined"
            self._findings.append(judge_clock([], why))
            self._skip(why, "bandwidth", "reachability")
            return None
        try:
            self._note_joined(swarm, time.monotonic() - began)
            await self._ask(swarm, stage)
            return swarm.manifest
        finally:
            await swarm.stop()

    def _note_joined(self, swarm: Swarm, seconds: float) -> None:
        says = f"joined {swarm.manifest.name} in {seconds:.1f} s"
        if warning := swarm.manifest_record.warning:
            fix = "ask the swarm's founder to run a node with their key"
            self._note("swarm", Verdict.WEAK, f"{says}; {warning}", fix, join_s=seconds)
        else:
            self._note("swarm", Verdict.OK, says, join_s=seconds)

    async def _ask(self, swarm: Swarm, stage: Stage) -> None:
        stage("asking other nodes: clock, bandwidth, reachability")
        try:
            rng = random.Random()  # noqa: S311  # chooses whom to ask
            settings = self._settings
            self._findings += await ask_peers(
                swarm,
                self._host,
                settings.port,
                rng,
                upnp=settings.asks_router,
                own=self._own,
                here=self._here,
            )
        except StartError as error:
            self._note("reachability", Verdict.PROBLEM, "nobody can listen there", fix=str(error))
            self._skip("nobody was asked", "clock", "bandwidth")
        except UserError as error:
            self._skip(str(error), "clock", "bandwidth", "reachability")

    async def _check_machine(self, manifest: Manifest, stage: Stage) -> None:
        line = next((found for found in self._findings if found.name == "bandwidth"), None)
        self._findings.append(check_traffic(manifest, line))
        stage("training one expert for a moment")
        try:
            self._findings.append(await to_daemon_thread(check_speed, self._settings, manifest, self._here))
            memory = check_memory(self._settings, manifest, self._here)
        except UserError as error:
            self._note("experts", Verdict.PROBLEM, "they can't be built here", fix=str(error))
            return
        self._findings += [memory, check_cores(self._here)]
        stage("writing to the state folder")
        experts = int(memory.values.get("experts", 1))
        disk = await to_daemon_thread(check_disk, self._state, self._settings, manifest, experts)
        self._findings.append(disk)

    def _note(self, name: str, verdict: Verdict, says: str, fix: str = "", **values: float) -> None:
        self._findings.append(Finding(name=name, verdict=verdict, says=says, fix=fix, values=values))

    def _skip(self, why: str, *names: str) -> None:
        for name in names:
            self._note(name, Verdict.SKIPPED, why)
