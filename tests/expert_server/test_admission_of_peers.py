"""A real swarm that admits by token: nodes and callers are admitted with the founder's tokens, and with nothing
else.
"""

import asyncio
import logging
import time
from dataclasses import replace
from pathlib import Path

import pytest
from callers import InSession, numbered_identities
from grpc import StatusCode
from real_swarm import LOCAL, MANIFEST, UIDS, Play, Village, eventually, playing

from dht.admission import RIGHTS, Denylist, Role, make_token, new_serial
from dht.announcements import NodeInfo
from dht.invites import Invite, InviteLedger, IssuedInvite
from dht.manifest import AdmissionSpec
from dht.swarm import Swarm, join_swarm
from expert_server.node import Node
from peer.errors import ExpertError, ExpiredInviteError, InviteError, RevokedInviteError, UnreachableError
from peer.host import NetworkConfig
from peer.identity import Identity, PeerID
from peer.loop import LoopThread
from peer.rpc.channels import ChannelPool
from peer.rpc.sessions import OPEN_TO_ALL, Right
from peer.wire import expert_pb2, expert_pb2_grpc, session_pb2

BY_TOKEN = MANIFEST.model_copy(update={"admission": AdmissionSpec(mode="token")})


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(4)


@pytest.fixture
def play(loop: LoopThread, identities: list[Identity], tmp_path: Path) -> Play:
    return playing(loop, identities, tmp_path)


async def invited(village: Village, founder: Node, role: Role) -> tuple[Invite, IssuedInvite]:
    """An invite as `talkoot invite` makes it, which is in the founder's list."""
    now = time.time()
    issued = IssuedInvite(serial=new_serial(), role=role, name="", made_at=now, expires_at=now + 3600)
    swarm = founder.swarm
    token = make_token(swarm.host.identity, swarm.keys.swarm_id, role, issued.expires_at, issued.serial)
    village.state(swarm).mkdir(exist_ok=True)
    InviteLedger(village.state(swarm)).add(issued)
    return replace(await swarm.invite(), token=token.SerializeToString()), issued


async def founder_and_node(
    village: Village, founder_every_s: float = 0.5, node_every_s: float = 0.5
) -> tuple[Node, Node, IssuedInvite]:
    """A running founder and a node that has joined, each with four experts, and the node's invite."""
    founder = await village.found(manifest=BY_TOKEN, experts=4, spare=0, announce_every_s=founder_every_s)
    await village.run(founder)
    invite, issued = await invited(village, founder, Role.NODE)
    node = await village.start(
        await come_in(village, 1, invite, Role.NODE),
        {"experts": 4, "spare": 0, "announce_every_s": node_every_s},
    )
    return founder, node, issued


async def come_in(village: Village, number: int, invite: Invite, role: Role) -> Swarm:
    swarm = await join_swarm(
        village.identities[number], invite, NetworkConfig(LOCAL, serves_dht=role is Role.NODE), roles=(role,)
    )
    if role is not Role.NODE:
        village.stack.push_async_callback(swarm.stop)
    return swarm


async def found_by(swarm: Swarm, node: Node) -> NodeInfo:
    found = dict[PeerID, NodeInfo]()

    async def is_announced() -> bool:
        found.update(await swarm.registry.nodes([node.swarm.host.peer_id]))
        return bool(found)

    await eventually(is_announced)
    return found[node.swarm.host.peer_id]


async def ask(swarm: Swarm, node: Node, *rights: Right) -> StatusCode:
    """The status of a call that this peer makes to the node."""
    return await ask_at(await found_by(swarm, node), swarm, *rights)


async def ask_at(info: NodeInfo, swarm: Swarm, *rights: Right) -> StatusCode:
    pool = ChannelPool()
    try:
        channel = await pool.get(info.addresses[0], info.certificate_pem)
        sessions = swarm.session_client(*rights)
        stub = InSession(
            expert_pb2_grpc.ExpertServiceStub(channel), await sessions.metadata(info.peer_id, channel, 10.0)
        )
        method = stub.Forward if rights[0] == session_pb2.RIGHT_FORWARD else stub.Backward
        # The call is admitted, and then found to be empty.
        code: StatusCode = await method(iter([expert_pb2.CallRequest()]), timeout=60).code()
        return code
    except ExpertError as error:
        return error.status
    finally:
        await pool.close()


