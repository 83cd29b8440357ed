"""What a trainer does if nobody answers."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from peer.errors import UnavailableError
from trainer_client import client
from trainer_client.client import SwarmClient


def make_client(live: list[int]) -> tuple[SwarmClient, list[float]]:
    """A client that sees these numbers of live experts, one in each look, and a list of its waits."""
    waits: list[float] = []
    made: Any = SimpleNamespace(
        dispatcher=SimpleNamespace(live_experts=lambda: live.pop(0)),
        manifest=SimpleNamespace(experts_total=4),
        settings=SimpleNamespace(wait_for_experts_s=60.0),
        wait_for_any=lambda limit_s, consequence, warns: waits.append(limit_s),
        require_admitted=lambda: None,
        _waits=0,
    )
    return cast(SwarmClient, made), waits


def test_experts_that_are_announced_and_never_answer_are_not_waited_for_without_end() -> None:
    made, waits = make_client([0] * 100)
    for _ in range(client._MOST_WAITS):
        assert not SwarmClient.has_experts(made)
    with pytest.raises(UnavailableError, match="8 times in a row none of them answered"):
        SwarmClient.has_experts(made)
    assert waits == [60.0] * client._MOST_WAITS
    assert not SwarmClient.has_experts(made, 5.0)  # who asks again may wait again
    assert waits[-1] == 5.0


def test_an_answer_ends_the_row() -> None:
    seen = [0, 0, 0, 3] * client._MOST_WAITS
    made, waits = make_client(list(seen))
    assert [SwarmClient.has_experts(made) for _ in seen] == [bool(live) for live in seen]
    assert len(waits) == 3 * client._MOST_WAITS


def test_a_pause_of_a_moment_causes_no_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A node that failed one call is not called for some seconds, although it answers."""
    clock = [0.0]
    monkeypatch.setattr("trainer_client.client.time.monotonic", lambda: clock[0])
    refusal = [""]

    def waited(seconds: float) -> bool:
        def wait_for_experts(limit_s: float, report: Callable[[str], None], share: float) -> None:
            for _ in range(int(2 * seconds)):
                report("waiting for experts")
                clock[0] += 0.5

        made: Any = SimpleNamespace(
            dispatcher=SimpleNamespace(refusal=lambda: refusal[0]),
            manifest=SimpleNamespace(experts_total=4),
            wait_for_experts=wait_for_experts,
        )
        return SwarmClient.wait_for_any(cast(SwarmClient, made), 60.0, "training pauses")

    assert not waited(4.0)
    assert not caplog.messages
    assert waited(20.0)
    assert caplog.messages == ["no expert answers: training pauses until one answers, at most 60 s"]
    caplog.clear()
    refusal[0] = "the token was revoked"
    assert waited(20.0)
    assert caplog.messages == [
        "nodes refuse your calls (the token was revoked): training pauses until one answers, at most 60 s"
    ]
