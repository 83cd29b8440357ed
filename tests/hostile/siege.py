"""Strangers of several kinds that attack a swarm for a while, in a process of their own: `benchmarks.chaos --strangers`

    python tests/hostile/siege.py INVITE SECONDS [SEED]

They join by the real protocol, and each repeats one misdeed, at a pace that one machine's swarm should bear.
It talks only to the swarm of the invite. It prints `joined` when it begins, and at the end what it did, as JSON.
"""

import asyncio
import contextlib
import functools
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import mutations
from google.protobuf.message import DecodeError
from stranger import HostileCaller, Stranger, digest, new_identity, packed

from dht.announcements import NodeInfo, ReplicaAnnouncement, ReplicaState
from dht.invites import Invite
from peer import PROTOCOL_VERSION
from peer.errors import TalkootError
from peer.kademlia.validation import Entries, Entry, pack_entries
from peer.wire import dht_pb2, expert_pb2, state_pb2

_EXPECTED = (
    TalkootError,
    grpc.aio.AioRpcError,
    grpc.aio.BaseError,
    asyncio.InvalidStateError,
    TimeoutError,
    DecodeError,
)
"""Exceptions with which refused misdeeds end."""
_PAUSE_S = 0.2

Misdeed = Callable[[Stranger, random.Random], Awaitable[None]]


async def siege(
    invite: Invite, seconds: float, seed: int, joined: Callable[[], None] = lambda: None
) -> dict[str, int]:
    """Attacks for `seconds` from when the strangers have joined. Returns how often each misdeed was done."""
    done: Counter[str] = Counter()
    async with (
        Stranger.joined(invite) as peer,
        Stranger.joined(invite, serves_dht=False) as client,
        asyncio.TaskGroup() as group,
    ):
        joined()
        for name, misdeed in MISDEEDS.items():
            stranger = peer if misdeed in _BY_PEERS else client
            rng = random.Random(f"{name} {seed}")
            group.create_task(_repeat(name, misdeed, stranger, seconds, rng, done))
    return dict(done)


async def _repeat(
    name: str, misdeed: Misdeed, stranger: Stranger, seconds: float, rng: random.Random, done: Counter[str]
) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                done[name] += 1
                with contextlib.suppress(*_EXPECTED):
                    await misdeed(stranger, rng)
                await asyncio.sleep(_PAUSE_S)


async def publish_spoilt_records(stranger: Stranger, rng: random.Random) -> None:
    """Publishes corrupted records of every kind, listed like valid ones."""
    if rng.random() < 0.5:
        node = stranger.node_record(tunnel_addresses=["/onion/x:80"])
        node.ParseFromString(mutations.protobuf(node.SerializeToString(), rng))
        await stranger.swarm.registry.publish_node(node, 30.0)
    else:
        fields = {
            "name": rng.choice(("\x1b[2J", "x" * 9000, "")),
            "loss": rng.choice((float("nan"), -1.0, 1e300)),
        }
        await stranger.publish_trainer(30.0, **fields)


async def claim_all_experts(stranger: Stranger, rng: random.Random) -> None:
    """Announces that it serves every expert, with more updates than any peer has, and gives garbage as their states."""
    if not stranger.address:
        await stranger.serve(
            {"talkoot.v1.StateService/Fetch": _garbage, "talkoot.v1.ExpertService/Forward": _garbage}
        )
    await stranger.publish_node(30.0, expert_capacity=99)
    replicas = [
        ReplicaAnnouncement(uid, ReplicaState.SERVING, update_count=rng.randrange(10**6))
        for uid in stranger.swarm.manifest.uids()
    ]
    await stranger.swarm.experts.announce(replicas, 30.0)
    await asyncio.sleep(2.0)


