"""Exporting a model as users do it: the folder contains what the swarm's nodes and trainers have."""

import asyncio
import contextlib
import json
import logging
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byte_texts import byte_dataset
from real_swarm import eventually
from training_swarm import HOST, MANIFEST, TEXT, Founder, founded, node_settings, talkoot

from dht.admission import Role, make_token, new_serial, read_grant
from dht.announcements import ReplicaState
from dht.beam_search import Selection
from dht.directory import LiveExperts
from dht.invites import Invite
from dht.manifest import AdmissionSpec, WireSpec
from dht.swarm import join_swarm
from dht.uid import UID
from expert_server.experts.format import BLOCK
from expert_server.node import Node
from peer import clock
from peer.codec import Integers
from peer.errors import ModelError, RevokedInviteError, SettingsError, StartError
from peer.host import NetworkConfig
from peer.identity import Identity, PeerID
from peer.loop import LoopThread
from peer.wire import admission_pb2
from talkoot.model.experts import SwarmExperts, TakenExpert
from talkoot.model.export import ExportPlan
from talkoot.model.folder import FolderWriter, ModelFolder
from talkoot.model.opened import open_model
from talkoot.signals import Stopped
from trainer_client.client import SwarmClient
from trainer_client.dispatch.batches import ForwardPass, RoutedRows
from trainer_client.inference import evaluate
from trainer_client.model import LanguageModel
from trainer_client.moe import RemoteMixtureOfExperts
from trainer_client.settings import TrainerSettings
from trainer_client.training.loop import Training

