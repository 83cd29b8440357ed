"""A trainer's record has what was measured, and no figure for what was not."""

import math
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from test_latencies import peer

from dht.announcements import FAILURE_CAUSES, Latency, TrainerInfo, read_trainer
from peer.wire import records_pb2
from trainer_client.announcer import TrainingMetrics, trainer_record
from trainer_client.dispatch.calls import DispatchMetrics
from trainer_client.dispatch.policy import Latencies
from trainer_client.settings import TrainerSettings
from trainer_client.training.record import Progress


def progress(**changes: Any) -> Progress:
    values: dict[str, Any] = {
        "step": 5, "steps": 9, "epoch": 0.1, "loss": 2.5, "validation_loss": None, "perplexity": None,
        "bits_per_byte": None, "tokens_per_s": 100.0, "step_s": 0.1, "left_s": 0.4, "in_flight": 1,
        "staleness": 0, "load_cv": None, "load_max_over_mean": None,
    }  # fmt: skip
    return Progress(**values | changes)


def note(training: TrainingMetrics, seen: Progress) -> None:
    training.note_step(seen.step, seen.loss, seen.tokens_per_s)
    if seen.validation_loss is not None:
        training.note_validation(seen.validation_loss, seen.bits_per_byte)


def said(
    *seen: Progress,
    calls: DispatchMetrics | None = None,
    latencies: Latencies | None = None,
    **settings: Any,
) -> TrainerInfo:
    """What others read after these steps."""
    training, values = TrainingMetrics(), TrainerSettings.load(**settings)
    for step in seen:
        note(training, step)
    record = trainer_record(
        values, 1000.0, "", training, calls or DispatchMetrics(), latencies or Latencies(), values.steps
    )
    info = read_trainer(records_pb2.RecordPayload(trainer=record, expires_at=2000.0), peer(1))
    assert info is not None
    return info


def test_before_the_first_step_nothing_is_said_of_it() -> None:
    info = said(steps=77)
    assert (info.step, info.steps, info.loss, info.tokens_per_s) == (0, 77, None, None)
    assert (info.forward, info.backward, info.failures, info.started_at) == (None, None, {}, 1000.0)


def test_what_was_measured_is_said() -> None:
    latencies, calls = Latencies(), DispatchMetrics()
    latencies.calls["forward"].add(0.25)
    latencies.note_node(peer(2), 0.25, 0.0)
    calls.calls.inc(4)
    calls.failures.labels("deadline_exceeded").inc(3)
    calls.bytes.labels("sent").inc(10)
    calls.bytes.labels("received").inc(20)
    steps = progress(step=4, validation_loss=1.5, bits_per_byte=2.0), progress()
    info = said(*steps, calls=calls, latencies=latencies, name="Aino", steps=9, announce_every_s=2.0)
    assert (info.name, info.step, info.steps, info.loss, info.renew_every_s) == ("Aino", 5, 9, 2.5, 2.0)
    assert info.bits_per_byte == pytest.approx(2.0)
    assert (info.forward, info.backward) == (Latency(0.25, 0.25), None)
    assert info.node_latency_s == {peer(2): 0.25}
    assert (info.calls, info.bytes_sent, info.bytes_received) == (4, 10, 20)
    assert info.failures == {"deadline_exceeded": 3}


def test_a_loss_that_is_not_finite_is_not_said() -> None:
    info = said(progress(loss=math.nan, validation_loss=math.inf, bits_per_byte=math.inf))
    assert (info.loss, info.validation_loss, info.bits_per_byte) == (None, None, None)


def test_metrics_name_no_peer_and_no_unknown_cause() -> None:
    registry = CollectorRegistry()
    calls = DispatchMetrics(registry)
    note(TrainingMetrics(registry), progress())
    calls.call_seconds.labels("backward").observe(0.25)
    calls.failures.labels("unavailable").inc()
    text = generate_latest(registry).decode()
    assert 'talkoot_trainer_failures_total{cause="unavailable"} 1.0' in text
    assert 'talkoot_trainer_call_seconds_bucket{direction="backward",le="0.25"} 1.0' in text
    assert "talkoot_trainer_steps_total 5.0" in text
    assert peer(2).to_base58() not in text
    assert "unavailable" in FAILURE_CAUSES


def test_metrics_tell_of_hedges_checks_bans_and_what_the_codec_saved() -> None:
    registry = CollectorRegistry()
    calls = DispatchMetrics(registry)
    calls.hedged_calls.inc(3)
    calls.hedges_won.inc(2)
    calls.spot_checks.labels("failed").inc(5)
    calls.checked_rows.inc(6)
    calls.banned.set_function(lambda: 4)
    calls.bytes.labels("sent").inc(25)
    calls.fp32_bytes.labels("sent").inc(100)
    calls.fp32_bytes.labels("received").inc(8)
    for name, labels, value in (
        ("hedged_calls_total", {}, 3), ("hedges_won_total", {}, 2), ("checked_rows_total", {}, 6),
        ("spot_checks_total", {"outcome": "failed"}, 5), ("banned", {}, 4),
        ("bytes_total", {"direction": "sent"}, 25),
        ("fp32_bytes_total", {"direction": "sent"}, 100), ("fp32_bytes_total", {"direction": "received"}, 8),
    ):  # fmt: skip
        assert registry.get_sample_value(f"talkoot_trainer_{name}", labels) == value, name


def test_a_loop_of_ones_own_does_not_look_stuck_before_it_reports_a_step() -> None:
    registry = CollectorRegistry()
    own = TrainingMetrics(registry, takes_steps=False)
    assert registry.get_sample_value("talkoot_trainer_steps_total") is None
    note(own, progress(step=4))
    note(own, progress(step=6))
    assert registry.get_sample_value("talkoot_trainer_steps_total") == 6
    TrainingMetrics(stuck := CollectorRegistry())
    assert stuck.get_sample_value("talkoot_trainer_steps_total") == 0


def test_what_is_not_known_before_the_first_step_is_a_gap() -> None:
    registry = CollectorRegistry()
    training = TrainingMetrics(registry)
    for name in ("loss_nats", "tokens_per_second", "validation_loss_nats", "validation_bpb"):
        assert math.isnan(registry.get_sample_value(f"talkoot_trainer_{name}") or 0.0), name
    note(training, progress(step=1))
    note(training, progress(step=3))
    assert registry.get_sample_value("talkoot_trainer_steps_total") == 3
    assert registry.get_sample_value("talkoot_trainer_loss_nats") == 2.5
    assert math.isnan(registry.get_sample_value("talkoot_trainer_validation_bpb") or 0.0)
