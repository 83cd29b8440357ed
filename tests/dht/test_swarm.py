"""A swarm that its DHT has lost, or that a stranger hides: its peers start from what they have on disk."""

import contextlib
import time
from dataclasses import replace
from pathlib import Path

import pytest
from callers import numbered_identities
from memory_peers import until
from real_swarm import LOCAL, MANIFEST

from dht.admission import Role, make_token
from dht.invites import Invite
from dht.manifest import AdmissionSpec, Manifest, set_keys
from dht.presets import PRESETS
from dht.records import RecordValidator, SwarmKeys
from dht.swarm import found_swarm, join_swarm
from peer import PROTOCOL_VERSION, clock
from peer.bounded import BoundedDict
from peer.errors import SwarmError, UnreachableError
from peer.host import Host, NetworkConfig
from peer.identity import Identity
from peer.loop import LoopThread
from peer.settings import read_toml
from peer.transport.addresses import Multiaddress
from peer.transport.endpoints import Endpoint

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
                SwarmError, match=r"new invite\. But first, this machine's clock is 20 days behind"
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


TOML = 'name = "sauna"\n[model]\nlayers = 1\nhidden = 16\n'


def read(folder: Path, text: str) -> tuple[Manifest, set[str]]:
    """The manifest of a founder's file with this text, and the keys that it sets."""
    file = folder / "swarm.toml"
    file.write_text(text)
    return Manifest.from_toml(file), set(set_keys(read_toml(file)))


@pytest.mark.parametrize("lasts_s", [0.0, 60.0])
def test_a_founder_alone_can_not_change_its_manifest_even_if_that_has_expired(
    loop: LoopThread,
    identities: list[Identity],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lasts_s: float,
) -> None:
    monkeypatch.setattr("dht.swarm.LIFETIME_S", lasts_s)

    async def scenario() -> None:
        manifest, given = read(tmp_path, TOML)
        for text, refused in (
            (TOML, ""),
            ('# as founded\nname="sauna"\nmodel={hidden=0x10, layers=1}\nexperts.grid=[8, 8]', ""),
            (TOML.replace("16", "32"), "model.hidden is 16, not 32. A swarm's manifest can't change"),
            (f"{TOML}[experts]\ngrid = [4, 4]\n", r"experts.grid is \[8, 8\], not \[4, 4\]"),
            ('license = "MIT"\n' + TOML, 'license is unset, not "MIT"'),
        ):
            again, given = read(tmp_path, text)
            founding = found_swarm(identities[0], again, CONFIG, given=given, state=tmp_path)
            if refused:
                with pytest.raises(SwarmError, match=refused):
                    await founding
            else:
                swarm = await founding
                assert swarm.manifest == manifest
                await swarm.stop()

    loop.run(scenario(), 60)


@pytest.mark.parametrize("version", [PROTOCOL_VERSION, PROTOCOL_VERSION - 1])
def test_a_later_release_keeps_the_values_that_a_file_left_out(
    loop: LoopThread,
    identities: list[Identity],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: int,
) -> None:
    async def scenario() -> None:
        manifest, given = read(tmp_path, TOML)
        earlier = manifest.model_copy(update={"protocol_version": version})
        swarm = await found_swarm(identities[0], earlier, CONFIG, given=given, state=tmp_path)
        await swarm.stop()
        monkeypatch.setitem(PRESETS, "transformer", PRESETS["ffn"])
        later, given = read(tmp_path, TOML)
        assert later.experts.kind == "ffn"
        swarm = await found_swarm(identities[0], later, CONFIG, given=given, state=tmp_path)
        await swarm.stop()
        assert (
            swarm.manifest
            == Manifest.from_json(swarm.manifest_record.newest.payload.manifest_json)
            == manifest
        )
        assert 'your file leaves out: model.feed_forward is 8, not 16, experts.kind is "tr' in caplog.text

    loop.run(scenario(), 60)


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


def test_an_invite_names_peers_that_are_online_before_those_that_were_met_later_and_have_gone(
    loop: LoopThread, identities: list[Identity]
) -> None:
    """Each command that joins for a moment, such as one that publishes a memory, is met, too."""

    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            founded = await found_swarm(identities[0], MANIFEST, CONFIG)
            stack.push_async_callback(founded.stop)
            joined = await join_swarm(identities[1], await founded.invite(), CONFIG)
            stack.push_async_callback(joined.stop)
            await until(lambda: bool(founded.host.peers()))
            online = joined.host.bootstrap_addresses()
            founded.peer_store.add(online, now=1.0)
            for number, identity in enumerate(identities[2:]):
                gone = Multiaddress.of(Endpoint.of(LOCAL, 4001 + number), identity.peer_id)
                founded.peer_store.add([gone], now=2.0)
            others = (await founded.invite()).bootstrap[len(founded.host.bootstrap_addresses()) :]
            peers = list(dict.fromkeys(address.peer_id for address in others))
            assert peers == [joined.host.peer_id, identities[3].peer_id, identities[2].peer_id]

    loop.run(scenario(), 60)
