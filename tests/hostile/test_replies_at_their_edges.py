"""Every message that a server answers with, with each of its fields at an edge, given to the real caller over a real
connection: the caller returns something bounded, or raises the error that the code around it handles.
"""

import asyncio
import contextlib
import functools
import hashlib
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias
from unittest.mock import patch

import grpc
import mutations
import numpy as np
import pytest
from callers import a_caller, numbered_identity
from checkpoint_samples import AN_UID, MANIFEST, make_expert
from expert_fakes import Request, make_call, random_rows
from google.protobuf.message import Message
from memory_folders import DIMENSIONS
from scalars import scalars
from test_fuzz_parsers import TRAINERS_TOKEN, memory, memory_requests, read_replies
from wire_methods import all_methods

from dht.admission import SwarmAdmission, make_badge
from dht.announcements import NodeInfo
from dht.receipts import SignedWork, Work, sign_receipt
from dht.records import SwarmKeys
from dht.uid import UID
from expert_server.experts.format import to_bytes
from expert_server.probe import call_dial_back, call_probe
from expert_server.state.transfer import StateClient
from peer import clock
from peer.bounded import BoundedDict
from peer.errors import ExpertError, StateError, TransferError, UnreachableError
from peer.identity import Identity, PeerID, certificate_pem
from peer.kademlia.contacts import ContactBook
from peer.kademlia.node import KademliaNode, Row
from peer.kademlia.transport import GrpcTransport
from peer.kademlia.validation import MAX_ENTRIES, Entry, EntryChecker, pack_entries
from peer.loop import LoopThread
from peer.parsing import ParseGuard
from peer.rates import RateLimit
from peer.relays.client import RelayClient
from peer.relays.reservations import Reservations
from peer.rpc.channels import SERVER_OPTIONS, ChannelPool, KnownPeer
from peer.rpc.parts import PartClient
from peer.rpc.server import server_credentials
from peer.rpc.sessions import SessionClient
from peer.transport.addresses import Multiaddress
from peer.transport.contacts import OwnContact
from peer.transport.dialling import Dialling
from peer.transport.endpoints import AddressScope, Endpoint
from peer.transport.pipes import Pipe
from peer.wire import (
    contact_pb2,
    credit_pb2,
    dht_pb2,
    expert_pb2,
    memory_pb2,
    probe_pb2,
    relay_pb2,
    session_pb2,
    state_pb2,
)
from talkoot.credit import CreditReader
from trainer_client.dispatch.batches import CallEnded, Direction
from trainer_client.dispatch.calls import CallTracker, Reply
from trainer_client.dispatch.grpc_caller import GrpcCaller
from trainer_client.dispatch.policy import CircuitBreakers
from trainer_client.dispatch.snapshots import BlockClient
from trainer_client.memory.calls import GrpcMemoryCaller, HostCalls, Method
from trainer_client.memory.checks import Ask, parse_passages

SERVER, TRAINER, OTHER = map(numbered_identity, (1, 2, 3))
KEYS = SwarmKeys("sauna", numbered_identity(0).peer_id)
WIDTH = 8
NAMES = (
    "Challenge", "Open", "Forward", "Backward", "Fetch header", "Fetch chunk", "Fetch header of parameters",
    "FetchPart header", "Ask", "Probe", "DialBack", "List", "Search", "Read", "Ping", "Find", "Store", "Reserve",
    "Dial",
)  # fmt: skip
IGNORED = {"InfoReply", "GiveReply", "HealthCheckResponse", "HealthListResponse"}
"""Nobody reads what is in these: callers only wait for them, or don't call the method."""
LONG = 60.0
Deliver: TypeAlias = Callable[[str, int, int], None]


