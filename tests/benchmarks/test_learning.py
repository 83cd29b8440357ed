"""The parts of `benchmarks.learning`: the faults are real and seeded, and three trainers share the same data."""

import asyncio
import threading
from collections import Counter

import pytest
import torch
from expert_fakes import (
    FakeSwarm,
    Request,
    collect,
    make_call,
    make_manifest,
    make_node,
    random_rows,
    virtual_time,
)
from rich.console import Console

from benchmarks.faults import FaultyCaller
from benchmarks.learning import (
    QUICK,
    QUICK_WAYS,
    WAYS,
    Part,
    Plan,
    loss_of,
    make_training,
    show,
    text_of_python,
)
from dht.manifest import Manifest
from talkoot.train.local import LocalSwarm
from trainer_client.model import LanguageModel
from trainer_client.settings import TrainerSettings

CALLS = 200


def fates(seed: int) -> tuple[list[str], int]:
    """How each of many calls ended, and how many reached the node."""
    swarm = FakeSwarm(make_manifest((1,)))
    (uid,) = swarm.manifest.uids()
    request = Request(uid, [2], [0, 1], random_rows(2))
    call = make_call(make_node(swarm.peer_of[uid]), "forward", [request], 9.0)

    async def scenario() -> list[str]:
        time = asyncio.get_running_loop().time
        caller, seen = FaultyCaller(swarm, 1.0, 0.1, seed), []
        for _ in range(CALLS):
            began = time()
            collected = await collect(caller, call)
            seen.append(collected.status.name if collected.status else f"{len(collected.answered)} answer")
            assert time() - began == pytest.approx(1.0)
        assert caller.failed == seen.count("UNAVAILABLE")
        return seen

    with virtual_time() as runner:
        return runner.run(scenario()), len(swarm.calls)


def test_calls_come_late_and_one_in_ten_fails_half_of_them_after_the_node_has_answered() -> None:
    seen, reached = fates(seed=0)
    counts = Counter(seen)
    assert counts.keys() == {"1 answer", "UNAVAILABLE"}
    assert 0.05 * CALLS < counts["UNAVAILABLE"] < 0.15 * CALLS
    lost_on_the_way_back = reached - counts["1 answer"]
    assert 0.2 < lost_on_the_way_back / counts["UNAVAILABLE"] < 0.8


def test_quick_runs_what_has_a_target_and_no_more() -> None:
    aimed_at = {name for name, way in WAYS.items() if way.target is not None}
    assert set(QUICK_WAYS) == {"local"} | aimed_at
    assert QUICK.steps * QUICK.batch < Plan().steps * Plan().batch / 10
    assert QUICK.nodes > 1, "a swarm"


@pytest.mark.slow
def test_faults_follow_from_their_seed() -> None:
    assert fates(seed=1) == fates(seed=1)
    assert fates(seed=1) != fates(seed=2)


def test_three_trainers_see_each_sequence_of_a_batch_once() -> None:
    text, plan = text_of_python(), Plan()
    whole = Part(text, plan.context, 0, 1).batch(3, plan.batch)
    parts = [Part(text, plan.context, trainer, 3).batch(3, plan.batch) for trainer in range(3)]
    assert {len(part) for part in parts} == {plan.batch // 3}
    assert sorted(map(tuple, torch.cat(parts).tolist())) == sorted(map(tuple, whole.tolist()))


def test_a_trainer_learns() -> None:
    plan = Plan(steps=30, batch=2, hidden=16, context=16)
    model = {"layers": 1, "hidden": 16, "heads": 2, "context": 16, "feed_forward": 16}
    experts = {"experts": {"grid": [2]}, "routing": {"top_k": 1}}
    manifest = Manifest.model_validate({"name": "learning", "model": model} | experts)
    learner = LanguageModel(manifest, LocalSwarm(manifest, TrainerSettings(seed=0)).mixture)
    data = Part(text_of_python(), plan.context, 0, 1)
    before = loss_of(learner, plan, data)
    summary = make_training(learner, plan, data).run(lambda progress: None, threading.Event())
    assert summary.steps == 30
    assert loss_of(learner, plan, data) < before - 0.3


def test_the_table_says_what_was_reached(capsys: pytest.CaptureFixture[str]) -> None:
    losses = {"local": 2.0, "swarm": 2.1, "int8": 2.2}
    results = {"plan": {"delay_s": 1.0}, "tokens": 1000} | {
        way: {"validation_loss": loss, "seconds": 1.0} for way, loss in losses.items()
    }
    show(results | {"swarm_vs_local": 1.05, "int8_vs_local": 1.1}, Console(width=110))
    shown = capsys.readouterr().out
    assert "1.0500" in shown
    assert "at most 1.01: missed" in shown
    assert "1.1000" in shown
