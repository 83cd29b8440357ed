"""The DHT over gRPC, on real sockets and TLS: impostors are refused, and nothing takes longer than allowed."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import grpc
import pytest
from callers import a_caller, numbered_identity
from dht_peers import LOCAL, SWARM, DHTPeer, dht_peers, running
from grpc import StatusCode
from limited_loop import LimitedLoop
from stranger import new_identities

from peer.clock import SwarmClock
from peer.identity import Identity, PeerID, certificate_pem
from peer.kademlia.lookups import Item, Lookups
from peer.kademlia.node import CALL_DEADLINE_S
from peer.kademlia.routing import key_id_of
from peer.kademlia.validation import MAX_MESSAGE_BYTES, EntryChecker
from peer.metrics import total
from peer.rpc.channels import ChannelPool, Contact
from peer.rpc.sessions import SessionServicer
from peer.transport.addresses import Multiaddress
from peer.transport.contacts import OwnContact
from peer.transport.endpoints import Endpoint
from peer.wire import contact_pb2, dht_pb2, session_pb2

DEADLINE_S = 60.0
FIND = "/talkoot.v1.DhtService/Find"


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await scenario()

    with contextlib.closing(LimitedLoop()) as loop:
        loop.run(run(), 120)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not is_so():  # noqa: ASYNC110  # what others do
            await asyncio.sleep(0.01)


async def found(peer: DHTPeer, key: str) -> set[int | bytes]:
    """What other peers return for the key."""
    key_id = key_id_of(key)
    return set((await lookups(peer).find([key_id], besides_self=True))[key_id].entries)


def lookups(peer: DHTPeer) -> Lookups:
    return Lookups(peer.node)


def introduce(other: DHTPeer, peer: DHTPeer) -> bool:
    """Whether the peer accepts the other's contact."""
    contact = other.own.message()
    return contact is not None and peer.book.learn(contact, (other.peer_id,)) == other.peer_id


def knows(peer: DHTPeer, other: DHTPeer) -> bool:
    return other.node.node_id in peer.node.table


@contextlib.asynccontextmanager
async def silent_server(host: str = LOCAL) -> Any:
    """A server that accepts connections and sends nothing."""
    accepted: list[asyncio.StreamWriter] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(writer)
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            while await reader.read(2**16):
                pass

    server = await asyncio.start_server(accept, host, 0)
    try:
        yield Endpoint.of(LOCAL, server.sockets[0].getsockname()[1]), accepted
    finally:
        server.close()
        for writer in accepted:
            writer.close()
        await server.wait_closed()


@pytest.mark.parametrize("count", [2, 7, pytest.param(12, marks=pytest.mark.slow)])
def test_what_one_node_stores_all_find(count: int) -> None:
    async def scenario() -> None:
        async with dht_peers(count) as peers:
            ends_at = time.time() + 60
            keys = [f"of {peer.peer_id}" for peer in peers]
            for peer, key in zip(peers, keys, strict=True):
                assert await lookups(peer).store([Item(key, 1, "here", ends_at)])
            for peer in peers:
                answers = await lookups(peer).find(list(map(key_id_of, keys)), besides_self=True)
                assert all(found.entries for found in answers.values())

    play(scenario)


def test_who_joins_is_known_and_hears_of_the_others() -> None:
    async def scenario() -> None:
        async with dht_peers(5) as peers:
            await until(lambda: all(len(peer.node.table) == 4 for peer in peers))
            for peer in peers:
                for other in peers:
                    if peer is not other:
                        assert peer.book.message(other.peer_id) == other.own.message()

    play(scenario)


def test_a_joining_peer_is_told_whether_it_can_be_reached() -> None:
    async def scenario() -> None:
        async with dht_peers(1) as (peer,):
            async with running(await DHTPeer.start(1)) as open_one:
                (reply,) = await open_one.join(peer)
                assert reply.reaches_us
            async with running(await DHTPeer.start(2, serves_dht=False)) as client:
                (reply,) = await client.join(peer)
                assert not reply.reaches_us, "it says nowhere where it is"
                client.own.set(addresses=[client.endpoint])
                (reply,) = await client.join(peer)
                assert reply.reaches_us, "although it serves no keys yet"
                assert not knows(peer, client)
                client.node.serves_dht = True
                await client.join(peer)
                await until(lambda: knows(peer, client))
            async with running(await DHTPeer.start(3)) as closed:
                closed.own.set(addresses=[Endpoint("127.0.0.1:1")])
                (reply,) = await closed.join(peer)
                assert not reply.reaches_us
                assert not knows(peer, closed)

    play(scenario)


