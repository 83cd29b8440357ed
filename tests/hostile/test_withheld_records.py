"""The only other peer of a young swarm answers, but says that it knows nothing."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from callers import numbered_identities
from real_swarm import Village, eventually, playing
from stranger import Stranger

from expert_server.status import NodeState
from peer.loop import LoopThread
from peer.transport.addresses import Multiaddress
from peer.wire import dht_pb2


def test_a_founder_whose_only_peer_hides_its_records_does_not_rejoin_for_ever(
    loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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

            rejoins, join = 0, swarm.host.join

            async def counting(addresses: Sequence[Multiaddress]) -> list[Multiaddress]:
                nonlocal rejoins
                rejoins += 1
                return await join(addresses)

            monkeypatch.setattr(swarm.host, "join", counting)

            async def goes_on() -> bool:
                return rejoins >= 3 and node.state is NodeState.SERVING

            await eventually(goes_on)
            rejoined = rejoins
            await asyncio.sleep(3)
            assert (rejoins, node.state) == (rejoined, NodeState.SERVING)

    playing(loop, numbered_identities(1), tmp_path)(scenario)
