"""The node's settings, from a TOML file, the environment (`TALKOOT_NODE_…`) and flags."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from peer.settings import RoleSettings


class NodeSettings(RoleSettings):
    """What a volunteer's node may use, and how it serves. Times are in seconds, sizes in bytes."""

    env_prefix: ClassVar[str] = "TALKOOT_NODE_"

    experts: int | None = Field(
        default=None, ge=0, le=10**6, description="experts to host; unset: a quarter of the free memory"
    )
    spare: int | None = Field(
        default=None,
        ge=0,
        le=10**6,
        description="experts to adopt beyond those when their host has gone; unset: half as many",
    )
    host: str | None = Field(
        default=None,
        min_length=1,
        max_length=253,
        description="address to listen on and to announce; unset: this machine's first",
    )
    dht_port: int = Field(default=0, ge=0, le=65535, description="TCP port of the DHT; 0: any free one")
    grpc_port: int = Field(
        default=0, ge=0, le=65535, description="TCP port of the expert service; 0: any free one"
    )
    metrics_port: int = Field(
        default=0, ge=0, le=65535, description="TCP port of /metrics, on loopback; 0: any free one"
    )
    state: Path | None = Field(default=None, description="folder of the node's identity and state")
    replicas: int = Field(
        default=2,
        ge=1,
        le=100,
        description="replicas of an expert that are enough: of one with fewer this node takes another into its room",
    )
    average_every_s: float = Field(
        default=60.0,
        ge=0,
        le=86400,
        allow_inf_nan=False,
        description="seconds between averages of a replica with another of the same expert; 0: never",
    )
    drain_timeout_s: float = Field(
        default=30.0,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        description="longest that a node which leaves waits for others to take its experts over, in seconds",
    )
    max_transfers: int = Field(
        default=4, ge=1, le=1000, description="experts' states that others fetch from here at the same time"
    )
    max_transfer_s: float = Field(
        default=600.0, gt=0, le=86400, description="longest that fetching a state may take, in seconds"
    )
    max_snapshots: int = Field(
        default=8, ge=1, le=1000, description="experts' states kept in memory for those who fetch them"
    )
    snapshot_s: float = Field(default=300.0, gt=0, le=3600, description="how long they are kept, in seconds")
    max_hints: int = Field(
        default=256, ge=1, le=10**5, description="experts that others may ask this node to fetch, at one time"
    )
    checkpoint_every_s: float = Field(
        default=60.0,
        ge=0,
        le=86400,
        allow_inf_nan=False,
        description="seconds between saves of the experts that changed; 0: only when the node stops",
    )
    checkpoints_kept: int = Field(
        default=2, ge=1, le=1000, description="checkpoints kept of each expert, newest first"
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="torch threads; unset: one for each core"
    )
    announce_every_s: float = Field(
        default=10.0,
        ge=0.5,
        le=120,
        description="seconds between announcements; they live three times as long",
    )
    claim_wait_s: float = Field(
        default=1.0,
        ge=0.1,
        le=30,
        description="seconds for others to see a claim before the expert is served",
    )
    max_queued_rows: int = Field(
        default=65536,
        ge=1,
        le=10**9,
        description="rows that may wait; more are refused with RESOURCE_EXHAUSTED",
    )
    max_batch_rows: int = Field(default=8192, ge=1, le=10**7, description="rows computed at once")
    max_call_bytes: int = Field(
        default=64 * 2**20, ge=1024, le=2**32, description="payload of one call, in bytes"
    )
    max_kept_bytes: int = Field(
        default=256 * 2**20,
        ge=0,
        le=2**40,
        description="memory for forward passes kept until their backward call, in bytes",
    )
    max_calls: int = Field(default=64, ge=1, le=10**5, description="calls served at the same time")
    max_call_s: float = Field(
        default=60.0, gt=0, le=3600, description="longest that a call may last, in seconds"
    )

    @property
    def lifetime_s(self) -> float:
        """How long announcements live."""
        return 3 * self.announce_every_s
