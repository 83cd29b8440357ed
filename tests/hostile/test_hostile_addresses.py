"""Addresses that strangers write: none ends a peer or keeps it from starting, and none makes a swarm dial a victim."""

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from stranger import LIFETIME_S, LOCAL, Stranger, new_identities
from victim import Victim, founder, trainer

from dht.announcements import ReplicaAnnouncement, ReplicaState
from dht.experts import ExpertRegistry
from dht.records import SwarmKeys
from dht.registry import Registry
from dht.swarm import Swarm
from peer.identity import Identity
from peer.transport.dialling import ENDPOINT_BURST, ENDPOINT_EVERY_S
from peer.transport.endpoints import Endpoint

NAMES_OF_NOBODY = 24
EVERY_S = 1.0


def bad_addresses(own: str) -> list[str]:
    """Addresses that once broke a parser, or passed one check and failed the next. `own`: the writer's PeerID."""
    here = f"/ip4/{LOCAL}/tcp/1/p2p/{own}"
    return [
        f"/onion/aaimaq4ygg2iegci:80/dns/a/p2p/{own}",
        f"/onion/:80/dns/a/p2p/{own}",
        f"{here}/ip4/{LOCAL}/p2p/{own}",
        f"/ip4/{LOCAL}/tcp/x/p2p/{own}",
        f"/ip4/{LOCAL}/tcp/1/p2p/nobody",
        f"/dns/{'a' * 300}/tcp/1/p2p/{own}",
        f"/ip4/{LOCAL}/tcp/99999/p2p/{own}",
        f"{here},--listen={here}",
    ]


BAD_ENDPOINTS = ["", ":", "x:y", "127.1:80", f"{LOCAL}:99999", "unix:/nowhere", "[::1%lo]:1", "\x1b[2J:1"]


class Listener:
    """A machine that is not a peer. It counts connections."""

    def __init__(self) -> None:
        self.dials = 0

    async def __aenter__(self) -> "Listener":
        self._server = await asyncio.start_server(self._accept, LOCAL, 0)
        self.endpoint = Endpoint.of(LOCAL, self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _accept(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.dials += 1
        writer.close()


async def name_it(swarm: Swarm, identities: Sequence[Identity], victim: Endpoint) -> None:
    """Publishes signed records of many peers: all host all experts, and name the victim's address."""
    uids = swarm.manifest.uids()
    serving = [ReplicaAnnouncement(uid, ReplicaState.SERVING, 10**6) for uid in uids]
    for identity in identities:
        experts = ExpertRegistry(Registry(swarm.host.dht, swarm.keys, identity), swarm.manifest)
        here = f"/ip4/{victim.host}/tcp/{victim.port}/p2p/{identity.peer_id}"
        record = Stranger(swarm).node_record(
            certificate=identity.make_certificate(),
            addresses=[victim],
            tunnel_addresses=[here],
            relay_addresses=[f"{here}/p2p-circuit/p2p/{identity.peer_id}"],
        )
        await experts.registry.publish_node(record, LIFETIME_S)
        await experts.announce(serving, LIFETIME_S)


async def reads(victims: Sequence[Victim], rounds: int) -> None:
    """Waits until each of the victims has read the swarm's records `rounds` more times."""
    wanted = {victim.state: lookups(victim) + rounds for victim in victims}

    def have_read() -> bool:
        return all(lookups(victim) >= wanted[victim.state] for victim in victims)

    await asyncio.to_thread(victims[0].until, have_read, "records to be read", 60.0)


def lookups(victim: Victim) -> float:
    return victim.metric('talkoot_dht_seconds_count{operation="get"}')


def poison(state: Path) -> int:
    """Puts bad addresses into a founder's state folder, as an earlier version stored them. Returns their number."""
    me = Identity.load_or_create(state / "identity.key").peer_id
    poisoned = [{"addresses": [bad], "met_at": 1.0} for bad in bad_addresses(me.to_base58())]
    (state / "peers").mkdir()
    (state / "peers" / f"{SwarmKeys('siege', me).swarm_id}.json").write_text(json.dumps({"peers": poisoned}))
    return len(poisoned)


@pytest.mark.slow
def test_no_addresses_end_a_peer_and_none_make_it_dial_a_victim(tmp_path: Path) -> None:
    poisoned = poison(tmp_path / "founder")
    with founder(tmp_path, announce_every_s=EVERY_S) as node:
        assert sum("dropped" in line for line in node.log_lines) == poisoned
        assert all(address.endpoint.host == LOCAL for address in node.invite.bootstrap)
        with trainer(tmp_path, node.invite, announce_every_s=EVERY_S) as train:

            def is_refused() -> bool:
                return train.metric('talkoot_dials_refused_total{reason="often"}') > 0

            async def attack() -> None:
                async with Stranger.joined(node.invite) as stranger, Listener() as victim:
                    bad = bad_addresses(stranger.peer_id.to_base58())
                    await stranger.publish_node(
                        addresses=BAD_ENDPOINTS,
                        tunnel_addresses=bad,
                        relay_addresses=bad,
                    )
                    certificate = stranger.identity.make_certificate()
                    await stranger.publish_trainer(
                        certificate=certificate,
                        addresses=BAD_ENDPOINTS,
                        tunnel_addresses=bad,
                        relay_addresses=bad,
                    )
                    began = time.monotonic()
                    await name_it(stranger.swarm, new_identities(NAMES_OF_NOBODY), victim.endpoint)
                    await asyncio.to_thread(node.until, is_refused, "dials to be refused", 60.0)
                    await reads([node, train], 5)
                    a_peer = ENDPOINT_BURST + (time.monotonic() - began) / ENDPOINT_EVERY_S + 1
                    assert 0 < victim.dials <= 2 * a_peer

            asyncio.run(attack())
            assert (node.alive, train.alive) == (True, True)
