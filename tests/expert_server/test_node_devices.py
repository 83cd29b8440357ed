"""A node on several devices, all of which are the CPU here: experts are spread over them and serve, and none is
refused. Other devices stand in for GPUs that fail.
"""

import asyncio
from collections import Counter
from pathlib import Path

import pytest
import torch
from real_swarm import LOCAL, MANIFEST, Play, Village, node_settings, playing

from dht.swarm import found_swarm
from expert_server import node as node_module
from expert_server import resources
from expert_server.experts.devices import ComputeDevice
from expert_server.experts.expert import expert_bytes
from expert_server.node import Node, NodeTiming
from peer.errors import SettingsError, StartError
from peer.host import NetworkConfig
from peer.identity import Identity
from peer.loop import LoopThread


@pytest.fixture
def play(loop: LoopThread, tmp_path: Path) -> Play:
    return playing(loop, [Identity.load_or_create(tmp_path / "identity.key")], tmp_path)


def give_memory(monkeypatch: pytest.MonkeyPatch, experts_in_a_quarter: list[float]) -> list[ComputeDevice]:
    size = expert_bytes(MANIFEST)
    devices = [ComputeDevice(memory_bytes=int(4 * size * room)) for room in experts_in_a_quarter]
    monkeypatch.setattr(node_module, "open_devices", lambda device, precision: devices)
    return devices


def test_a_node_fills_a_quarter_of_each_devices_memory(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = give_memory(monkeypatch, [3.9, 1.1])

    async def scenario(village: Village) -> None:
        node = await village.found()
        hosted = Counter(expert.device for expert in node.runtime.experts.values())
        assert hosted == {large: 3, small: 1}
        for expert in node.runtime.experts.values():
            assert await node.runtime.run(expert.export_state)

    play(scenario)


def test_experts_that_were_asked_for_are_spread_by_memory(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = give_memory(monkeypatch, [200.0, 100.0])

    async def scenario(village: Village) -> None:
        node = await village.found(experts=6)
        hosted = Counter(expert.device for expert in node.runtime.experts.values())
        assert hosted == {large: 4, small: 2}

    play(scenario)


def test_a_node_without_its_device_does_not_start_and_leaves_the_swarm(
    play: Play,
) -> None:
    async def scenario(village: Village) -> None:
        swarm = await found_swarm(village.identities[0], MANIFEST, NetworkConfig(LOCAL))
        with pytest.raises(SettingsError, match="device cuda:99: torch finds"):
            await Node.start(node_settings(device="cuda:99"), swarm, host=LOCAL, state=village.state(swarm))
        with pytest.raises(OSError, match="refused"):
            await asyncio.open_connection(LOCAL, swarm.host.port)

    play(scenario)


def test_a_node_ends_once_a_gpu_has_failed(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(timing=NodeTiming(claim_wait_s=0.1, look_every_s=0.05))
        node._gpus.append(ComputeDevice("meta"))  # has no numbers, so it can't compute any
        async with asyncio.timeout(60):
            with pytest.raises(ExceptionGroup) as caught:
                await node.run()
        (error,) = caught.value.exceptions
        assert isinstance(error, StartError)
        assert "meta does not compute" in str(error)

    play(scenario)


def test_a_paused_node_returns_the_memory_of_its_gpus(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    experts_then: list[int] = []

    async def scenario(village: Village) -> None:
        node = await village.found()
        monkeypatch.setattr(torch.mps, "empty_cache", lambda: experts_then.append(len(node.runtime.experts)))
        node._gpus.append(ComputeDevice("mps"))
        await node.pause()
        assert experts_then == [0]

    play(scenario)


def test_one_thread_computes_on_a_macs_gpu(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "open_devices", lambda device, precision: [ComputeDevice("mps")])
    monkeypatch.setattr(resources, "usable_cores", lambda: 4)

    async def scenario(village: Village) -> None:
        node = await village.found(experts=0, spare=0, threads=4)
        assert node.runtime._threads == 1

    play(scenario)
