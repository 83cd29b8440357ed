"""What a node says of itself in the DHT. Pure: `now` and the node's status are passed in."""

from collections.abc import Sequence

from dht.announcements import Activity, Reachability
from expert_server.settings import NodeSettings
from expert_server.status import NodeStatus
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.wire import records_pb2

_RATE_OVER_S = 5.0
"""Shortest time over which rows per second are counted."""


class Description:
    """Makes a node's records, one after the other, and remembers what the next one is compared with."""

    def __init__(self, settings: NodeSettings, certificate: bytes, started_at: float) -> None:
        self._settings = settings
        self._certificate = certificate
        self._started_at = started_at
        self._said_at: float | None = None
        self._rows_at = (started_at, 0)
        self._rows_per_s = 0.0

    def record(
        self,
        status: NodeStatus,
        activity: Activity,
        now: float,
        *,
        addresses: Sequence[str],
        bootstrap_addresses: Sequence[str],
        metrics_address: str,
        reachability: Reachability = Reachability.UNKNOWN,
        tunnel_addresses: Sequence[str] = (),
    ) -> records_pb2.NodeRecord:
        """The record that is true now. A node that pauses or leaves offers no room."""
        self._count(status.rows, now)
        return records_pb2.NodeRecord(
            addresses=addresses,
            certificate=self._certificate,
            protocol_version=PROTOCOL_VERSION,
            software_version=SOFTWARE_VERSION,
            expert_count=status.experts,
            expert_capacity=status.capacity if activity is Activity.SERVING else 0,
            rows_processed=status.rows,
            updates=status.updates,
            started_at=self._started_at,
            bootstrap_addresses=bootstrap_addresses,
            name=self._settings.name or "",
            activity=activity.value,
            metrics_address=metrics_address,
            rows_per_s=self._rows_per_s,
            renew_every_s=self._renewal(now),
            contributed_rows=status.contributed_rows,
            contributed_updates=status.contributed_updates,
            contributed_s=status.contributed_hours * 3600,
            reachability=reachability.value,
            tunnel_addresses=tunnel_addresses,
        )

    def _count(self, rows: int, now: float) -> None:
        then, before = self._rows_at
        if now - then >= _RATE_OVER_S:
            self._rows_per_s = (rows - before) / (now - then)
            self._rows_at = (now, rows)

    def _renewal(self, now: float) -> float:
        """As long as the last time: a round of announcements takes time too."""
        last, self._said_at = self._said_at, now
        took_s = 0.0 if last is None else now - last
        return min(max(self._settings.announce_every_s, took_s), self._settings.lifetime_s)
