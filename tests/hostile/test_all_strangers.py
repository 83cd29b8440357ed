"""All kinds of strangers at once, against a real node: it survives, serves others, and logs no fault."""

import asyncio
from pathlib import Path

import pytest
from siege import MISDEEDS, siege
from stranger import Stranger
from victim import founder, honest_caller

from peer.loop import LoopThread


@pytest.mark.parametrize("seconds", [2.0, pytest.param(120.0, marks=pytest.mark.slow)])
def test_a_node_under_siege_lives_and_serves_others(loop: LoopThread, tmp_path: Path, seconds: float) -> None:
    with founder(tmp_path) as node:

        async def scenario() -> None:
            async with Stranger.joined(node.invite, serves_dht=False) as observer:
                info = await observer.node(node.invite.keys.author)
                swarm = observer.swarm
                async with honest_caller(info, swarm.keys.swarm_id, swarm.manifest) as honest:
                    assert await honest.call(), honest.last_error
                    attack = asyncio.create_task(siege(node.invite, seconds, seed=1))
                    while not attack.done():
                        await honest.call_for(0.2)
                    done = await attack
                    assert done.keys() == MISDEEDS.keys(), done
                    assert honest.share >= 0.95, (honest.calls, honest.failed, honest.last_error)

        loop.run(scenario(), seconds + 120)
        assert node.alive
        assert node.status().state == "serving"
        assert node.metric("talkoot_task_restarts_total") == 0