LIMIT_S = 120.0
SHORT = TEXT[: len(TEXT) // 3]


@pytest.fixture(scope="module")
def founder(loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Founder]:
    with founded(loop, tmp_path_factory.mktemp("founder"), experts=8) as running:
        yield running


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sauna.txt"
    path.write_text(SHORT)
    return path


@pytest.fixture(scope="module")
def state(founder: Founder, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state folder of a trainer that has done two steps."""
    state = tmp_path_factory.mktemp("trained")
    train = ("train", "--join", founder.invite, "--state", state, "--batch-size", 2, "--threads", 1)
    ended = talkoot(*train, "--call-deadline-s", 60, "--data", text, "--steps", 2)
    assert ended.status == 0, ended.err
    return state


def export(founder: Founder, out: Path, *options: object) -> tuple[object, ...]:
    return ("export", "--join", founder.invite, "-o", out, "--wait-for-experts", 0, *options)


def assert_has_the_experts_of(founder: Founder, folder: ModelFolder, uids: frozenset[UID]) -> None:
    assert folder.live == uids
    for uid in uids:
        expert = founder.node.runtime.experts[uid]
        now = founder.loop.run(founder.node.runtime.run(expert.export_state), 60)
        for name, tensor in folder.expert(uid).items():
            assert torch.equal(tensor, now[BLOCK + name]), f"{name} of {uid}"


def test_a_folder_has_the_experts_of_the_nodes_and_the_dense_part_of_a_run(
    founder: Founder, state: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    out = tmp_path / "model"
    ended = talkoot(
        *export(founder, out, "--resume", "--state", state, "--data-note", "sauna talk", "--json")
    )
    assert ended.status == 0, ended.err
    assert re.search(r"fetching experts: \d of 8, .*/s\n", caplog.text)
    assert "layer 1 is complete: 4 experts" in caplog.text
    values = json.loads(ended.out.splitlines()[-1])
    assert (values["folder"], values["experts"], values["experts_total"]) == (str(out), 8, 8)
    assert_has_the_experts_of(founder, ModelFolder.open(out), frozenset(MANIFEST.uids()))
    assert not list(tmp_path.glob("*.partial"))
    opened = open_model(out)
    tokens = opened.tokenizer.encode(SHORT)
    here = evaluate(opened.model, tokens, opened.tokenizer.token_bytes, 8)
    there = talkoot("evaluate", text, "--join", founder.invite, "--state", state, "--json")
    assert here.loss == pytest.approx(json.loads(there.out.splitlines()[-1])["loss"], abs=0.02)
    card = (out / "README.md").read_text()
    assert "sauna talk" in card
    assert "on its trainer's text, measured after step 2 |" in card
    assert "a smear over that time" in card
    assert card.index("pip install torch transformers") < card.index("from transformers import")
    sources = json.loads((out / "replicas.json").read_text())
    assert sources.keys() == {str(uid) for uid in MANIFEST.uids()}
    experts = founder.node.runtime.experts
    for uid in MANIFEST.uids():
        assert sources[str(uid)]["updates"] == experts[uid].update_count
        assert list(sources[str(uid)]["replicas"]) == [founder.node.swarm.host.peer_id.to_base58()]


@contextlib.contextmanager
def training(founder: Founder, state: Path, **options: Any) -> Iterator[Training]:
    """A trainer that has done three steps and serves its dense part."""
    settings = TrainerSettings.load(
        steps=3,
        batch_size=2,
        validation_batches=2,
        check_share=0,
        call_deadline_s=60,
        **options,
    )
    with SwarmClient(Invite.parse(founder.invite), settings, state) as client:
        client.wait_for_experts(LIMIT_S, lambda text: None, share=1 / client.manifest.experts_total)
        dataset = byte_dataset(TEXT.encode(), client.manifest.model.context, 1)
        make = partial(LanguageModel, client.manifest, client.mixture)
        run = Training(make(), dataset, client.settings, make)
        run.run(lambda progress: None, threading.Event())
        client.average(run.part, "", client.settings.router)  # which announces at once how old the part is
        deadline = time.monotonic() + LIMIT_S
        while client.run(_age_of(client)) < run.part.age:
            assert time.monotonic() < deadline, "its record does not say its age"
            time.sleep(0.1)
        yield run


async def _age_of(client: SwarmClient) -> int:
    swarm = client.swarm
    trainers = await swarm.registry.trainers([swarm.host.peer_id])
    return max((trainer.dense_age for trainer in trainers.values()), default=0)


@pytest.mark.parametrize("router", ["product-key", pytest.param("noisy-top-k", marks=pytest.mark.slow)])
def test_without_a_run_a_live_trainer_gives_the_dense_part_whatever_it_routes_by(
    founder: Founder, tmp_path: Path, router: str
) -> None:
    with training(founder, tmp_path / "trainer", router=router) as run:
        ended = talkoot(*export(founder, tmp_path / "model"))
        assert ended.status == 0, ended.err
        now = run.part.read().tensors
    folder = ModelFolder.open(tmp_path / "model")
    assert folder.routing.router == router
    dense = folder.dense()
    assert all(torch.equal(dense[name], tensor) for name, tensor in now.items())
    card = (tmp_path / "model" / "README.md").read_text()
    assert "with those averaged in from other trainers | 3 |" in card


def test_without_a_run_and_a_trainer_it_says_what_to_pass(founder: Founder, tmp_path: Path) -> None:
    ended = talkoot(*export(founder, tmp_path / "model"))
    ended.is_one_clear_line("no running trainer", "--resume", "--checkpoint", "[T118]")
    assert not (tmp_path / "model").exists()


def test_on_a_full_disk_it_stops_fetching_before_it_leaves(
    founder: Founder, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise each fetch that is under way ends with a warning of its own."""
    ended, fetch_each, close = list[str](), SwarmExperts.each, SwarmExperts.close

    def each(self: SwarmExperts, *given: Any) -> Iterator[Any]:
        try:
            yield from fetch_each(self, *given)
        finally:
            ended.append("fetching")

    async def closing(self: SwarmExperts) -> None:
        ended.append("leaving")
        await close(self)

    def full(self: FolderWriter, layer: int, experts: Iterator[Any]) -> None:
        next(experts)
        raise ModelError("No space left on device")

    monkeypatch.setattr(SwarmExperts, "each", each)
    monkeypatch.setattr(SwarmExperts, "close", closing)
    monkeypatch.setattr(FolderWriter, "write_layer", full)
    talkoot(*export(founder, tmp_path / "model", "--resume", "--state", state)).is_one_clear_line("No space")
    assert ended == ["fetching", "leaving"]


def test_a_folder_that_exists_is_left_alone(founder: Founder, state: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    ended = talkoot(*export(founder, tmp_path, "--resume", "--state", state))
    ended.is_one_clear_line("exists", "a new or empty folder")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_that_cannot_be_written_is_told_before_it_joins(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StartError, match=r"can't write .*/file/new/model: .*; pass another -o DIR"):
        ExportPlan(tmp_path / "file" / "new" / "model").check()
    ExportPlan(tmp_path / "new" / "model").check()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_current_folder_is_no_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=r"^\. exists: pass the path of a new or empty folder$"):
        ExportPlan(Path()).check()


def test_an_export_that_was_stopped_goes_on_and_fetches_no_layer_again(
    founder: Founder, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, given = tmp_path / "model", ("--resume", "--state", state, "--json")
    whole = json.loads(talkoot(*export(founder, tmp_path / "whole", *given)).out.splitlines()[-1])
    with monkeypatch.context() as patch:
        patch.setattr("talkoot.model.export.model_card", _stop)
        assert talkoot(*export(founder, out, *given)).status == 128 + signal.SIGINT
    assert not out.exists()
    partial_folder = tmp_path / "model.partial"
    second = sorted(partial_folder.glob("model-*.safetensors"))[2]
    second.unlink()
    again = talkoot(*export(founder, out, *given))
    assert again.status == 0, again.err
    assert not partial_folder.exists()
    # Headers contain the time of saving, and so differ in length.
    assert json.loads(again.out.splitlines()[-1])["bytes"] == pytest.approx(whole["bytes"] / 2, rel=0.05)
    assert_has_the_experts_of(founder, ModelFolder.open(out), frozenset(MANIFEST.uids()))
    assert len(json.loads((out / "replicas.json").read_text())) == 8


def _stop(*_: object) -> None:
    raise Stopped(signal.SIGINT)


def test_the_experts_that_a_text_uses_most_are_kept(
    founder: Founder, state: Path, text: Path, tmp_path: Path
) -> None:
    kept = ("--keep", 0.5, "--keep-by", text)
    ended = talkoot(*export(founder, tmp_path / "model", "--resume", "--state", state, "--json", *kept))
    assert ended.status == 0, ended.err
    values = json.loads(ended.out.splitlines()[-1])
    folder = ModelFolder.open(tmp_path / "model")
    assert [sum(uid.layer == layer for uid in folder.live) for layer in range(2)] == [2, 2]
    opened = open_model(tmp_path / "model")
    tokens = opened.tokenizer.encode(SHORT)
    here = evaluate(opened.model, tokens, opened.tokenizer.token_bytes, 8)
    assert here.loss == pytest.approx(values["loss after leaving experts out"], abs=0.02)
    assert values["loss before leaving experts out"] > 0
    assert "4 of 8 experts were left out" in (tmp_path / "model" / "README.md").read_text()
    talkoot("export", "--join", founder.invite, "-o", tmp_path / "x", "--keep", 0.5).is_one_clear_line(
        "--keep-by"
    )


@contextlib.contextmanager
def killed_node(founder: Founder, folder: Path, experts: int, **changes: Any) -> Iterator[None]:
    """In this block, a second node has just died, and its records still say that it serves."""

    async def begin() -> Node:
        identity = Identity.load_or_create(folder / "second.key")
        swarm = await join_swarm(identity, Invite.parse(founder.invite), NetworkConfig(HOST))
        settings = node_settings(experts, announce_every_s=60, **changes)
        node = await Node.start(settings, swarm, host=HOST, state=folder / "second")
        running = asyncio.create_task(node.run())

        async def is_seen() -> bool:
            return swarm.host.peer_id in await _hosts(founder)

        await eventually(is_seen)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await swarm.host.stop()  # no farewell
        return node

    node = founder.loop.run(begin(), LIMIT_S)
    try:
        yield
    finally:
        founder.loop.run(node.stop(), LIMIT_S)


async def _hosts(founder: Founder) -> set[PeerID]:
    """The nodes that serve an expert, as read from the DHT."""
    experts = founder.node.swarm.experts
    replicas = chain.from_iterable((await experts.replicas(MANIFEST.uids())).values())
    serving = {replica.peer_id for replica in replicas if replica.state is ReplicaState.SERVING}
    return serving & (await experts.registry.nodes(serving)).keys()


def test_experts_that_nobody_hosts_are_named_or_masked(loop: LoopThread, state: Path, tmp_path: Path) -> None:
    with (
        founded(loop, tmp_path, experts=5, name="hamlet", spare=0) as founder,
        training(founder, tmp_path / "trainer"),
    ):
        live = frozenset(founder.node.runtime.experts)
        missing = [uid for uid in MANIFEST.uids() if uid not in live]
        out = tmp_path / "model"
        named = ", ".join(map(str, missing))
        talkoot(*export(founder, out)).is_one_clear_line(f"3 experts of 8 ({named})", "--allow-missing")
        assert not out.exists()
        with killed_node(founder, tmp_path, experts=3):
            talkoot(*export(founder, out)).is_one_clear_line("no host of expert", "--allow-missing")
            assert not out.exists()
            ended = talkoot(*export(founder, out, "--allow-missing"))
        assert ended.status == 0, ended.err
        assert_has_the_experts_of(founder, ModelFolder.open(out), live)
        assert (
            f"host that gave them** and are masked; tokens go to others: {named}."
            in (out / "README.md").read_text()
        )


def test_of_a_host_that_died_another_gives_the_expert(loop: LoopThread, tmp_path: Path) -> None:
    with (
        founded(loop, tmp_path, experts=8, name="village-2", replicas=2) as founder,
        training(founder, tmp_path / "trainer"),
        killed_node(founder, tmp_path, experts=8, replicas=2),
    ):
        ended = talkoot(*export(founder, tmp_path / "model"))
        assert ended.status == 0, ended.err
        assert_has_the_experts_of(founder, ModelFolder.open(tmp_path / "model"), frozenset(MANIFEST.uids()))


def test_in_a_swarm_with_tokens_only_roles_that_the_manifest_names_export(
    loop: LoopThread, tmp_path: Path
) -> None:
    rules = AdmissionSpec(mode="token", export=("reader",))
    with founded(loop, tmp_path, experts=8, name="club", parts={"admission": rules}) as founder:
        trainer, reader = (
            replace(founder, invite=_token(founder, role)) for role in (Role.TRAINER, Role.READER)
        )
        with training(trainer, tmp_path / "trainer"):
            refused = talkoot(*export(trainer, tmp_path / "model"))
            refused.is_one_clear_line(
                "this invite is for a trainer, not for a reader: to export its model, ask"
            )
            looking = talkoot(*export(founder, tmp_path / "model"))
            looking.is_one_clear_line(
                "to export its model, ask its founder for an invite of your own, for a reader."
            )
            ended = talkoot(*export(reader, tmp_path / "model"))
        assert ended.status == 0, ended.err
        assert_has_the_experts_of(founder, ModelFolder.open(tmp_path / "model"), frozenset(MANIFEST.uids()))


@pytest.mark.parametrize("options", [(), pytest.param(("--allow-missing",), marks=pytest.mark.slow)])
def test_who_is_revoked_during_an_export_is_told_and_not_that_hosts_are_gone(
    options: tuple[str, ...], loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = AdmissionSpec(mode="token", export=("reader",))

    async def fetch(experts: SwarmExperts, uid: UID) -> TakenExpert | None:
        """Revokes the reader before the first fetch."""
        await asyncio.wrap_future(loop.submit(founder.node.swarm.revocations.publish([serial])))
        loop.loop.call_soon_threadsafe(founder.node.sessions.recheck)
        return await real(experts, uid)

    real = SwarmExperts.fetch
    monkeypatch.setattr(SwarmExperts, "fetch", fetch)
    with founded(loop, tmp_path, experts=8, name="club-2", parts={"admission": rules}) as founder:
        trainer = replace(founder, invite=_token(founder, Role.TRAINER))
        reader = replace(founder, invite=_token(founder, Role.READER))
        token = admission_pb2.Token.FromString(Invite.parse(reader.invite).token)
        serial = read_grant(token.grant).serial
        with training(trainer, tmp_path / "trainer"):
            ended = talkoot(*export(reader, tmp_path / "model", *options))
    assert ended.status == RevokedInviteError.exit_status
    assert "because of your invite: the token was revoked" in ended.err
    assert not (tmp_path / "model").exists()


def _token(founder: Founder, role: Role) -> str:
    invite, identity = Invite.parse(founder.invite), founder.node.swarm.host.identity
    token = make_token(identity, invite.keys.swarm_id, role, clock.now() + 3600, new_serial())
    return str(replace(invite, token=token.SerializeToString()))


def test_a_folder_computes_what_the_swarm_computes_once_training_has_stopped(
    loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tested on 10,000 tokens, without rounding on the wire."""
    parts = {"wire": WireSpec(codec="fp32")}
    seed = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (625, MANIFEST.model.context), generator=seed)
    choices: list[Integers] = []
    send = RemoteMixtureOfExperts.send

    def recording(
        mixture: RemoteMixtureOfExperts, rows: RoutedRows, selection: Selection, live: LiveExperts
    ) -> ForwardPass:
        choices.append(np.ravel_multi_index(tuple(np.moveaxis(selection.coordinates, -1, 0)), (2, 2)))
        return send(mixture, rows, selection, live)

    def logits(model: torch.nn.Module) -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            found: torch.Tensor = model(tokens)
        return found

    with (
        founded(loop, tmp_path, experts=8, name="exact", parts=parts) as founder,
        training(founder, tmp_path / "trainer") as run,
    ):
        ended = talkoot(*export(founder, tmp_path / "model"))
        assert ended.status == 0, ended.err
        monkeypatch.setattr(RemoteMixtureOfExperts, "send", recording)
        there = logits(run.part.model)
        here = logits(open_model(tmp_path / "model").model)
    ours, theirs = choices[2:], choices[:2]
    same = np.all([(np.sort(a) == np.sort(b)).all(axis=1) for a, b in zip(ours, theirs, strict=True)], axis=0)
    assert same.mean() >= 0.9999
    apart = (here - there).abs() / (1 + there.abs())
    assert apart[torch.from_numpy(same).view(tokens.shape)].max() <= 1e-4
