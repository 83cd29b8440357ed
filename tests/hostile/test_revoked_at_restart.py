"""A revoked token opens nothing, not even in the first moments after a founder's node was away."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from callers import numbered_identities
from real_swarm import LOCAL, MANIFEST, Play, Village, eventually, playing
from stranger import HostileCaller, Stranger

from dht.admission import Role, make_badge, make_token, new_serial
from dht.invites import InviteLedger, IssuedInvite
from dht.manifest import AdmissionSpec
from peer.loop import LoopThread
from peer.wire import session_pb2
from talkoot.demo.links import free_ports

BY_TOKEN = MANIFEST.model_copy(update={"admission": AdmissionSpec(mode="token")})


@pytest.fixture
def play(loop: LoopThread, tmp_path: Path) -> Play:
    return playing(loop, numbered_identities(2), tmp_path)


def test_a_revoked_token_opens_nothing_while_the_founder_starts_again(play: Play) -> None:
    async def scenario(village: Village) -> None:
        (port,) = free_ports(LOCAL, 1)
        node = await village.found(manifest=BY_TOKEN, experts=1, port=port)
        swarm, state, now = node.swarm, village.state(node.swarm), time.time()
        issued = IssuedInvite(
            serial=new_serial(), role=Role.TRAINER, name="", made_at=now, expires_at=now + 3600
        )
        state.mkdir(exist_ok=True)
        InviteLedger(state).add(issued)
        token = make_token(
            swarm.host.identity, swarm.keys.swarm_id, Role.TRAINER, issued.expires_at, issued.serial
        )
        invite = replace(await swarm.invite(), token=token.SerializeToString())
        async with Stranger.joined(invite) as stranger:
            info = await stranger.node(swarm.host.peer_id)
            caller = HostileCaller(info, swarm.keys.swarm_id)
            badge = make_badge(token, caller.identity.peer_id)
            forward: dict[str, Any] = {"rights": [session_pb2.RIGHT_FORWARD], "badge": badge}
            await caller.open_session(**forward)

            await node.stop()
            InviteLedger(state).revoke(issued.number, now)
            outcomes: set[str] = set()

            async def keep_asking() -> None:
                while True:
                    another = HostileCaller(info, swarm.keys.swarm_id, caller.identity)
                    try:
                        await another.open_session(**forward)
                        outcomes.add("opened")
                    except grpc.aio.AioRpcError as error:
                        outcomes.add(error.code().name)
                    finally:
                        await another.close()

            asking = asyncio.create_task(keep_asking())
            await village.found(manifest=BY_TOKEN, experts=1, port=port)

            async def was_answered() -> bool:
                return bool(outcomes & {"PERMISSION_DENIED", "opened"})

            await eventually(was_answered)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await caller.close()
            assert "opened" not in outcomes

    play(scenario)