async def _garbage(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    async for _ in requests:
        break
    yield os.urandom(1000)


async def flood_the_dht(stranger: Stranger, rng: random.Random) -> None:
    """Stores large dictionaries of tiny entries, and asks for many keys."""
    peers = list(stranger.swarm.host.peers())
    if not peers:
        return
    peer, until = rng.choice(peers), time.time() + 60
    entries: Entries = {rng.randrange(4096): Entry(packed("x"), until) for _ in range(2000)}
    key = stranger.keys.prefix(0)
    request = stranger.store_request([(key, b"", pack_entries(entries), until)])
    await stranger.store_at(peer, request)
    keys = [digest(stranger.keys.prefix(layer)) for layer in range(32)]
    await stranger.find_at(peer, dht_pb2.FindRequest(keys=keys, peer=stranger.dht.info))


async def hold_calls(stranger: Stranger, rng: random.Random) -> None:
    """Makes calls that send a header, or nothing, and then stay silent."""
    async with _caller(stranger, rng) as caller:
        await caller.open_session()
        streams = [caller.stream("talkoot.v1.ExpertService/Forward", timeout_s=5.0) for _ in range(20)]
        header = expert_pb2.CallHeader(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=stranger.keys.swarm_id,
            request_id=rng.randbytes(16),
            width=stranger.swarm.manifest.width,
            codec=expert_pb2.CODEC_FP32,
            segment_lengths=[64],
            positions=range(64),
            experts=[expert_pb2.ExpertRows(uid="0.0.0")],
        )
        for stream in streams[::2]:
            with contextlib.suppress(*_EXPECTED):
                await stream.write(expert_pb2.CallRequest(header=header).SerializeToString())
        await asyncio.sleep(3.0)
        for stream in streams:
            stream.cancel()


async def begin_and_break_off(stranger: Stranger, rng: random.Random) -> None:
    """Fetches states and breaks off after the first message, and asks others to fetch from it."""
    async with _caller(stranger, rng) as caller:
        await caller.open_session()
        uid = str(rng.choice(stranger.swarm.manifest.uids()))
        about: dict[str, Any] = {"protocol_version": PROTOCOL_VERSION, "swarm_id": stranger.keys.swarm_id}
        stream = caller.stream("talkoot.v1.StateService/Fetch", timeout_s=5.0)
        await stream.write(state_pb2.FetchRequest(uid=uid, **about).SerializeToString())
        await stream.read()
        stream.cancel()
        ask = state_pb2.AskRequest(reason=state_pb2.ASK_REASON_ADOPT, uids=[uid], **about)
        await caller.unary("talkoot.v1.StateService/Ask", ask.SerializeToString())


async def open_sessions(stranger: Stranger, rng: random.Random) -> None:
    """Opens sessions of peers that nobody has met."""
    async with _caller(stranger, rng) as caller:
        for _ in range(10):
            await caller.open_session(new_identity())


async def open_connections(stranger: Stranger, rng: random.Random) -> None:
    """Opens connections that send nothing, and some that do not speak TLS."""
    async with _caller(stranger, rng) as caller, contextlib.AsyncExitStack() as stack:
        for _ in range(50):
            _, writer = await caller.tcp()
            stack.callback(writer.close)
            if rng.random() < 0.3:
                writer.write(rng.randbytes(99))
        await asyncio.sleep(2.0)


@contextlib.asynccontextmanager
async def _caller(stranger: Stranger, rng: random.Random) -> AsyncIterator[HostileCaller]:
    """A caller of a random node. Strangers' spoilt records may have lost their names or addresses."""
    found = await stranger.nodes()
    nodes: list[NodeInfo] = [node for node in found if node.name != "stranger" and node.addresses]
    if not nodes:
        raise TalkootError("nobody is there")
    caller = HostileCaller(rng.choice(nodes), stranger.keys.swarm_id)
    try:
        yield caller
    finally:
        await caller.close()


MISDEEDS: dict[str, Misdeed] = {
    "publish spoilt records": publish_spoilt_records,
    "claim all experts": claim_all_experts,
    "flood the DHT": flood_the_dht,
    "hold calls": hold_calls,
    "begin and break off": begin_and_break_off,
    "open sessions": open_sessions,
    "open connections": open_connections,
}
_BY_PEERS = (publish_spoilt_records, claim_all_experts, flood_the_dht)
"""Misdeeds done by a peer. The others are done by a client, which others cannot call."""

if __name__ == "__main__":
    line, length, seed_text = [*sys.argv[1:], "0"][:3]
    begun = functools.partial(print, "joined", flush=True)
    print(json.dumps(asyncio.run(siege(Invite.parse(line), float(length), int(seed_text), begun))))
