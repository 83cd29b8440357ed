"""A node's record says what the node does, how fast it is, and when the record will be renewed."""

from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from dht.announcements import Activity
from expert_server.settings import NodeSettings
from expert_server.status import NodeRecordBuilder, NodeState, NodeStatus
from peer.errors import StartError
from peer.metrics import MetricsServer
from peer.wire import records_pb2


def status(rows: int = 0, **changes: Any) -> NodeStatus:
    values: dict[str, Any] = {
        "state": NodeState.SERVING, "experts": 2, "capacity": 3, "adopted": 0, "updates": 4, "rows": rows,
        "queued_rows": 0, "peers": 1, "pause_reason": "", "calls": 0, "uploaded_bytes": 0, "downloaded_bytes": 0,
        "upload_mbit": None, "download_mbit": None, "memory_bytes": 0, "memory_limit_bytes": 1, "busy_s": 0.0,
        "threads": 1, "contributed_rows": 50, "contributed_updates": 60, "contributed_hours": 1.5, "replicated": 0,
        "handed_over": 0,
    }  # fmt: skip
    return NodeStatus(**values | changes)


def describe(
    description: NodeRecordBuilder, now: float, rows: int = 0, activity: Activity = Activity.SERVING
) -> records_pb2.NodeRecord:
    return description.record(
        status(rows),
        activity,
        now,
        addresses=["10.0.0.1:1"],
        metrics_address="10.0.0.1:2",
    )


def description(**settings: Any) -> NodeRecordBuilder:
    return NodeRecordBuilder(NodeSettings.load(**{"announce_every_s": 10.0} | settings), b"pem", 100.0)


def test_it_says_its_name_and_what_it_contributed() -> None:
    record = describe(description(name="kuusi"), 100.0)
    assert (record.name, record.expert_count, record.expert_capacity) == ("kuusi", 2, 3)
    assert (record.contributed_rows, record.contributed_updates, record.contributed_s) == (50, 60, 5400.0)
    assert (list(record.addresses), record.metrics_address, record.started_at) == (
        ["10.0.0.1:1"], "10.0.0.1:2", 100.0,
    )  # fmt: skip


@pytest.mark.parametrize("activity", [Activity.PAUSED, Activity.LEAVING])
def test_a_node_that_does_not_serve_offers_no_room(activity: Activity) -> None:
    record = describe(description(), 100.0, activity=activity)
    assert (record.activity, record.expert_capacity) == (activity.value, 0)


def test_rows_per_second_are_counted_over_some_seconds() -> None:
    described = description()
    assert describe(described, 101.0, rows=10).rows_per_s == 0.0
    assert describe(described, 110.0, rows=50).rows_per_s == 5.0
    assert describe(described, 111.0, rows=90).rows_per_s == 5.0
    assert describe(described, 120.0, rows=50).rows_per_s == 0.0


def test_the_next_record_is_promised_no_sooner_than_the_last_one_came() -> None:
    described = description()
    assert describe(described, 100.0).renew_every_s == 10.0
    assert describe(described, 112.5).renew_every_s == 12.5
    assert describe(described, 113.0).renew_every_s == 10.0
    assert describe(described, 999.0).renew_every_s == 30.0  # by then it has expired


@pytest.mark.parametrize(
    ("host", "reached_at", "offered"),
    [
        ("127.0.0.1", "10.0.0.7", ""),
        ("127.0.0.1", None, ""),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "10.0.0.7", "10.0.0.7"),
        ("0.0.0.0", None, ""),
    ],
)
def test_metrics_are_offered_where_others_can_scrape(host: str, reached_at: str | None, offered: str) -> None:
    server = MetricsServer(CollectorRegistry(), host, 0)
    try:
        port = server.address.rpartition(":")[2].removesuffix("/metrics")
        assert server.offered(reached_at) == (f"{offered}:{port}" if offered else "")
        with pytest.raises(StartError, match="pass another --metrics-port"):
            MetricsServer(CollectorRegistry(), host, int(port))
        with pytest.raises(StartError, match="pass another --metrics-host"):
            MetricsServer(CollectorRegistry(), "192.0.2.1", 0)
    finally:
        server.close()
