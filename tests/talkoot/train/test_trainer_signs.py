"""A trainer signs for the nodes of a real swarm, and they announce it."""

from pathlib import Path

import torch
from commands import wait_until
from training_swarm import founded

from dht.invites import Invite
from dht.receipts import SignedWork
from peer.loop import LoopThread
from trainer_client.client import SwarmClient
from trainer_client.settings import TrainerSettings

ROWS = 24


def train(invite: str, state: Path) -> None:
    """One step of one mixture, forward and backward."""
    with SwarmClient(Invite.parse(invite), TrainerSettings.load(top_k=2), state) as client:
        client.wait_for_experts(60, lambda text: None)
        mixture = client.mixture(0)
        rows = torch.randn(2, ROWS // 2, client.manifest.model.hidden, requires_grad=True)
        mixture(rows).square().mean().backward()


def test_what_a_trainer_signs_is_kept_announced_and_grows_over_its_runs(
    loop: LoopThread, tmp_path: Path
) -> None:
    with founded(loop, tmp_path / "founder", experts=8) as founder:
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
        assert node.status().signed_share == 1.0

        async def announced() -> SignedWork:
            found = await node.swarm.registry.nodes([me])
            return found[me].signed if me in found else SignedWork()

        wait_until(lambda: loop.run(announced(), 120) == signed(), "what it announces")
