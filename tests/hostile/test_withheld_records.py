"""The only other peer of a young swarm answers, but says that it knows nothing."""

import asyncio
from pathlib import Path
from typing import Any

from callers import numbered_identities
from real_swarm import Village, eventually, playing
from stranger import Stranger

from expert_server.status import NodeState
from peer.loop import LoopThread
from peer.wire import dht_pb2


def test_a_founder_whose_only_peer_hides_its_records_does_not_rejoin_for_ever(
    loop: LoopThread, tmp_path: Path
) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=8, announce_every_s=1)
        swarm = node.swarm
        async with Stranger.joined(await swarm.invite()) as stranger:
            await stranger.publish_node()
            await village.run(node)

            async def is_remembered() -> bool:
                return bool(swarm.peer_store.addresses())

            await eventually(is_remembered)

            async def find(request: Any, context: Any) -> dht_pb2.FindResponse:
                nothing = [dht_pb2.FindResult(type=dht_pb2.RESULT_TYPE_NOT_FOUND) for _ in request.keys]
                return dht_pb2.FindResponse(peer=stranger.dht.info, results=nothing)

            await stranger.answer(find=find)

            async def goes_on() -> bool:
                return swarm.membership.rejoined >= 3 and node.state is NodeState.SERVING

            await eventually(goes_on)
            rejoined = swarm.membership.rejoined
            await asyncio.sleep(3)
            assert (swarm.membership.rejoined, node.state) == (rejoined, NodeState.SERVING)

    playing(loop, numbered_identities(1), tmp_path)(scenario)