def test_a_peer_that_starts_again_is_reached_by_one_that_called_it_in_vain() -> None:
    async def scenario() -> None:
        async with dht_peers(1) as (peer,):
            async with running(await DHTPeer.start(1)) as first:
                (reply,) = await first.join(peer)
                assert reply.reaches_us
                assert await peer.node.ping(first.peer_id)
            for _ in range(3):
                assert await peer.node.ping(first.peer_id) is None
            async with running(await DHTPeer.start(1, port=first.port)) as again:
                (reply,) = await again.join(peer)
                assert reply.reaches_us

    play(scenario)


def test_a_node_that_becomes_a_client_answers_nothing_but_pings() -> None:
    async def scenario() -> None:
        async with dht_peers(2) as (one, other):
            await lookups(one).store([Item("key", 1, "here", time.time() + 60)])
            assert await found(one, "key") == {1}
            other.node.serves_dht = False
            assert await found(one, "key") == set()
            assert await one.node.ping(other.peer_id) is None
            assert await one.node.reaches(other.peer_id)
            assert not knows(one, other)

    play(scenario)


def test_an_impostor_gets_no_call() -> None:
    async def scenario() -> None:
        async with dht_peers(1) as (peer,), running(await DHTPeer.start(1, key_of=2)) as impostor:
            asked = 0

            async def note(caller: PeerID, request: bytes) -> bytes:
                nonlocal asked
                asked += 1
                return b""

            await impostor.transport.serve("ping", note)
            assert introduce(impostor, peer)
            assert await peer.node.ping(impostor.peer_id) is None, "by the certificate in its contact"
            address = Multiaddress.of(impostor.endpoint, numbered_identity(3).peer_id)
            peer.book.note(address)
            assert await peer.node.ping(address.peer_id) is None, "by the one that it shows"
            assert not asked
            assert not len(peer.node.table)

    play(scenario)


def test_a_handler_is_told_who_proved_to_call() -> None:
    async def scenario() -> None:
        async with dht_peers(3) as (one, *others):
            callers = []

            async def note(caller: PeerID, request: bytes) -> bytes:
                callers.append((caller, request))
                return b"heard"

            await one.transport.serve("ping", note)
            for other in others:
                answer = await other.transport.call(one.peer_id, "ping", b"a call", DEADLINE_S)
                assert answer == b"heard"
            assert callers == [(other.peer_id, b"a call") for other in others]

    play(scenario)


def test_calls_without_a_session_or_without_the_right_are_refused() -> None:
    async def scenario() -> None:
        async with dht_peers(1) as (peer,):
            pool = ChannelPool()
            pem = certificate_pem(peer.identity.make_certificate(), peer.peer_id)
            call: Any = (await pool.get(peer.endpoint, pem)).unary_unary(FIND)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(b"", timeout=DEADLINE_S)
            assert refused.value.code() is StatusCode.UNAUTHENTICATED
            caller = a_caller(SWARM, rights=(session_pb2.RIGHT_FORWARD,))
            metadata = await caller.metadata(peer.peer_id, await pool.get(peer.endpoint, pem), DEADLINE_S)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(b"", timeout=DEADLINE_S, metadata=metadata)
            assert refused.value.code() is StatusCode.PERMISSION_DENIED
            await caller.close()
            await pool.close()

    play(scenario)


def test_too_large_and_malformed_messages_are_refused_both_ways() -> None:
    async def scenario() -> None:
        async with dht_peers(2) as (one, other):
            heard: list[int] = []

            async def note(caller: PeerID, request: bytes) -> bytes:
                heard.append(len(request))
                return request

            await one.transport.serve("find", note)
            fits, too_large = bytes(MAX_MESSAGE_BYTES), bytes(MAX_MESSAGE_BYTES + 1)
            assert await other.transport.call(one.peer_id, "find", fits, DEADLINE_S) == fits
            assert await other.transport.call(one.peer_id, "find", too_large, DEADLINE_S) is None
            assert heard == [len(fits)]

            async def say_too_much(caller: PeerID, request: bytes) -> bytes:
                return too_large

            await one.transport.serve("find", say_too_much)
            assert await other.transport.call(one.peer_id, "find", b"", DEADLINE_S) is None

            async def say_nonsense(caller: PeerID, request: bytes) -> bytes:
                return b"\xff" * 100

            await one.transport.serve("ping", say_nonsense)
            assert await other.node.ping(one.peer_id) is None
            assert not knows(other, one)
            for method in ("ping", "store", "find"):
                assert await one.transport.call(other.peer_id, method, b"\xff" * 100, DEADLINE_S) == b""
            assert await one.transport.call(other.peer_id, "forget", b"", DEADLINE_S) is None

    play(scenario)


