"""Tests of the stranger itself: what it sends arrives. Otherwise tests of fixed faults could not fail any more."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from callers import numbered_identities
from real_swarm import Play, Village, playing
from stranger import HostileCaller, Stranger, digest, identities_near, new_identities, packed
from victim import honest_caller

from peer.identity import verify
from peer.kademlia.routing import node_id_of
from peer.loop import LoopThread
from peer.wire import dht_pb2, records_pb2, state_pb2


@pytest.fixture
def play(loop: LoopThread, tmp_path: Path) -> Play:
    return playing(loop, numbered_identities(2), tmp_path)


def test_identities_are_cheap_and_sign() -> None:
    identities = new_identities(66)
    assert len({identity.peer_id for identity in identities}) == 66
    verify(identities[-1].public_key, b"data", identities[-1].sign(b"data"))
    near = identities_near("key", 2, among=150)
    ids = [node_id_of(identity.peer_id.to_bytes()) for identity in near]
    assert all(int(i) ^ int.from_bytes(digest("key"), "big") < 2**157 for i in ids)


def test_it_publishes_stores_answers_serves_and_calls(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=1)
        invite = await node.swarm.invite()
        async with Stranger.joined(invite) as stranger:
            (info,) = await stranger.nodes()
            assert info.peer_id == node.swarm.host.peer_id
            await see_what_it_publishes(stranger, node)
            await store_at_the_node(stranger, node)
            await answer_the_node(stranger, node)
            await serve_the_node(stranger, node)
            await call_the_node(stranger, info, node)

    play(scenario)


async def see_what_it_publishes(stranger: Stranger, node: Any) -> None:
    await stranger.publish_node(lifetime_s=20, name="a stranger", rows_processed=2**63)
    found = await node.swarm.registry.nodes([stranger.peer_id])
    assert found[stranger.peer_id].name == "a stranger"
    await stranger.publish_trainer(name="another")
    assert stranger.peer_id in await node.swarm.registry.trainer_ids()


async def store_at_the_node(stranger: Stranger, node: Any) -> None:
    payload = records_pb2.RecordPayload(
        key=stranger.keys.node(stranger.peer_id), node=stranger.node_record(), expires_at=time.time() + 30
    )
    record = await stranger.publish(payload)
    own = packed(stranger.peer_id.to_bytes())
    request = stranger.store_request(
        [
            (payload.key, own, packed(record), payload.expires_at),  # it has that one
            (b"\0" * 20, own, packed(record), payload.expires_at + 1),
        ]
    )
    answer = await stranger.store_at(node.swarm.host.peer_id, request)
    assert list(answer.store_ok) == [True, False]
    question = dht_pb2.FindRequest(keys=[digest(payload.key)], peer=stranger.dht.info)
    (result,) = (await stranger.find_at(node.swarm.host.peer_id, question)).results
    assert record in result.value


async def answer_the_node(stranger: Stranger, node: Any) -> None:
    asked: list[bytes] = []

    async def lie(request: dht_pb2.FindRequest, context: Any) -> dht_pb2.FindResponse:
        asked.extend(request.keys)
        results = [dht_pb2.FindResult(type=dht_pb2.RESULT_TYPE_NOT_FOUND) for _ in request.keys]
        return dht_pb2.FindResponse(results=results, peer=stranger.dht.info)

    await stranger.answer(find=lie)
    key = node.swarm.keys.node(new_identities(1)[0].peer_id)
    await node.swarm.registry.get([key])
    assert digest(key) in asked


async def serve_the_node(stranger: Stranger, node: Any) -> None:
    async def fetched(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for _ in requests:
            yield state_pb2.FetchReply(chunk=b"garbage").SerializeToString()

    await stranger.serve({"talkoot.v1.StateService/Fetch": fetched})
    await stranger.publish_node()
    info = (await node.swarm.registry.nodes([stranger.peer_id]))[stranger.peer_id]
    assert info.addresses == (stranger.address,)
    caller = HostileCaller(info, stranger.keys.swarm_id)
    await caller.open_session()
    stream = caller.stream("talkoot.v1.StateService/Fetch")
    await stream.write(b"")
    assert b"garbage" in await stream.read()
    await caller.close()


async def call_the_node(stranger: Stranger, info: Any, node: Any) -> None:
    caller = stranger.caller_of(info)
    with pytest.raises(grpc.aio.AioRpcError, match="another server"):
        await caller.open_session(server=b"nobody")
    assert await caller.open_session()
    reader, writer = await caller.tls()
    writer.write(b"no HTTP/2")
    assert await asyncio.wait_for(reader.read(), 60)  # a GOAWAY, and the end
    writer.close()
    uids = list(node.runtime.experts)
    async with honest_caller(info, stranger.keys.swarm_id, node.swarm.manifest, uids) as honest:
        await honest.call_for(0.5, least=4)
    assert honest.share == 1.0, honest.last_error
