"""A trainer signs for the nodes of a real swarm, and they announce it."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import wait_until
from training_swarm import founded

from dht.admission import Role, make_token
from dht.invites import Invite
from dht.manifest import AdmissionSpec
from dht.receipts import SignedWork
from peer.loop import LoopThread
from talkoot.credit import Credit, CreditReader
from trainer_client.client import SwarmClient
from trainer_client.settings import TrainerSettings

ROWS = 24


@pytest.fixture(autouse=True)
def patient_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leaving trainer usually delivers its receipts within two seconds, or not at all; here it may take longer."""
    monkeypatch.setattr("trainer_client.credit._FAREWELL_S", 60.0)


def train(invite: str, state: Path) -> None:
    """Does one step of one mixture, forward and backward."""
    with SwarmClient(Invite.parse(invite), TrainerSettings.load(top_k=2), state) as client:
        client.wait_for_experts(60, lambda text: None)
        mixture = client.mixture(0)
        rows = torch.randn(2, ROWS // 2, client.manifest.model.hidden, requires_grad=True)
        mixture(rows).square().mean().backward()


def test_what_a_trainer_signs_is_kept_announced_and_grows_over_its_runs(
    loop: LoopThread, tmp_path: Path
) -> None:
    with founded(loop, tmp_path / "founder", experts=8, announce_every_s=2) as founder:
        node, me = founder.node, founder.node.swarm.host.peer_id

        def signed() -> SignedWork:
            return node.status().signed

        train(founder.invite, tmp_path / "trainer")
        wait_until(lambda: signed().trainers == 1, "the trainer's last receipt")
        first = signed().work
        train(founder.invite, tmp_path / "trainer")
        wait_until(lambda: signed().work > first, "the receipt of its second run")
        assert signed().trainers == 1
        assert signed().work.pairs <= node.status().contributed_rows
        train(founder.invite, tmp_path / "another")
        wait_until(lambda: signed().trainers == 2, "another trainer's receipt")

        async def announced() -> SignedWork:
            found = await node.swarm.registry.nodes([me])
            return found[me].signed if me in found else SignedWork()

        wait_until(lambda: loop.run(announced(), 120) == signed(), "what it announces")

        async def read() -> Credit | None:
            """Reads as `talkoot status` and the dashboard do."""
            reader = CreditReader.of(node.swarm)
            found = await node.swarm.registry.nodes([me])
            await reader.read(found.values(), 8, 60.0)
            await reader.close()
            return reader.credit.get(me)

        def counted() -> bool:
            credit = loop.run(read(), 120)
            return credit is not None and SignedWork(credit.work, credit.trainers) == signed()

        wait_until(counted, "its receipts as others count them")


def test_the_count_of_a_node_that_was_killed_does_not_lag_behind_what_was_signed(
    loop: LoopThread, tmp_path: Path
) -> None:
    with founded(loop, tmp_path, experts=8) as founder:
        node = founder.node
        train(founder.invite, tmp_path / "trainer")
        wait_until(lambda: node.status().signed.trainers == 1, "the trainer's last receipt")
        signed, swarm_id = node.status().signed.work.pairs, node.swarm.keys.swarm_id
    (contribution,) = (tmp_path / "founder" / "contributions").iterdir()
    assert contribution.stem == swarm_id, "each swarm has its own totals"
    contribution.unlink()  # a node that is killed may not have saved it yet
    with founded(loop, tmp_path, experts=8) as founder:
        status = founder.node.status()
        assert (status.signed.work.pairs, status.contributed_rows) == (signed, signed)


def test_where_the_founder_gives_tokens_each_is_one_vote(loop: LoopThread, tmp_path: Path) -> None:
    by_token = {"admission": AdmissionSpec(mode="token")}
    with founded(loop, tmp_path / "founder", experts=8, parts=by_token) as founder:
        node, me = founder.node, founder.node.swarm.host.peer_id
        swarm = node.swarm
        for number in range(2):
            token = make_token(
                swarm.host.identity, swarm.keys.swarm_id, Role.TRAINER, time.time() + 3600, 7 + number
            )
            invite = replace(Invite.parse(founder.invite), token=token.SerializeToString())
            train(str(invite), tmp_path / f"trainer{number}")
        wait_until(lambda: node.status().signed.trainers == 2, "both trainers' receipts")

        async def read(*revoked: int) -> Credit | None:
            reader = CreditReader.of(swarm)
            found = await swarm.registry.nodes([me])
            await reader.read(found.values(), 8, 60.0)
            await reader.close()
            return reader._ledger.count(revoked).get(me)

        def shares() -> list[tuple[int, float | None]]:
            found = [loop.run(read(*revoked), 120) for revoked in ((), (7,))]
            return [(credit.trainers, credit.share) for credit in found if credit is not None]

        wait_until(
            lambda: shares() == [(2, 1.0), (1, 1.0)], "the votes of both, and of one when a token is revoked"
        )