def test_a_peer_that_restarts_elsewhere_is_found_again() -> None:
    async def scenario() -> None:
        async with dht_peers(2) as (one, other):
            await until(lambda: knows(one, other))
            before = other.port
            await other.close()
            assert await one.node.ping(other.peer_id) is None
            assert not knows(one, other)
            async with running(await DHTPeer.start(1)) as again:
                assert again.port != before
                assert await again.join(one)
                await until(lambda: knows(one, again))
                assert await one.node.ping(again.peer_id)

    play(scenario)


def test_a_peer_that_lost_its_sessions_is_called_in_a_new_one() -> None:
    async def scenario() -> None:
        async with dht_peers(2) as (one, other):
            assert await one.node.ping(other.peer_id)
            for name in list(other.sessions._sessions):
                other.sessions._end(name)
            assert await one.node.ping(other.peer_id)

    play(scenario)


def test_a_call_is_made_again_whose_channel_was_closed_before_it_began() -> None:
    """Channels are closed to make room for those to other peers."""

    async def scenario() -> None:
        async with dht_peers(2) as (one, other):
            assert await one.node.ping(other.peer_id)
            channels = one.transport._pool._channels
            reach = one.transport._pool.reach

            async def reach_and_close(peer: Contact) -> grpc.aio.Channel:
                channel = await reach(peer)
                one.transport._pool.reach = reach  # type: ignore[method-assign]  # for the next
                while channels:
                    await channels.popitem()[1].close()
                return channel

            one.transport._pool.reach = reach_and_close  # type: ignore[method-assign]
            assert await one.node.ping(other.peer_id)

    play(scenario)


def test_a_silent_machine_costs_a_call_its_deadline_once() -> None:
    async def scenario() -> None:
        async with dht_peers(1) as (peer,), running(await DHTPeer.start(1)) as liar:
            async with silent_server() as (endpoint, accepted):
                liar.own.set(addresses=[endpoint])
                assert introduce(liar, peer)
                began = time.monotonic()
                assert await peer.node.ping(liar.peer_id, 0.5) is None
                assert time.monotonic() - began > 0.4
                began = time.monotonic()
                for _ in range(20):
                    assert await peer.node.ping(liar.peer_id, 0.5) is None
                assert time.monotonic() - began < 5, "not half of as many deadlines"
                assert len(accepted) == 1
            liar.own.set(addresses=[liar.endpoint])
            assert introduce(liar, peer)
            assert await peer.node.ping(liar.peer_id), "at its new address, at once"

    play(scenario)


def test_a_peer_whose_firewall_drops_all_joins_and_does_not_take_the_wait_for_a_wrong_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SwarmClock(time.time, time.monotonic)
    monkeypatch.setattr("peer.clock.CLOCK", clock)

    async def scenario() -> None:
        async with (
            dht_peers(1) as (peer,),
            running(await DHTPeer.start(1)) as walled,
            silent_server() as (endpoint, _),
        ):
            walled.own.set(addresses=[endpoint])
            (reply,) = await walled.join(peer, deadline_s=CALL_DEADLINE_S)
            assert not reply.reaches_us
            assert abs(clock.error_s) < 0.5

    play(scenario)


def test_a_busy_peer_is_reached_though_dial_and_answer_together_take_longer_than_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deadline_s = 2.5
    opens = SessionServicer.Challenge

    async def open_late(*arguments: Any) -> Any:
        await asyncio.sleep(0.6 * deadline_s)
        return await opens(*arguments)

    async def answer_late(caller: PeerID, request: bytes) -> bytes:
        await asyncio.sleep(0.6 * deadline_s)
        return request

    monkeypatch.setattr(SessionServicer, "Challenge", open_late)

    async def scenario() -> None:
        async with running(await DHTPeer.start(0)) as one, running(await DHTPeer.start(1)) as other:
            await one.transport.serve("ping", answer_late)
            assert introduce(one, other)
            assert await other.transport.call(one.peer_id, "ping", b"a call", deadline_s) == b"a call"

    play(scenario)


def test_many_calls_at_once_share_one_session_and_connection() -> None:
    async def scenario() -> None:
        async with dht_peers(2) as (one, other):

            async def echo(caller: PeerID, request: bytes) -> bytes:
                await asyncio.sleep(0.05)
                return request

            await one.transport.serve("ping", echo)
            requests = [f"call {n}".encode() for n in range(200)]
            answers = await asyncio.gather(
                *(other.transport.call(one.peer_id, "ping", request, DEADLINE_S) for request in requests)
            )
            assert answers == requests
            assert total(one.sessions.events, event="opened") == 1
            assert len(other.transport._pool._channels) == 1

    play(scenario)