def admitted(node: Node) -> set[PeerID]:
    """The peers that have more rights at the node than any stranger."""
    return {session.caller for session in node.sessions.all() if session.rights - OPEN_TO_ALL}


async def hosts(swarm: Swarm) -> set[PeerID]:
    return {r.peer_id for found in (await swarm.experts.replicas(UIDS)).values() for r in found}


async def sees(swarm: Swarm, *nodes: Node) -> None:
    """Waits until this peer sees exactly these hosts, since a busy node may be late with an announcement."""

    async def are_seen() -> bool:
        return await hosts(swarm) == {node.swarm.host.peer_id for node in nodes}

    await eventually(are_seen)


def test_nodes_and_trainers_come_in_by_token_until_it_is_revoked(play: Play) -> None:
    async def scenario(village: Village) -> None:
        founder, node, _ = await founder_and_node(village)
        await village.run(node)
        invite, issued = await invited(village, founder, Role.TRAINER)
        trainer = await come_in(village, 2, invite, Role.TRAINER)
        await sees(trainer, founder, node)

        forward, backward, *_ = sorted(RIGHTS[Role.TRAINER])
        let_in = StatusCode.INVALID_ARGUMENT
        assert await ask(trainer, node, forward, backward) is let_in
        assert await ask(trainer, node, backward) is let_in
        assert await ask(trainer, node, forward, session_pb2.RIGHT_FETCH) is StatusCode.PERMISSION_DENIED
        assert await ask(node.swarm, founder, forward) is StatusCode.PERMISSION_DENIED

        assert trainer.host.peer_id in admitted(node)
        InviteLedger(village.state(founder.swarm)).revoke(issued.number, time.time())

        async def is_out() -> bool:
            return trainer.host.peer_id not in admitted(node)

        await eventually(is_out)
        assert await ask(trainer, node, forward) is StatusCode.PERMISSION_DENIED
        with pytest.raises(RevokedInviteError, match="revoked"):
            await come_in(village, 3, invite, Role.TRAINER)

    play(scenario)


@pytest.mark.parametrize(
    ("is_revoked", "kind", "words"),
    [
        (True, RevokedInviteError, "has revoked this node's invite"),
        (False, ExpiredInviteError, "this node's invite has expired"),
    ],
)
def test_a_node_whose_token_is_over_says_so_and_stops(
    play: Play, caplog: pytest.LogCaptureFixture, is_revoked: bool, kind: type[InviteError], words: str
) -> None:
    async def scenario(village: Village) -> None:
        founder, node, issued = await founder_and_node(village)
        running = asyncio.create_task(node.run())
        if is_revoked:
            InviteLedger(village.state(founder.swarm)).revoke(issued.number, time.time())
        else:
            for each in (node, founder):
                each.swarm.admission._now = lambda: issued.expires_at
        await asyncio.wait([running], timeout=60)
        assert running.done()
        errors = running.exception()
        assert isinstance(errors, ExceptionGroup)
        (error,) = errors.exceptions
        assert isinstance(error, kind)
        assert error.exit_status == 3
        assert words in str(error)
        assert node.is_token_over
        await node.stop()
        assert "hand experts over" not in caplog.text, "nobody would take them"
        assert is_revoked or "accepted our records" not in caplog.text, "the clock is right"

    play(scenario)


