"""What a swarm sees of a trainer while it trains."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import wait_until
from training_swarm import Founder, founded

from dht.announcements import TrainerInfo
from dht.invites import Invite
from peer.errors import StartError
from peer.loop import LoopThread
from peer.transport.addresses import Multiaddress
from peer.transport.endpoints import Endpoint
from trainer_client.client import SwarmClient
from trainer_client.settings import TrainerSettings
from trainer_client.training.record import Progress, Validation


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


def test_a_validation_is_heard_of_before_the_first_step(founder: Founder, tmp_path: Path) -> None:
    settings = TrainerSettings.load(announce_every_s=120)
    registry = founder.node.swarm.registry

    async def validation_losses() -> list[float | None]:
        trainers = await registry.trainers(await registry.trainer_ids())
        return [trainer.validation_loss for trainer in trainers.values() if trainer.renew_every_s == 120]

    with SwarmClient(Invite.parse(founder.invite), settings, tmp_path / "state") as client:
        client.note_validation(Validation(step=0, loss=5.5, perplexity=244.7, bits_per_byte=7.9))
        wait_until(lambda: founder.loop.run(validation_losses(), 120) == [5.5], "its validation in the swarm")


def test_a_loop_of_ones_own_reports_and_leaves_its_result(
    founder: Founder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Here it may take longer than the two seconds that a leaving trainer has.
    monkeypatch.setattr("trainer_client.announcer._WITHDRAW_S", 60.0)

    registry = founder.node.swarm.registry

    async def records() -> list[TrainerInfo]:
        found = await registry.trainers(await registry.trainer_ids(), with_left=True)
        return [trainer for trainer in found.values() if trainer.name == "mine"]

    def is_said(step: int, left: bool) -> bool:
        return [(found.step, found.left) for found in founder.loop.run(records(), 120)] == [(step, left)]

    with SwarmClient.join(founder.invite, name="mine", state=tmp_path / "state") as client:
        client.report(3, 2.5, tokens_per_s=10.0)
        wait_until(lambda: is_said(3, False), "its steps in the swarm")
        # the announcements would fail again and again
        for step in (-1, 2**63, 3.5):
            with pytest.raises((ValueError, TypeError)):
                client.report(step, 2.0)  # type: ignore[arg-type]  # what a loop of one's own may say
        with pytest.raises(TypeError, match="pass the step as a whole number, and not 'x'"):
            client.report("x", 2.0)  # type: ignore[arg-type]  # so too
        for loss in ("x", "2.0", None, torch.ones(3)):
            with pytest.raises(TypeError, match="pass the loss as a number or as a tensor with one element"):
                client.report(4, loss)  # type: ignore[arg-type]  # so too
        with pytest.raises(TypeError, match=r"pass validation_loss as a number .*, and not 'x'"):
            client.report(4, 2.5, validation_loss="x")  # type: ignore[arg-type]  # so too
        with warnings.catch_warnings(action="error"):  # torch warns if a number keeps its graph
            loss = torch.tensor(2.25, requires_grad=True)
            client.report(4, loss, validation_loss=2.0)  # type: ignore[arg-type]  # so too
    wait_until(lambda: is_said(4, True), "its farewell in the swarm")
    (found,) = founder.loop.run(records(), 120)
    assert (found.is_own_loop, found.loss, found.validation_loss) == (True, 2.25, 2.0)
    assert (found.bits_per_byte, found.tokens_per_s) == (None, None)


def test_your_own_loop_can_join_through_another_node(founder: Founder, tmp_path: Path) -> None:
    invite = Invite.parse(founder.invite)
    silent = replace(invite, bootstrap=(Multiaddress.of(Endpoint("127.0.0.1:9"), invite.keys.author),))
    with SwarmClient.join(str(silent), bootstrap=[founder.invite], state=tmp_path / "state") as client:
        assert client.manifest == founder.node.swarm.manifest


def test_a_mixture_whose_client_is_closed_says_so(founder: Founder, tmp_path: Path) -> None:
    with SwarmClient.join(founder.invite, state=tmp_path / "state") as client:
        mixture = client.mixture(layer=0)
        output = mixture(torch.randn(2, client.manifest.model.hidden))
    for use in (lambda: mixture(output), output.sum().backward, client.memory):
        with pytest.raises(RuntimeError, match="this SwarmClient is closed"):
            use()


def test_joining_with_what_is_no_invite_says_what_to_pass(tmp_path: Path) -> None:
    for wrong in (None, 5, b"talkoot2"):
        with pytest.raises(TypeError, match=f"pass the invite as text, .*, and not {wrong!r}"):
            SwarmClient.join(wrong, state=tmp_path)  # type: ignore[arg-type]  # what a beginner may pass


def test_joining_again_says_to_close_the_first_client(founder: Founder, tmp_path: Path) -> None:
    with (
        SwarmClient.join(founder.invite, state=tmp_path / "state"),
        pytest.raises(StartError, match=r"close that SwarmClient first \(`swarm.close\(\)`\)"),
    ):
        SwarmClient.join(founder.invite, state=tmp_path / "state")


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