@dataclass
class Stage:
    """A server over TLS that answers each method as told, and what callers need to call it."""

    info: NodeInfo
    channels: ChannelPool
    sessions: SessionClient = field(default_factory=lambda: a_caller(KEYS.swarm_id))
    replies: dict[str, Callable[[bytes], Sequence[bytes]]] = field(default_factory=dict)
    """By method: the replies to a request."""

    async def channel(self) -> grpc.aio.Channel:
        return await self.channels.reach(self.info)

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        method = str(details.method).rpartition("/")[2]

        async def answer(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            async for request in requests:
                for reply in self.replies[method](request):
                    yield reply
                if method != "Probe":
                    return

        return grpc.stream_stream_rpc_method_handler(answer)


@contextlib.asynccontextmanager
async def a_stage() -> AsyncIterator[Stage]:
    certificate = SERVER.make_certificate()
    stage = Stage(
        NodeInfo(
            peer_id=SERVER.peer_id,
            expires_at=time.time() + 600,
            certificate_pem=certificate_pem(certificate, SERVER.peer_id),
            signed=SignedWork(Work(1), 1),
        ),
        ChannelPool(16),
    )

    class Handler(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
            return stage.service(handler_call_details)

    server = grpc.aio.server(handlers=[Handler()], options=SERVER_OPTIONS)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(SERVER, certificate))
    await server.start()
    stage.info = replace(stage.info, addresses=(Endpoint(f"127.0.0.1:{port}"),))
    try:
        yield stage
    finally:
        await stage.channels.close()
        await server.stop(None)


async def open_session(stage: Stage) -> None:
    """However long a session is said to last, one is enough for many calls."""
    sessions = a_caller(KEYS.swarm_id)
    with patch.object(sessions, "_open", wraps=sessions._open) as opened:
        for _ in range(3):
            await sessions.metadata(SERVER.peer_id, await stage.channel(), LONG)
    assert opened.call_count == 1


_REQUESTS = [
    Request(UID(0, (0, n)), [3], range(3), *random_rows(6, WIDTH, seed=n).reshape(2, 3, WIDTH))
    for n in range(2)
]


async def call_experts(stage: Stage, direction: Direction) -> None:
    caller = GrpcCaller(stage.channels, KEYS.swarm_id, WIDTH, sessions=stage.sessions)
    tracker, replies = CallTracker(caller, CircuitBreakers()), asyncio.Queue[Reply]()
    tracker.start(make_call(stage.info, direction, _REQUESTS, LONG, keep=direction == "forward"), replies)
    while not isinstance(await replies.get(), CallEnded):
        pass
    assert not tracker.breakers.open_at(time.monotonic() + 200.0)
    await tracker.close()


async def fetch_state(stage: Stage) -> None:
    client = StateClient(KEYS.swarm_id, MANIFEST, stage.sessions, RateLimit(None))
    try:
        await client.fetch(stage.info, AN_UID)
    finally:
        await client.close()


async def fetch_block(stage: Stage) -> None:
    client = BlockClient(stage.channels, stage.sessions, KEYS.swarm_id, 2**20)
    await client.fetch(stage.info, AN_UID, 1, LONG)


async def ask(stage: Stage) -> None:
    client = StateClient(KEYS.swarm_id, MANIFEST, stage.sessions, RateLimit(None))
    try:
        assert await client.ask(stage.info, state_pb2.ASK_REASON_ADOPT, [AN_UID]) <= 1
    finally:
        await client.close()


async def probe(stage: Stage) -> None:
    link = await call_probe(await stage.channel(), KEYS.swarm_id)
    assert abs(link.clock_offset_s) < 1e12
    assert 0 < min(link.upload_mbit, link.download_mbit) < 1e9


async def dial_back(stage: Stage) -> None:
    found = await call_dial_back(await stage.channel(), KEYS.swarm_id, 31337)
    assert len(found.address) < 100
    assert len(found.message) < 1000


async def read_credit(stage: Stage) -> None:
    admission = SwarmAdmission(KEYS)
    admission.learn(numbered_identity(0).public_key, "open")
    reader = CreditReader(KEYS.swarm_id, admission, stage.channels, ParseGuard())
    await reader.read([stage.info], 1, LONG)
    # a node that answered and has no receipts that count has nothing
    assert all(credit.work.is_sane or credit.work == Work() for credit in reader.credit.values())


async def search(stage: Stage) -> None:
    infos = memory().manifest.shards
    asked = Ask((*infos[:2], *infos[4:6]), ((0,),) * 4, 5)
    request = asked.request(KEYS.swarm_id, 1, "python-docs", np.ones((1, DIMENSIONS), np.int8))
    await call_host(stage, "Search", request, lambda reply: asked.parse(reply, SERVER.peer_id))


async def read(stage: Stage) -> None:
    roots = [memory().roots[0], memory().roots[4]]
    asked = {root: [3, 69] for root in roots}
    request = memory_pb2.ReadRequest(
        shards=[memory_pb2.ShardPositions(root=root, positions=[3, 69]) for root in roots]
    )
    await call_host(
        stage, "Read", request, lambda reply: parse_passages(reply, asked, memory().manifest, SERVER.peer_id)
    )


async def call_host(stage: Stage, method: Method, request: Any, parse: Callable[[Any], object]) -> None:
    calls = HostCalls(GrpcMemoryCaller(stage.channels, stage.sessions), "python-docs")
    ends = asyncio.get_running_loop().time() + LONG
    await calls.call(stage.info, method, request, False, parse, bool, ends)


async def fetch_part(stage: Stage) -> None:
    client = PartClient(KEYS.swarm_id, stage.sessions, stage.channels, RateLimit(None))
    await client.fetch(stage.info, "python-docs", bytes(32), 2**20)


async def ask_dht(stage: Stage, method: str) -> None:
    contacts, dialling = ContactBook(), Dialling(AddressScope.LOOPBACK)
    contacts.note(Multiaddress.of(stage.info.addresses[0], SERVER.peer_id))
    own = OwnContact(TRAINER, TRAINER.make_certificate())
    transport = GrpcTransport(TRAINER, KEYS.swarm_id, contacts, own, dialling)
    node = KademliaNode(transport, serves_dht=False)
    try:
        match method:
            case "Ping":
                answer = await node.ping(SERVER.peer_id, LONG)
                clock.CLOCK.note("liar", math.nan if answer is None else answer.dht_time)
                assert len(clock.CLOCK.warning) < 300
            case "Find":
                found = await node.find(SERVER.peer_id, [1, 2], EntryChecker())
                assert found is None or all(len(each.entries) <= MAX_ENTRIES for each in found.values())
            case "Store":
                stored = await node.store(SERVER.peer_id, [Row(1, b"", b"", 0.0)])
                assert stored is None or len(stored) <= 1
    finally:
        await node.close()
        await transport.close()


async def reserve(stage: Stage) -> None:
    client = RelayClient(TRAINER, KEYS.swarm_id)
    reservations = Reservations(client)

    async def open_exit(caller: PeerID, origin: str) -> Pipe:
        raise OSError("nobody is let in")

    async def no_candidates() -> list[KnownPeer]:
        return []

    reservations.set_exit(open_exit)
    try:
        await reservations._hold(stage.info, no_candidates)
    finally:
        await reservations.close()
        await client.close()


async def dial(stage: Stage) -> None:
    client = RelayClient(TRAINER, KEYS.swarm_id)
    relay = KnownPeer(SERVER.peer_id, stage.info.addresses, stage.info.certificate_pem)
    try:
        (await client.dial(relay, OTHER.peer_id)).close()
    finally:
        await client.close()


@dataclass(frozen=True)
class Case:
    """A message with which a server answers: its method, and the messages before and after it. `call` gives it to its
    caller, and raises `refusals` if that refuses it.
    """

    name: str
    """Begins with the method's."""
    reply: Message
    call: Callable[[Stage], Awaitable[None]]
    refusals: tuple[type[Exception], ...]
    before: Sequence[Message] = ()
    after: Sequence[Message] = ()
    made_for: Callable[[bytes, bytes], bytes] = lambda request, reply: reply
    """The reply to a request, from the spoilt one."""


def a_call_reply(direction: Direction) -> Message:
    size = 4 * 3 * WIDTH
    is_forward = direction == "forward"
    return expert_pb2.CallReply(
        experts=[
            expert_pb2.ExpertReply(
                index=0, update_count=5, version=9, skipped_update=not is_forward, rolled_back=not is_forward
            ),
            expert_pb2.ExpertReply(index=1, status=8, message="busy", retry_after_s=1.5),
        ],
        rows=[
            expert_pb2.AnsweredRows(
                rows=range(3),
                masks=[1, 1, 1],
                payload_bytes=size,
                products=b"" if is_forward else scalars([0, 0, 0]),
            )
        ],
        chunk=bytes(size),
        kept=is_forward,
    )


def a_contact(identity: Identity) -> contact_pb2.Contact:
    own = OwnContact(identity, identity.make_certificate())
    own.set([Endpoint("127.0.0.1:31337")])
    contact = own.message()
    assert contact is not None
    return contact


def a_find_response() -> Message:
    result = dht_pb2.FindResult(
        type=dht_pb2.RESULT_TYPE_DICTIONARY,
        value=pack_entries({7: Entry(b"\xa1x", time.time() + 60)}),
        expiration_time=time.time() + 60,
        nearest_node_ids=[bytes(20)],
        nearest_peer_ids=[OTHER.peer_id.to_bytes()],
        nearest_known=[0],
        entries=1,
    )
    peer = dht_pb2.NodeInfo(node_id=bytes(20))  # its contact is spoilt in other answers
    return dht_pb2.FindResponse(results=[result], peer=peer, contacts=[a_contact(OTHER)])


def a_fetched(data: bytes) -> tuple[state_pb2.FetchReply, state_pb2.FetchReply]:
    header = state_pb2.StateHeader(
        update_count=3, total_bytes=len(data), sha256=hashlib.sha256(data).digest(), met_update_count=2,
        precision=state_pb2.PRECISION_FP32,
    )  # fmt: skip
    return state_pb2.FetchReply(header=header), state_pb2.FetchReply(chunk=data)


def echoed(request: bytes, reply: bytes) -> bytes:
    """With the payload that a probe asks for in place of the real one."""
    wanted = probe_pb2.ProbeReply(payload=bytes(probe_pb2.ProbeRequest.FromString(request).reply_bytes))
    real = probe_pb2.ProbeReply(payload=b"x").SerializeToString()
    return reply.replace(real, wanted.SerializeToString())


def cases() -> Iterator[Case]:
    yield Case("Challenge", session_pb2.ChallengeReply(challenge=b"c" * 40), open_session, (ExpertError,))
    opened = session_pb2.OpenReply(session=b"s" * 16, lifetime_s=3600.0)
    yield Case("Open", opened, open_session, (ExpertError,))
    directions: tuple[Direction, ...] = ("forward", "backward")
    for direction in directions:
        yield Case(
            direction.capitalize(), a_call_reply(direction), partial(call_experts, direction=direction), ()
        )
    refusals = (TransferError, StateError)
    header, chunk = a_fetched(to_bytes(make_expert(3).checkpoint(), KEYS.swarm_id, AN_UID, 1000.0))
    yield Case("Fetch header", header, fetch_state, refusals, after=[chunk])
    yield Case("Fetch chunk", chunk, fetch_state, refusals, before=[header])
    yield Case("Fetch header of parameters", header, fetch_block, refusals, after=[chunk])
    yield Case("FetchPart header", header, fetch_part, refusals, after=[chunk])
    yield Case("Ask", state_pb2.AskReply(accepted=1), ask, ())
    yield Case(
        "Probe",
        probe_pb2.ProbeReply(time=time.time(), payload=b"x"),
        probe,
        (UnreachableError,),
        made_for=echoed,
    )
    dialled = probe_pb2.DialBackReply(connected=True, address="127.0.0.1", message="it worked")
    yield Case("DialBack", dialled, dial_back, (UnreachableError,))
    badge = make_badge(TRAINERS_TOKEN, TRAINER.peer_id)
    receipt = sign_receipt(TRAINER, KEYS.swarm_id, SERVER.peer_id, Work(9, 2, 3, 2, 1), 50, badge)
    yield Case("List", credit_pb2.ListReply(receipts=[receipt], total=1), read_credit, ())
    (found,), (passages,) = memory_requests(), read_replies()
    yield Case("Search", memory_pb2.SearchReply.FromString(found), search, (ExpertError,))
    yield Case("Read", memory_pb2.ReadReply.FromString(passages), read, (ExpertError,))
    peer = dht_pb2.NodeInfo(node_id=bytes(20), contact=a_contact(SERVER))
    pong = dht_pb2.PingResponse(peer=peer, dht_time=time.time(), available=True)
    yield Case("Ping", pong, partial(ask_dht, method="Ping"), ())
    yield Case("Find", a_find_response(), partial(ask_dht, method="Find"), ())
    stored = dht_pb2.StoreResponse(store_ok=[True], peer=peer)
    yield Case("Store", stored, partial(ask_dht, method="Store"), ())
    offer = relay_pb2.ReserveReply(circuit=b"c" * 16, caller=OTHER.peer_id.to_bytes())
    yield Case("Reserve", offer, reserve, (UnreachableError, OSError), before=[relay_pb2.ReserveReply()])
    yield Case("Dial", relay_pb2.DialReply(circuit=b"c" * 16), dial, (UnreachableError,))


def scripted(stage: Stage, case: Case, spoilt: bytes) -> None:
    """From now on, the server answers the case's method with this, and others as an honest one."""
    session = session_pb2.OpenReply(session=b"s" * 16, lifetime_s=3600.0).SerializeToString()
    challenge = session_pb2.ChallengeReply(challenge=b"c" * 40).SerializeToString()
    stage.replies = {"Challenge": lambda _: [challenge], "Open": lambda _: [session]}
    before, after = ([m.SerializeToString() for m in messages] for messages in (case.before, case.after))
    stage.replies[case.name.partition(" ")[0]] = lambda request: [
        *before,
        case.made_for(request, spoilt),
        *after,
    ]


@functools.cache
def all_cases() -> dict[str, Case]:
    """Made when they are needed: an expert and a memory take a while."""
    return {case.name: case for case in cases()}


@pytest.fixture
def deliver(loop: LoopThread, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Deliver:
    """Gives a case's caller the real reply, and then each spoilt one."""
    monkeypatch.setattr("peer.rpc.transfer._BACKOFF_S", 0.0)
    monkeypatch.setattr(clock.CLOCK, "_others", BoundedDict(8))

    async def scenario(case: Case, longest: int, many: int) -> None:
        async with a_stage() as stage:
            real = case.reply.SerializeToString()
            for what, reply in [("real", real), *mutations.edges(case.reply, longest, many)]:
                scripted(stage, case, reply)
                try:
                    async with asyncio.timeout(LONG):
                        await case.call(stage)
                except case.refusals:
                    pass
                except Exception as error:
                    error.add_note(f"{case.name}, {what}")
                    raise
                logged = [each for each in caplog.records if each.levelno >= logging.ERROR]
                assert not [each.getMessage() for each in logged if not each.name.startswith("grpc")], what

    return lambda name, longest, many: loop.run(scenario(all_cases()[name], longest, many), 600)


@pytest.mark.parametrize("name", NAMES)
def test_a_reply_with_a_field_at_its_edge_is_bounded_or_refused(deliver: Deliver, name: str) -> None:
    deliver(name, 100_000, 5_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_reply_as_large_as_a_message_may_be_is_bounded_or_refused(deliver: Deliver, name: str) -> None:
    deliver(name, 3_000_000, 1_000_000)


def test_every_field_of_every_reply_is_among_them() -> None:
    methods = all_methods()
    assert len(methods) > 20
    cases = all_cases()
    assert tuple(cases) == NAMES
    kinds = {method.output_type.name: method.output_type for method in methods}
    assert kinds.keys() - IGNORED == {case.reply.DESCRIPTOR.name for case in cases.values()}
    set_in = dict[str, set[str]]()
    for case in cases.values():
        note_fields(case.reply, set_in)
    for name in kinds.keys() - IGNORED:
        assert set_in[name] == set(kinds[name].fields_by_name), name


def note_fields(message: Message, set_in: dict[str, set[str]]) -> None:
    """Adds the names of the fields that are set, by the name of their message."""
    for field_, value in message.ListFields():
        set_in.setdefault(message.DESCRIPTOR.name, set()).add(field_.name)
        if field_.message_type is not None:
            for inner in value if field_.is_repeated else [value]:
                note_fields(inner, set_in)