def test_a_revoked_node_that_returns_with_a_new_invite_is_accepted_at_once(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(village: Village) -> None:
        # its last record outlives the first one of its next run
        founder, node, issued = await founder_and_node(village, node_every_s=120)
        InviteLedger(village.state(founder.swarm)).revoke(issued.number, time.time())
        await founder._access.look()
        await node._access.look()
        assert node.is_token_over
        await node.stop()
        again, _ = await invited(village, founder, Role.NODE)
        caplog.clear()
        swarm = await come_in(village, 1, again, Role.NODE)
        returned = await village.start(swarm, {"experts": 4, "spare": 0, "announce_every_s": 0.5})
        assert "accepted our records" not in caplog.text
        await found_by(founder.swarm, returned)
        await sees(founder.swarm, founder, returned)

    play(scenario)


def test_a_revocation_reaches_a_node_of_a_small_swarm_before_its_next_announcement(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def scenario(village: Village) -> None:
        founder, node, issued = await founder_and_node(village, 120, 120)

        async def has_met() -> bool:
            await founder.hosting.look()
            await founder.news.look()
            await founder.swarm.membership.check(announced=True)
            return bool(founder.news._hosts)

        await eventually(has_met)
        running = asyncio.create_task(node.run())
        InviteLedger(village.state(founder.swarm)).revoke(issued.number, time.time())
        with pytest.raises(ExceptionGroup) as caught:
            await asyncio.wait_for(running, 60)
        assert [*map(type, caught.value.exceptions)] == [RevokedInviteError]
        await node.stop()
        name = node.swarm.host.peer_id.to_base58()[-8:]

        async def is_told() -> bool:
            await founder.hosting.look()
            await founder.news.look()
            await founder.swarm.membership.check(announced=True)
            has_left = (
                f"node {name}, whose invite was revoked, has left; this node goes on" in caplog.messages
            )
            return has_left and "all other nodes have left" in caplog.text

        await eventually(is_told)
        assert "no other node" not in caplog.text

    play(scenario)


def test_a_node_leaves_when_its_token_expires_and_not_only_when_it_is_refused(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(village: Village) -> None:
        founder, node, issued = await founder_and_node(village, 10, 120)
        began = time.time()
        for each in (node, founder):
            each.swarm.admission._now = lambda: issued.expires_at - 0.5 + time.time() - began
        with pytest.raises(ExceptionGroup) as caught:
            await asyncio.wait_for(node.run(), 60)
        assert [*map(type, caught.value.exceptions)] == [ExpiredInviteError]
        assert not [record for record in caplog.records if record.levelname == "WARNING"]

    play(scenario)


def test_who_has_no_token_is_told_and_what_it_announces_is_not_seen(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expert_server.node._FIRST_RECORD_PAUSES_S", (0.01, 0.01))

    async def scenario(village: Village) -> None:
        founder = await village.found(manifest=BY_TOKEN, experts=2, spare=0)
        await village.run(founder)
        plain = await founder.swarm.invite()
        with pytest.raises(InviteError, match="admits by token: ask its founder"):
            await come_in(village, 1, plain, Role.NODE)
        for_trainers, _ = await invited(village, founder, Role.TRAINER)
        with pytest.raises(InviteError, match="for a trainer, not for a node"):
            await come_in(village, 1, for_trainers, Role.NODE)

        watcher = await join_swarm(village.identities[2], plain, NetworkConfig(LOCAL, serves_dht=False))
        village.stack.push_async_callback(watcher.stop)
        assert await ask(watcher, founder, session_pb2.RIGHT_FORWARD) is StatusCode.PERMISSION_DENIED
        # A node that ignores the rule still announces, but nobody accepts it.
        intruder = await join_swarm(village.identities[1], plain, NetworkConfig(LOCAL))
        intruder.registry._admission = None
        with pytest.raises(UnreachableError, match="no DHT peer accepted our records"):
            await village.start(intruder, {"experts": 8, "spare": 0})
        await sees(watcher, founder)
        assert intruder.host.peer_id not in await watcher.registry.nodes([intruder.host.peer_id])

    play(scenario)


def test_a_denied_peer_is_not_called_and_does_not_call(play: Play, tmp_path: Path) -> None:
    async def scenario(village: Village) -> None:
        founder = await village.found(experts=4, spare=0)
        denied = tmp_path / "denied"
        founder.swarm.admission.denylist = Denylist(denied)
        caller = await village.observe(1, await founder.swarm.invite())
        info = await found_by(caller, founder)
        assert await ask_at(info, caller, session_pb2.RIGHT_FORWARD) is StatusCode.INVALID_ARGUMENT
        await founder._access.look()
        assert admitted(founder) == {caller.host.peer_id}
        denied.write_text(f"{caller.host.peer_id}\n")
        await founder._access.look()
        assert len(founder.sessions) == 0
        for right in (session_pb2.RIGHT_FORWARD, session_pb2.RIGHT_DHT):
            assert await ask_at(info, caller, right) is StatusCode.PERMISSION_DENIED
        other = await village.observe(2, await founder.swarm.invite())
        await sees(other, founder)
        other.admission.denylist = Denylist(None, [str(founder.swarm.host.peer_id)])
        assert await hosts(other) == set()

    play(scenario)
