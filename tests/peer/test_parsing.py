"""When a parser fails on a stranger's message, the message counts as absent; one log line and a metric report it."""

import logging

import pytest

from peer.errors import RecordError, StateError, WireError
from peer.metrics import totals
from peer.parsing import ParseGuard


def broken() -> int:
    raise TypeError("of 'int' and \x1b[31mNone\n" + "x" * 10_000)


def refusing() -> int:
    raise RecordError("too long")


def test_what_a_parser_returns_comes_through() -> None:
    assert ParseGuard().read("node", "QmA", lambda: 7) == 7


def test_a_parser_that_fails_is_one_short_line_for_each_peer_and_counts_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    guard = ParseGuard()
    for writer in ("QmA", "QmA", "Qm\nB", "QmA"):
        assert guard.read("node", writer, broken) is None
    assert guard.read("state", "QmA", broken) is None
    counted = totals(guard.failures, "message")
    assert (counted["node"], counted["state"], counted["trainer"]) == (4, 1, 0)
    first, second = caplog.messages
    assert ("QmA wrote (node)" in first, "Qm B wrote (node)" in second) == (True, True)
    for line in (first, second):
        assert line.isprintable()
        assert len(line) < 400


def test_what_a_parser_refuses_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    guard = ParseGuard()
    assert guard.read("node", "QmA", refusing) is None
    assert not any(totals(guard.failures, "message").values())
    assert not caplog.messages


@pytest.mark.parametrize(
    "error", [EOFError(), RecursionError(), MemoryError(), OverflowError(), KeyError("a")]
)
def test_a_caller_that_handles_refusals_gets_its_own(error: Exception) -> None:
    guard = ParseGuard()
    with pytest.raises(StateError, match=type(error).__name__), guard.guarding("state", "QmA", StateError):
        raise error
    with pytest.raises(WireError, match="its own"), guard.guarding("state", "QmA", StateError):
        raise WireError("its own")


def test_failures_are_logged_for_a_bounded_number_of_peers() -> None:
    guard = ParseGuard()
    logging.getLogger("peer.parsing").disabled = True
    try:
        for number in range(3000):
            assert guard.read("dht", number, broken) is None
    finally:
        logging.getLogger("peer.parsing").disabled = False
    assert len(guard._logged) == 1024
