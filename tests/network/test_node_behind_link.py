"""A node that others reach through an emulated link: DHT and calls, over real sockets."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from callers import a_caller
from expert_fakes import make_request
from grpc import StatusCode

from dht.manifest import Manifest
from dht.swarm import found_swarm, join_swarm
from expert_server.node import Node, NodeTiming
from expert_server.settings import NodeSettings
from peer.errors import ExpertError, SettingsError
from peer.identity import Identity
from peer.loop import LoopThread
from peer.rpc.channels import ChannelPool
from peer.transport.addresses import Multiaddress, NetworkConfig, multiaddress
from peer.transport.endpoints import Endpoint
from talkoot.demo.links import Link, Proxy, Wire, free_ports
from trainer_client.dispatch.batches import NodeCall
from trainer_client.dispatch.grpc_caller import GrpcCaller

pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")  # hivemind's, on 3.11
LOCAL = "127.0.0.1"
MANIFEST = Manifest.model_validate(
    {
        "name": "sauna",
        "model": {"layers": 1, "hidden": 8, "heads": 2, "context": 8, "feed_forward": 8},
        "experts": {"grid": [2, 2]},
        "routing": {"top_k": 2},
    }
)


def test_others_find_and_call_a_node_where_it_says_that_it_is(loop: LoopThread, tmp_path: Path) -> None:
    identities = [Identity.load_or_create(tmp_path / f"{number}.key") for number in range(2)]

    async def scenario() -> None:
        dht_port, grpc_port = free_ports(LOCAL, 2)
        wires = [Wire(Link(100.0, 0.02)) for _ in range(2)]
        dht = await Proxy.start(wires[0], (LOCAL, dht_port))
        calls = await Proxy.start(wires[1], (LOCAL, grpc_port))
        announce = Endpoint.of(LOCAL, dht.port)
        swarm = await found_swarm(identities[0], MANIFEST, NetworkConfig(LOCAL, dht_port, announce=announce))
        settings = NodeSettings.load(
            experts=4,
            threads=1,
            drain_timeout_s=0,
            grpc_port=grpc_port,
            announce_grpc_port=calls.port,
        )
        node = await Node.start(
            settings, swarm, host=LOCAL, state=tmp_path, timing=NodeTiming(claim_wait_s=0.1)
        )
        invite = await swarm.invite()
        assert invite.bootstrap == (Multiaddress.of(announce, swarm.host.peer_id),)
        observer = await join_swarm(identities[1], invite, NetworkConfig(LOCAL, serves_dht=False))
        channels = ChannelPool()
        try:
            found = (await observer.registry.nodes([swarm.host.peer_id]))[swarm.host.peer_id]
            assert found.addresses == (f"{LOCAL}:{calls.port}",)
            caller = GrpcCaller(
                channels, invite.keys.swarm_id, 8, sessions=a_caller(invite.keys.swarm_id, identities[1])
            )
            rows = np.ones((2, 8), np.float32)
            request = make_request(MANIFEST.uids()[0], [2], [0, 1], rows)
            (answer,) = [a async for a in caller.call(NodeCall(found, "forward", [request], 30.0))]
            assert answer.tensor is not None
            assert all(wire.there.bytes_carried and wire.back.bytes_carried for wire in wires)
            wires[1].cut()
            with pytest.raises(ExpertError) as caught:
                [a async for a in caller.call(NodeCall(found, "forward", [request], 0.5))]
            assert caught.value.status is StatusCode.DEADLINE_EXCEEDED
            wires[1].mend()
        finally:
            await channels.close()
            await observer.stop()
            await node.stop()
            await asyncio.gather(dht.close(), calls.close())

    loop.run(scenario(), 120)


def test_p2pd_listens_where_it_did_when_it_is_started_again(loop: LoopThread, tmp_path: Path) -> None:
    async def scenario() -> None:
        port, elsewhere = free_ports(LOCAL, 2)
        identity = Identity.load_or_create(tmp_path / "key")
        swarm = await found_swarm(
            identity, MANIFEST, NetworkConfig(LOCAL, port, announce=Endpoint.of(LOCAL, elsewhere))
        )
        try:
            swarm.host.p2p._child.kill()
            async with asyncio.timeout(60):
                while not (swarm.host.restarts and swarm.host.alive):  # noqa: ASYNC110  # it sets no event
                    await asyncio.sleep(0.05)
            _, writer = await asyncio.open_connection(LOCAL, port)
            writer.close()
        finally:
            await swarm.stop()

    loop.run(scenario(), 120)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"announce_host": "192.0.2.1"}, "dht_port"),
        ({"announce_dht_port": 4000, "grpc_port": 5000}, "dht_port"),
        ({"announce_grpc_port": 5000, "dht_port": 4000}, "grpc_port"),
    ],
)
def test_a_port_that_is_forwarded_to_must_be_given(given: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=f"{named} must be given too"):
        NodeSettings.load(**given)
    given = given | {named: 6000}
    NodeSettings.load(**given)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("192.0.2.1", "/ip4/192.0.2.1/tcp/7"),
        ("2001:db8::1", "/ip6/2001:db8::1/tcp/7"),
        ("home.example", "/dns/home.example/tcp/7"),
    ],
)
def test_a_multiaddress_is_of_an_address_or_a_name(host: str, address: str) -> None:
    assert multiaddress(Endpoint.of(host, 7)) == address
