"""Unexpected exceptions where strangers' data is read: each costs only its own step, and nothing ends."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from callers import numbered_identities
from checkpoint_samples import step
from real_swarm import Play, Village, eventually, playing
from stranger import Stranger

from expert_server.status import NodeState
from peer.loop import LoopThread
from peer.metrics import total


@pytest.fixture
def play(loop: LoopThread, tmp_path: Path) -> Play:
    return playing(loop, numbered_identities(2), tmp_path)


def breaking(*arguments: Any, **named: Any) -> Any:
    raise TypeError("what no parser should raise")


def test_a_node_starts_serves_and_leaves_whatever_a_strangers_bytes_raise(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its looks at the swarm, its averaging and its handover all fail, but it still announces, serves and saves."""

    async def scenario(village: Village) -> None:
        founder = await village.found(experts=4, announce_every_s=0.5)
        invite = await founder.swarm.invite()
        async with Stranger.joined(invite) as stranger:
            await stranger.publish_node(expert_capacity=9)
            monkeypatch.setattr("expert_server.hosting.placement.HostingSurvey.read", breaking)
            node = await village.join(
                1, invite, experts=2, announce_every_s=0.5, average_every_s=0.1, drain_timeout_s=5
            )
            monkeypatch.setattr(node.averaging, "average_some", breaking)
            monkeypatch.setattr(node.replicas.states, "ask", breaking)
            running = await village.run(node)

            async def went_on() -> bool:
                return total(node.restarts.count) >= 6 and node.state is NodeState.SERVING

            await eventually(went_on)
            assert not running.done()
            assert node.swarm.host.peer_id in await founder.swarm.registry.nodes([node.swarm.host.peer_id])
            assert "look" in node.status().unsteady
            monkeypatch.setattr("expert_server.hosting.manager.Handover.run", breaking)
            for expert in founder.runtime.experts.values():
                step(expert)
            held = set(founder.runtime.experts)
            assert held
            await founder.stop()
            assert set(await founder.replicas.checkpoints.newest()) >= held, (
                "its experts were saved all the same"
            )
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    play(scenario)