def test_a_liar_that_names_made_up_peers_fills_no_table_and_pushes_out_nobody() -> None:
    """Their contacts are signed with real keys, but nobody is at their addresses."""

    async def scenario() -> None:
        async with dht_peers(4) as peers:
            one, liar, *others = peers
            one.book._heard.most = 8
            made_up = new_identities(60)
            ends_at = time.time() + 300
            reached, asked, times_found = {peer.peer_id for peer in peers[1:]}, 0, 0

            async def lie(sender: PeerID, request: bytes) -> bytes:
                nonlocal asked
                asked += 1
                some = made_up[asked % 3 :: 3]
                names = [identity.peer_id.to_bytes() for identity in some]
                results = [dht_pb2.FindResult(nearest_peer_ids=names)] * len(
                    dht_pb2.FindRequest.FromString(request).keys
                )
                contacts = [contact_of(identity) for identity in made_up]
                return dht_pb2.FindResponse(
                    peer=liar.node.introduction(), results=results, contacts=contacts
                ).SerializeToString()

            await liar.transport.serve("find", lie)
            await lookups(others[0]).store([Item("key", 1, "here", ends_at)])
            async with asyncio.timeout(
                DEADLINE_S
            ):  # on a busy machine some answer too late, and are met again
                while times_found < 5 or {peer_id for _, peer_id in one.node.table} != reached:
                    times_found += await found(one, "key") == {1}
            assert asked
            assert all(one.book.message(peer_id) for peer_id in reached)
            assert not any(one.book.message(identity.peer_id) for identity in made_up)
            assert len(one.book._heard) == 8
            answer = await one.node.find(liar.peer_id, [0], EntryChecker())
            assert answer is not None
            assert len(answer[0].nearer) <= 8, "of others no contact is known"

    play(scenario)


def contact_of(identity: Identity) -> contact_pb2.Contact:
    """A contact at whose address nobody listens."""
    own = OwnContact(identity, identity.make_certificate())
    own.set(addresses=[Endpoint("127.0.0.1:1")])
    contact = own.message()
    assert contact is not None
    return contact


def test_a_caller_enters_no_table_by_a_contact_that_leads_elsewhere() -> None:
    async def scenario() -> None:
        async with dht_peers(2) as (one, other), running(await DHTPeer.start(2)) as liar:
            liar.own.set(addresses=[other.endpoint])
            assert await liar.join(one)
            for _ in range(3):
                assert await liar.node.find(one.peer_id, [0], EntryChecker())
                await asyncio.sleep(0.05)
            assert not knows(one, liar)
            request = dht_pb2.PingRequest(
                peer=dht_pb2.NodeInfo(node_id=bytes(20), contact=other.own.message())
            )
            assert await liar.transport.call(one.peer_id, "ping", request.SerializeToString(), DEADLINE_S)
            await asyncio.sleep(0.1)
            assert not knows(one, liar), "nor by that of another"

    play(scenario)


def test_callers_of_one_machine_take_few_call_backs_wherever_they_say_they_are() -> None:
    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            one, _ = await stack.enter_async_context(dht_peers(2))
            silent, _ = await stack.enter_async_context(silent_server("0.0.0.0"))
            # On a busy machine, the first call-backs must not be over before the last stranger comes.
            one.node.ping = partial(one.node.ping, deadline_s=DEADLINE_S)  # type: ignore[method-assign]
            for number in range(2, 10):
                liar = await stack.enter_async_context(running(await DHTPeer.start(number)))
                claims = [Endpoint.of(f"127.{number}.{n}.1", silent.port) for n in range(8)]
                liar.own.set(addresses=claims)
                liar.book.note(one.address)
                assert await liar.node.find(one.peer_id, [0], EntryChecker())
            assert len(one.node._called_back) == 4

    play(scenario)


def test_strangers_that_name_the_endpoint_of_a_newcomer_do_not_keep_it_out() -> None:
    """Each stranger uses up one of the few dials of that endpoint."""

    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            (one,) = await stack.enter_async_context(dht_peers(1))
            newcomer = await stack.enter_async_context(running(await DHTPeer.start(1)))
            for number in range(2, 9):
                liar = await stack.enter_async_context(running(await DHTPeer.start(number)))
                liar.own.set(addresses=[newcomer.endpoint])
                liar.book.note(one.address)
                assert await liar.node.find(one.peer_id, [0], EntryChecker())
                await until(lambda: not one.node._called_back)
            assert not len(one.node.table)
            newcomer.book.note(one.address)
            assert await newcomer.node.find(one.peer_id, [0], EntryChecker())
            await until(lambda: knows(one, newcomer))

    play(scenario)


def test_nobody_is_called_whose_contact_is_not_known() -> None:
    async def scenario() -> None:
        async with dht_peers(1) as (peer,):
            began = time.monotonic()
            assert await peer.node.ping(numbered_identity(9).peer_id) is None
            assert time.monotonic() - began < CALL_DEADLINE_S / 2

    play(scenario)
