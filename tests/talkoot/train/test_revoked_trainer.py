"""A trainer whose token has expired or is revoked is told so, and not that there are no experts."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import wait_until
from training_swarm import Founder, founded

from dht.admission import Role, make_token
from dht.invites import Invite
from dht.manifest import AdmissionSpec
from peer.errors import ExpiredInviteError, RevokedInviteError
from peer.loop import LoopThread
from trainer_client.client import SwarmClient
from trainer_client.settings import TrainerSettings

SERIAL = 7
LIFETIME_S = 3600


@pytest.fixture(scope="module")
def village(loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Founder]:
    by_token = {"admission": AdmissionSpec(mode="token")}
    with founded(loop, tmp_path_factory.mktemp("founder"), experts=8, parts=by_token) as founder:
        yield founder


def invite_of(village: Founder, serial: int) -> Invite:
    """An invite for a trainer, with a token."""
    swarm = village.node.swarm
    token = make_token(
        swarm.host.identity, swarm.keys.swarm_id, Role.TRAINER, time.time() + LIFETIME_S, serial
    )
    return replace(Invite.parse(village.invite), token=token.SerializeToString())


def revoke(village: Founder, serial: int) -> None:
    """Returns when the token is revoked, and the node is about to end the sessions of those who have it."""
    village.loop.run(village.node.swarm.revocations.publish([serial]), 60)
    village.loop.loop.call_soon_threadsafe(village.node.sessions.recheck)


def test_a_revoked_trainer_is_told_why_no_node_answers(
    village: Founder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer_client.client._CHECK_EVERY_S", 0.5)
    with SwarmClient(invite_of(village, 7), TrainerSettings(), tmp_path) as client:
        client.wait_for_experts(60, lambda text: None)
        with monkeypatch.context() as patches:
            patches.setattr(client.swarm.admission, "_now", lambda: time.time() + LIFETIME_S)
            with pytest.raises(ExpiredInviteError, match="the token has expired"):
                client.wait_for_experts(60, lambda text: None, share=2)
        revoke(village, 7)
        wait_until(lambda: 7 in client.swarm.admission.revoked, "the trainer to read what is revoked")
        with pytest.raises(RevokedInviteError, match="because of your invite: the token was revoked"):
            client.wait_for_experts(60, lambda text: None, share=2)


def test_a_trainer_looks_whether_it_is_revoked_as_soon_as_a_node_refuses_it(
    village: Founder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer_client.client._CHECK_EVERY_S", 3600)
    with SwarmClient(invite_of(village, 8), TrainerSettings(), tmp_path) as client:
        client.wait_for_experts(60, lambda text: None)
        revoke(village, 8)
        assert client.has_experts(), "it has not heard of it"
        client.mixture(0)(torch.randn(1, 4, client.manifest.model.hidden))
        with pytest.raises(RevokedInviteError, match="the token was revoked"):
            client.has_experts()


def test_a_loop_of_ones_own_is_told_too(
    village: Founder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer_client.client._CHECK_EVERY_S", 3600)
    with SwarmClient.join(str(invite_of(village, 9)), state=tmp_path) as client:
        mixture, x = client.mixture(0), torch.randn(1, 4, client.manifest.model.hidden)
        mixture(x)
        with monkeypatch.context() as patches:
            patches.setattr(client.swarm.admission, "_now", lambda: time.time() + LIFETIME_S)
            with pytest.raises(ExpiredInviteError, match=r"has expired\. Ask .* join again with it"):
                mixture(x)
        revoke(village, 9)
        mixture(x)  # a node refuses it
        with pytest.raises(RevokedInviteError, match="the token was revoked"):
            mixture(x)
