"""A node that others reach through an emulated link: DHT and calls, over real sockets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from callers import a_caller
from expert_fakes import Request, ask
from grpc import StatusCode

from dht.manifest import Manifest
from dht.swarm import found_swarm, join_swarm
from expert_server.node import Node, NodeTiming
from expert_server.settings import NodeSettings
from peer.errors import ExpertError, SettingsError
from peer.host import NetworkConfig
from peer.identity import Identity
from peer.loop import LoopThread
from peer.rpc.channels import ChannelPool
from peer.transport.addresses import Multiaddress, multiaddress
from peer.transport.endpoints import Endpoint
from talkoot.demo.links import Link, Proxy, Wire, free_ports
from trainer_client.dispatch.grpc_caller import GrpcCaller

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
        (port,) = free_ports(LOCAL, 1)
        wire = Wire(Link(100.0, 0.02))
        proxy = await Proxy.start(wire, (LOCAL, port))
        announce = Endpoint.of(LOCAL, proxy.port)
        swarm = await found_swarm(identities[0], MANIFEST, NetworkConfig(LOCAL, port, announce=announce))
        settings = NodeSettings.load(
            experts=4,
            threads=1,
            drain_timeout_s=0,
            port=port,
            announce_port=proxy.port,
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
            assert found.addresses == (f"{LOCAL}:{proxy.port}",)
            caller = GrpcCaller(
                channels, invite.keys.swarm_id, 8, sessions=a_caller(invite.keys.swarm_id, identities[1])
            )
            rows = np.ones((2, 8), np.float32)
            request = Request(MANIFEST.uids()[0], [2], [0, 1], rows)
            assert (await ask(caller, found, "forward", request, deadline_s=30.0)).answered
            assert wire.there.bytes_carried
            assert wire.back.bytes_carried
            wire.cut()
            with pytest.raises(ExpertError) as caught:
                await ask(caller, found, "forward", request, deadline_s=0.5)
            assert caught.value.status is StatusCode.DEADLINE_EXCEEDED
            wire.mend()
        finally:
            await channels.close()
            await observer.stop()
            await node.stop()
            await proxy.close()

    loop.run(scenario(), 120)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"announce_host": "192.0.2.1"}, "port"),
        ({"announce_port": 5000}, "port"),
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
