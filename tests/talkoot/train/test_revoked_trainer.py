"""A trainer whose token has expired or is revoked is told so, and not that there are no experts."""

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
from peer.errors import ExpiredInviteError, RevokedInviteError
from peer.loop import LoopThread
from trainer_client.client import SwarmClient
from trainer_client.settings import TrainerSettings

SERIAL = 7


def test_a_revoked_trainer_is_told_why_no_node_answers(
    loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer_client.client._CHECK_EVERY_S", 0.5)
    by_token = {"admission": AdmissionSpec(mode="token")}
    with founded(loop, tmp_path / "founder", experts=8, parts=by_token) as founder:
        swarm = founder.node.swarm
        token = make_token(
            swarm.host.identity, swarm.keys.swarm_id, Role.TRAINER, time.time() + 3600, SERIAL
        ).SerializeToString()
        invite = replace(Invite.parse(founder.invite), token=token)
        with SwarmClient(invite, TrainerSettings(), tmp_path / "trainer") as client:
            client.wait_for_experts(60, lambda text: None)
            with monkeypatch.context() as patches:
                patches.setattr(client.swarm.admission, "_now", lambda: time.time() + 3600)
                with pytest.raises(ExpiredInviteError, match="the token has expired"):
                    client.wait_for_experts(60, lambda text: None, share=2)
            loop.run(swarm.revocations.publish([SERIAL]), 60)
            wait_until(
                lambda: SERIAL in client.swarm.admission.revoked, "the trainer to read what is revoked"
            )
            with pytest.raises(RevokedInviteError, match="because of your invite: the token was revoked"):
                client.wait_for_experts(60, lambda text: None, share=2)


def test_a_trainer_looks_whether_it_is_revoked_as_soon_as_a_node_refuses_it(
    loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer_client.client._CHECK_EVERY_S", 3600)
    by_token = {"admission": AdmissionSpec(mode="token")}
    with founded(loop, tmp_path / "founder", experts=8, parts=by_token) as founder:
        swarm = founder.node.swarm
        token = make_token(
            swarm.host.identity, swarm.keys.swarm_id, Role.TRAINER, time.time() + 3600, SERIAL
        ).SerializeToString()
        invite = replace(Invite.parse(founder.invite), token=token)
        with SwarmClient(invite, TrainerSettings(), tmp_path / "trainer") as client:
            client.wait_for_experts(60, lambda text: None)
            loop.run(swarm.revocations.publish([SERIAL]), 60)
            loop.loop.call_soon_threadsafe(founder.node.sessions.recheck)
            assert client.has_experts(), "it has not heard of it"
            client.mixture(0)(torch.randn(1, 4, client.manifest.model.hidden))
            with pytest.raises(RevokedInviteError, match="the token was revoked"):
                client.has_experts()
