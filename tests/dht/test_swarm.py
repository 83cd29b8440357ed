"""A swarm that its DHT has lost, or that a stranger hides: its peers start from what they have on disk."""

import contextlib
import time
from dataclasses import replace
from pathlib import Path

import pytest
from callers import numbered_identities
from real_swarm import LOCAL, MANIFEST

from dht.admission import Role, make_token
from dht.invites import Invite
from dht.manifest import AdmissionSpec
from dht.records import RecordValidator, SwarmKeys
from dht.swarm import found_swarm, join_swarm
from peer import clock
from peer.bounded import BoundedDict
from peer.errors import SwarmError, UnreachableError
from peer.host import Host, NetworkConfig
from peer.identity import Identity
from peer.loop import LoopThread
from peer.transport.addresses import Multiaddress

CONFIG = NetworkConfig(LOCAL)


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(4)


async def forgetful_peer(
    stack: contextlib.AsyncExitStack, identity: Identity, keys: SwarmKeys
) -> list[Multiaddress]:
    """Starts a DHT peer of the swarm that knows nothing, and returns its addresses."""
    host = await Host.start(identity, CONFIG, swarm_id=keys.swarm_id, validator=RecordValidator())
    stack.push_async_callback(host.stop)
    return host.bootstrap_addresses()


def test_founder_and_joiner_start_again_without_the_dhts_manifest(
    loop: LoopThread, identities: list[Identity], tmp_path: Path
) -> None:
    async def scenario() -> None:
        founder, joiner, stranger, _ = identities
        founded = await found_swarm(founder, MANIFEST, CONFIG, state=tmp_path / "founder")
        invite = await founded.invite()
        joined = await join_swarm(joiner, invite, CONFIG, state=tmp_path / "joiner")
        await joined.stop()
        await founded.stop()
        async with contextlib.AsyncExitStack() as stack:
            only = tuple(await forgetful_peer(stack, stranger, invite.keys))
            hidden = Invite(invite.keys, only)
            again = await join_swarm(joiner, hidden, CONFIG, state=tmp_path / "joiner")
            stack.push_async_callback(again.stop)
            assert again.manifest == MANIFEST
            assert again.manifest_record.newest.data == founded.manifest_record.newest.data
            back = await found_swarm(founder, MANIFEST, CONFIG, bootstrap=only, state=tmp_path / "founder")
            stack.push_async_callback(back.stop)
            assert back.manifest_record.newest.data == founded.manifest_record.newest.data

    loop.run(scenario(), 120)


def test_whoever_finds_no_manifest_because_of_a_wrong_clock_is_told_so(
    loop: LoopThread, identities: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dht.swarm._MANIFEST_DEADLINE_S", 0.1)
    monkeypatch.setattr(clock.CLOCK, "_others", BoundedDict(8))
    founder, joiner, other, _ = identities
    keys = SwarmKeys("sauna", founder.peer_id)

    async def scenario() -> None:
        host = await Host.start(other, CONFIG, swarm_id=keys.swarm_id, validator=RecordValidator())
        host.dht.now = lambda: time.time() + 20 * 86_400.0
        try:
            with pytest.raises(
                SwarmError, match=r"new invite\. But first, this machine's clock is 1728000 s behind"
            ):
                await join_swarm(joiner, Invite(keys, tuple(host.bootstrap_addresses())), CONFIG)
        finally:
            await host.stop()

    loop.run(scenario(), 120)


def test_what_was_revoked_is_known_at_the_start(
    loop: LoopThread, identities: list[Identity], tmp_path: Path
) -> None:
    by_token = MANIFEST.model_copy(update={"admission": AdmissionSpec(mode="token")})

    async def scenario() -> None:
        founder, joiner, stranger, _ = identities
        founded = await found_swarm(founder, by_token, CONFIG, state=tmp_path / "founder")
        invite = await founded.invite()
        joined = await join_swarm(joiner, invite, CONFIG, state=tmp_path / "joiner")
        await founded.revocations.publish([7])
        await joined.refresh_admission()
        await joined.stop()
        await founded.stop()
        async with contextlib.AsyncExitStack() as stack:
            hidden = Invite(invite.keys, tuple(await forgetful_peer(stack, stranger, invite.keys)))
            again = await join_swarm(joiner, hidden, CONFIG, state=tmp_path / "joiner")
            stack.push_async_callback(again.stop)
            assert again.admission.revoked == {7}
            back = await found_swarm(founder, by_token, CONFIG, state=tmp_path / "founder")
            stack.push_async_callback(back.stop)
            assert back.admission.revoked == {7}

    loop.run(scenario(), 120)


def test_a_reader_is_warned_that_its_invite_has_expired(
    loop: LoopThread, identities: list[Identity], caplog: pytest.LogCaptureFixture
) -> None:
    by_token = MANIFEST.model_copy(update={"admission": AdmissionSpec(mode="token")})

    async def scenario() -> None:
        founder, joiner, *_ = identities
        async with contextlib.AsyncExitStack() as stack:
            founded = await found_swarm(founder, by_token, CONFIG)
            stack.push_async_callback(founded.stop)
            invite = await founded.invite()
            for lasts_s in (60.0, 0.0):
                until = time.time() + lasts_s
                token = make_token(founder, invite.keys.swarm_id, Role.READER, until, 7).SerializeToString()
                joined = await join_swarm(joiner, replace(invite, token=token), CONFIG)
                await joined.stop()
                warned = "this invite no longer admits you: the token has expired" in caplog.text
                assert warned is (lasts_s == 0)

    loop.run(scenario(), 120)


@pytest.mark.parametrize("spoilt", [b"", b"\xff" * 100_000, b"talkoot"])
def test_a_spoilt_copy_on_disk_counts_as_none(
    loop: LoopThread, identities: list[Identity], tmp_path: Path, spoilt: bytes
) -> None:
    async def scenario() -> None:
        file = tmp_path / "manifests" / f"sauna-{identities[0].peer_id.to_base58()[-12:]}"
        file.parent.mkdir()
        file.write_bytes(spoilt)
        swarm = await found_swarm(identities[0], MANIFEST, CONFIG, state=tmp_path)
        await swarm.stop()
        assert file.read_bytes() == swarm.manifest_record.newest.data != spoilt

    loop.run(scenario(), 60)


def test_a_swarm_of_the_same_name_is_another_dht(loop: LoopThread, identities: list[Identity]) -> None:
    """Calls of the DHT are made in sessions, which are bound to the founder's key as well as the swarm's name."""

    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            first = await found_swarm(identities[0], MANIFEST, CONFIG)
            stack.push_async_callback(first.stop)
            others = MANIFEST.model_copy(update={"routing": MANIFEST.routing.model_copy(update={"top_k": 1})})
            with pytest.raises(UnreachableError, match="this node belongs to swarm"):
                await found_swarm(identities[1], others, CONFIG, bootstrap=first.host.bootstrap_addresses())
            joined = await join_swarm(identities[2], await first.invite(), CONFIG)
            stack.push_async_callback(joined.stop)
            assert joined.manifest == MANIFEST
            assert first.host.peers() <= {joined.host.peer_id}

    loop.run(scenario(), 120)
