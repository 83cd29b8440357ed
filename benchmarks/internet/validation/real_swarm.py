"""The real side of the validation: node processes behind emulated links, and a process of trainers."""

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.internet.validation.drawn_times import KINDS, environment_of, import_path
from benchmarks.internet.validation.measured import Adoption, Measured, Stretch
from benchmarks.internet.validation.scenario import Hosting, Scenario
from benchmarks.internet.validation.steady_trainers import BEGIN, Step
from benchmarks.village import offer_kinds
from dht.invites import Invite
from dht.swarm import join_swarm
from peer.host import NetworkConfig
from peer.identity import Identity
from talkoot.demo.links import Proxy, Wire, free_ports
from talkoot.demo.processes import DemoProcess, DemoProcesses

_HOST = "127.0.0.1"
_FOUNDER = 0
_START_AT_ONCE = 3
_START_LIMIT_S = 120.0
_LOOK_EVERY_S = 0.25
_SETTLES_WITHIN_S = 15.0
_TRAINERS = ("-m", "benchmarks.internet.validation.steady_trainers")
_OF_A_PROCESS = {"threads": 1, "niceness": 0, "device": '"cpu"', "p2pd": '"off"'}


class RealSwarm:
    """All processes of one run. Call `stop` when done."""

    def __init__(self, scenario: Scenario, folder: Path, tell: Callable[[str], None]) -> None:
        self._scenario = scenario
        self._rng = random.Random(scenario.seed)
        self._folder = folder
        self._tell = tell
        self._processes = DemoProcesses(folder, self._hear)
        self._nodes: list[DemoProcess] = []
        self._invites: dict[DemoProcess, Mapping[str, Any]] = {}
        self._experts: dict[DemoProcess, int] = {}
        self._adoptions: dict[DemoProcess, int] = {}
        self._wires: list[Wire] = []
        self._proxies: list[Proxy] = []
        self._steps: list[Step] = []
        self._trainers: DemoProcess | None = None
        self._ready: set[DemoProcess] = set()
        self._silent: set[DemoProcess] = set()

    async def run(self) -> Measured:
        """Raises StartError and UnreachableError."""
        scenario = self._scenario
        await self._start_nodes()
        self._tell("all nodes serve")
        await self._until_hosted()
        self._tell("all experts have their replicas")
        await asyncio.sleep(scenario.at_rest_after_s)
        quiet = await self._stretch(scenario.quiet_s)
        self._tell(f"upkeep is measured, {quiet.processor:.0%} of the processor")
        trainers = await self._start_trainers()
        await asyncio.sleep(_SETTLES_WITHIN_S)
        reading = await self._stretch(scenario.reading_s)
        (trainers / BEGIN).touch()
        await asyncio.sleep(_SETTLES_WITHIN_S)
        training = await self._stretch(scenario.training_s)
        self._tell(f"training is measured, {training.processor:.0%} of the processor")
        adoption = await self._silence(await self._hosting())
        self._tell(f"all experts are served again after {adoption.all_served_s:.1f} s")
        await asyncio.sleep(_SETTLES_WITHIN_S)
        after = await self._stretch(scenario.after_s)
        return Measured(quiet, reading, training, adoption, after)

    async def stop(self) -> None:
        """Ends all processes. It is harmless to call it twice."""
        for child in (self._trainers, *self._nodes):
            if child is not None and child.exit_status is None:
                child.kill()
        await self._processes.stop()
        for proxy in self._proxies:
            await proxy.close()

    def _some_invite(self) -> str:
        """The invite of a random node that serves: the founder alone would have too much to do on a busy machine."""
        invite: str = self._rng.choice(list(self._invites.values()))["invite"]
        return invite

    async def _start_nodes(self) -> None:
        scenario, package = self._scenario, offer_kinds(self._folder / "package", KINDS)
        (self._folder / "swarm.toml").write_text(scenario.manifest_toml)
        speeds = scenario.speeds()
        for number in range(scenario.nodes):
            name = f"node-{number}"
            wire, (port,) = Wire(scenario.emulated_link, seed=number), free_ports(_HOST, 1)
            proxy = await Proxy.start(wire, (_HOST, port), _HOST)
            self._wires.append(wire)
            self._proxies.append(proxy)
            config = self._folder / f"{name}.toml"
            settings = {"announce_port": proxy.port, "experts": scenario.room} | scenario.node_settings
            lines = (f"{name} = {value}\n" for name, value in (settings | _OF_A_PROCESS).items())
            config.write_text("".join(lines))
            origin = ("--new", str(self._folder / "swarm.toml"))
            if number != _FOUNDER:
                origin = ("--join", self._some_invite())
            options = ("node", *origin, "--config", str(config), "--host", _HOST, "--port", str(port))
            self._nodes.append(
                await self._processes.start(
                    name,
                    (*options, "--state", str(self._folder / name), "--log-format", "json"),
                    environment=environment_of(
                        package, speeds[number], scenario.jitter, f"{scenario.seed} {number}"
                    ),
                )
            )
            if number == _FOUNDER or number % _START_AT_ONCE == 0 or number == scenario.nodes - 1:
                await self._processes.until(
                    lambda: len(self._invites) == len(self._nodes), _START_LIMIT_S, "nodes to serve"
                )

    async def _until_hosted(self) -> None:
        """Waits until the nodes have no room left, or nothing more to host."""
        wanted = self._scenario.wanted_replicas
        await self._processes.until(
            lambda: sum(self._experts.values()) >= wanted, _START_LIMIT_S, "experts to be hosted"
        )

    async def _hosting(self) -> Hosting:
        """What is hosted where, as a peer that joins reads it."""
        invite, folder = Invite.parse(self._some_invite()), self._folder / "reader"
        folder.mkdir()
        identity = Identity.load_or_create(folder / "identity.key")
        numbers = {self._invites[node]["peer_id"]: number for number, node in enumerate(self._nodes)}
        reader = await join_swarm(identity, invite, NetworkConfig(_HOST, serves_dht=False), state=folder)
        try:
            replicas = await reader.experts.replicas(reader.manifest.uids())
        finally:
            await reader.stop()
        return Hosting(
            {str(uid): [numbers[r.peer_id.to_base58()] for r in some] for uid, some in replicas.items()}
        )

    async def _start_trainers(self) -> Path:
        """Starts the trainers, and waits until they have joined. Returns their folder."""
        invite = self._some_invite()
        folder = self._folder / "trainers"
        folder.mkdir()
        arguments = (invite, str(folder), json.dumps(self._scenario.values()))
        environment = {"PYTHONPATH": import_path()}
        trainers = self._trainers = await self._processes.start("trainers", arguments, _TRAINERS, environment)
        await self._processes.until(lambda: trainers in self._ready, _START_LIMIT_S, "the trainers to join")
        return folder

    async def _silence(self, hosting: Hosting) -> Adoption:
        """Makes a quarter of the nodes fall silent. Returns when others have adopted all experts that only these
        hosted.
        """
        victims = hosting.victims(self._scenario)
        vacant, lost = hosting.vacant(victims), hosting.replicas(victims)
        self._silent = {self._nodes[number] for number in victims}
        adopted, began = self._adopted, time.monotonic()
        times: list[float] = []
        for number in victims:
            self._wires[number].cut()
            os.kill(self._nodes[number].pid, signal.SIGSTOP)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._scenario.adoption_limit_s):
                while len(times) < vacant:
                    await asyncio.sleep(_LOOK_EVERY_S)
                    times += [time.monotonic() - began] * (self._adopted - adopted - len(times))
        return Adoption(lost, vacant, self._adopted - adopted, times)

    @property
    def _adopted(self) -> int:
        """The number of experts that living nodes have adopted."""
        return sum(count for node, count in self._adoptions.items() if node not in self._silent)

    async def _stretch(self, seconds: float) -> Stretch:
        """Measures the next `seconds` seconds."""
        began, steps, carried, computed = time.monotonic(), len(self._steps), self._carried(), self._cpu_s()
        machine = psutil.cpu_times()
        await asyncio.sleep(seconds)
        lasted = time.monotonic() - began
        after = psutil.cpu_times()
        busy = 1 - (after.idle - machine.idle) / (sum(after) - sum(machine))
        return Stretch(
            seconds=lasted,
            peers=len(self._nodes) - len(self._silent),
            carried_bytes=self._carried() - carried,
            steps=self._steps[steps:],
            processor=(self._cpu_s() - computed) / lasted / (psutil.cpu_count() or 1),
            machine=busy,
        )

    def _carried(self) -> int:
        return sum(wire.there.bytes_carried + wire.back.bytes_carried for wire in self._wires)

    def _cpu_s(self) -> float:
        """CPU seconds of all processes of this run so far."""
        total = 0.0
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def _hear(self, process: DemoProcess, event: Mapping[str, Any]) -> None:
        match event.get("event"):
            case "invite":
                self._invites[process] = event
            case "state":
                self._experts[process] = event["experts"]
                self._adoptions[process] = event["adopted"]
            case "ready":
                self._ready.add(process)
            case "step":
                values = {name: event[name] for name in Step.__dataclass_fields__}
                self._steps.append(Step(**values))
