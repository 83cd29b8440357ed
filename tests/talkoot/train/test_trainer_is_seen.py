"""What a swarm hears of a trainer while it trains."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import wait_until
from training_swarm import Founder, founded

from dht.invites import Invite
from peer.loop import LoopThread
from trainer_client.client import SwarmClient
from trainer_client.settings import TrainerSettings
from trainer_client.training.record import Progress


@pytest.fixture
def founder(loop: LoopThread, tmp_path: Path) -> Iterator[Founder]:
    with founded(loop, tmp_path / "founder", experts=8) as running:
        yield running


def test_the_swarm_hears_of_the_first_step_at_once(founder: Founder, tmp_path: Path) -> None:
    settings = TrainerSettings.load(announce_every_s=120)
    client = SwarmClient(Invite.parse(founder.invite), settings, tmp_path / "state")
    registry = founder.node.swarm.registry

    async def steps() -> list[int]:
        trainers = await registry.trainers(await registry.trainer_ids())
        return [trainer.step for trainer in trainers.values() if trainer.renew_every_s == 120]

    try:
        wait_until(lambda: founder.loop.run(steps(), 120) == [0], "the trainer in the swarm")
        client.note(
            Progress(
                step=1, steps=9, epoch=0.1, loss=2.5, validation_loss=None, perplexity=None, bits_per_byte=None,
                tokens_per_s=100.0, step_s=0.1, left_s=0.8, in_flight=1, staleness=0, load_cv=None,
                load_max_over_mean=None,
            )
        )  # fmt: skip
        wait_until(lambda: founder.loop.run(steps(), 120) == [1], "its first step in the swarm")
    finally:
        client.close()


def test_who_only_reads_is_no_trainer(founder: Founder, tmp_path: Path) -> None:
    invite = Invite.parse(founder.invite)
    client = SwarmClient(invite, TrainerSettings(), tmp_path / "reader", reads_only=True)
    client.close()
    assert not founder.loop.run(founder.node.swarm.registry.trainer_ids(), 120)

    client = SwarmClient(invite, TrainerSettings(), tmp_path / "trainer")
    try:
        wait_until(
            lambda: bool(founder.loop.run(founder.node.swarm.registry.trainer_ids(), 120)),
            "the trainer in the swarm",
        )
    finally:
        client.close()
