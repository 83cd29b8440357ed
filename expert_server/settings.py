"""The node's settings, from a TOML file, the environment (`TALKOOT_NODE_…`) and flags."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, InstanceOf, model_validator

from expert_server.schedule import Schedule
from peer.formatting import parse_bytes
from peer.settings import (
    Denied,
    DenylistPath,
    MetricsHost,
    MetricsPort,
    P2pd,
    PeerName,
    RoleSettings,
    several,
)
from peer.transport.endpoints import HostName

PrecisionSetting = Literal["auto", "fp32", "tf32", "bf16"]


def _parse_schedule(value: object) -> object:
    return Schedule.parse(value) if isinstance(value, str) else value


class NodeSettings(RoleSettings):
    """What a volunteer's node may use, and how it serves. Times are in seconds, sizes in bytes."""

    env_prefix: ClassVar[str] = "TALKOOT_NODE_"
    removed: ClassVar[Mapping[str, str]] = dict.fromkeys((
        "busy_after_s", "claim_wait_s", "exchange_every_s", "idle_after_s", "idle_percent", "look_every_s",
        "max_batch_rows", "max_call_bytes", "max_call_s", "max_claim_s", "max_dht_key_bytes", "max_hints",
        "max_sessions", "max_snapshots", "max_standbys", "max_transfer_s", "max_transfers", "max_tunnel_streams",
        "reachability_every_s", "snapshot_s",
    ), "") | {
        "dht_port": "a node has one port now: set `port`",
        "grpc_port": "a node has one port now: set `port`",
        "announce_dht_port": "a node has one port now: set `announce_port`",
        "announce_grpc_port": "a node has one port now: set `announce_port`",
    }  # fmt: skip

    experts: int | None = Field(
        default=None,
        ge=0,
        le=10**6,
        description="experts to host; unset: as many as fit in a quarter of the free memory",
    )
    spare: int | None = Field(
        default=None,
        ge=0,
        le=10**6,
        description="further experts that the node may adopt if their host disappears; unset: half as many",
    )
    host: str | None = Field(
        default=None,
        min_length=1,
        max_length=253,
        description="IP address to listen on and to announce; unset: this machine's first, or 127.0.0.1 if the invite "
        "has no other",
    )
    name: PeerName | None = Field(
        default=None, description="what the swarm's dashboards call this node; unset: no name"
    )
    port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="TCP port of this node; 0: the port of the last start, or any free one",
    )
    announce_host: HostName | None = Field(
        default=None,
        description="address at which others reach this node, if a router forwards its port; unset: host",
    )
    announce_port: int | None = Field(
        default=None, ge=1, le=65535, description="port that the router forwards to `port`; unset: the same"
    )
    reachability: Literal["auto", "public", "private"] = Field(
        default="auto",
        description="how others reach this node; public: at its addresses; private: through relays and hole punching; "
        "auto: other nodes try to connect, and the result decides",
    )
    relay_mbit: float = Field(
        default=20.0,
        ge=0,
        le=10**6,
        allow_inf_nan=False,
        description="bandwidth for relaying to peers behind routers, if others can connect to this node, in Mbit/s; "
        "0: none",
    )
    p2pd: P2pd = "auto"
    p2pd_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="TCP port of the libp2p daemon, which no router needs to forward; if announce_host is set too, "
        "the port is announced there; 0: any free port",
    )
    upnp: bool = Field(
        default=True,
        description="ask the router by UPnP to forward this node's port, and the libp2p daemon's; this is not done if "
        "announce_host or announce_port is set, reachability is private, or host is loopback",
    )
    metrics_host: MetricsHost = "127.0.0.1"
    metrics_port: MetricsPort = 0
    state: Path | None = Field(
        default=None,
        description="folder for the node's identity and state; one process at a time can use it; unset: "
        "~/.local/state/talkoot/node",
    )
    replicas: int = Field(
        default=2,
        ge=1,
        le=100,
        description="replicas that are enough for an expert: if one has fewer, a node with room hosts another; "
        "overloaded experts get more, and a node that would host nothing hosts one more replica",
    )
    average_every_s: float = Field(
        default=60.0,
        ge=0,
        le=86400,
        allow_inf_nan=False,
        description="shortest time, in seconds, between averages of a replica with another node's replica of the same "
        "expert; a pause is at least four times as long as the last round took; 0: never average",
    )
    drain_timeout_s: float = Field(
        default=30.0,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        description="longest time, in seconds, that a leaving node waits for others to take over its experts",
    )
    checkpoint_every_s: float = Field(
        default=60.0,
        ge=0,
        le=86400,
        allow_inf_nan=False,
        description="seconds between checkpoints of the experts that changed; 0: only when the node stops",
    )
    checkpoints_kept: int = Field(
        default=2,
        ge=1,
        le=1000,
        description="newest checkpoints that are kept of each expert; the newest states that came from up to 4 other "
        "nodes are kept too",
    )
    standby_every_s: float = Field(
        default=300.0,
        ge=0,
        le=86400,
        allow_inf_nan=False,
        description="seconds between rounds in which this node copies to its own disk the experts that only one other "
        "node hosts; 0: never",
    )
    device: str = Field(
        default="auto",
        max_length=200,
        description="devices to compute on: auto, cpu, cuda, cuda:1, mps, or several with commas; auto: all CUDA GPUs, "
        "else MPS, else the CPU",
    )
    precision: PrecisionSetting = Field(
        default="auto",
        description="precision in which experts are computed; auto: bf16 on CUDA GPUs that support it, else fp32",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="torch threads, at most one per core; unset: one per core",
    )
    memory: Annotated[int, BeforeValidator(parse_bytes)] | None = Field(
        default=None,
        ge=1,
        le=2**50,
        description="memory for experts, optimizers, kept forward passes and calls, such as 2GB; it lowers `experts`, "
        "`spare` and `max_kept_bytes` if needed; unset: no limit",
    )
    memory_disk: Annotated[int, BeforeValidator(parse_bytes)] = Field(
        default=0,
        ge=0,
        le=2**50,
        description="disk space for passages that others search, such as 5GB; 0: host none",
    )
    memory_refuse: Annotated[tuple[str, ...], BeforeValidator(several)] = Field(
        default=(), description="memories not to host, by name or id"
    )
    memory_licenses: Annotated[tuple[str, ...], BeforeValidator(several)] = Field(
        default=(),
        description="licences, such as CC0-1.0; only memories whose passages are all under these licences are hosted; "
        "unset: all",
    )
    upload_mbit: float | None = Field(
        default=None,
        ge=0.01,
        le=10**6,
        description="limit for sending answers, states and passages, in Mbit/s; unset: no limit",
    )
    download_mbit: float | None = Field(
        default=None,
        ge=0.01,
        le=10**6,
        description="limit for receiving calls, states and passages, in Mbit/s; unset: no limit",
    )
    schedule: Annotated[InstanceOf[Schedule], BeforeValidator(_parse_schedule)] | None = Field(
        default=None,
        description="hours to work, in local time, such as `22:00-07:00` or "
        "`mon-fri 22:00-07:00,sat-sun 00:00-24:00`; unset: always",
    )
    only_when_idle: bool = Field(default=False, description="pause while other programs need the processor")
    busy_percent: float = Field(
        default=25.0,
        gt=0,
        le=100,
        description="load by other programs, in % of all cores, above which the node pauses; it resumes at two fifths "
        "of this load",
    )
    not_on_battery: bool = Field(default=False, description="pause while the machine runs on battery")
    niceness: int = Field(
        default=10,
        ge=0,
        le=19,
        description="priority of the process, from 0 (normal) to 19 (lowest)",
    )
    announce_every_s: float = Field(
        default=10.0,
        ge=0.5,
        le=120,
        description="shortest time between announcements, in seconds; the actual time is up to 18 times as long, to "
        "keep upkeep near 15 kbit/s (near 30 kbit/s if this is 5), and about as much again for memories; others "
        "forget a node whose next announcement is late by two periods, or by a minute if that is shorter",
    )
    max_queued_rows: int = Field(
        default=65536,
        ge=1,
        le=10**9,
        description="rows that may wait to be computed; more are refused with RESOURCE_EXHAUSTED",
    )
    max_kept_bytes: int | None = Field(
        default=None,
        ge=0,
        le=2**40,
        description="memory for forward passes that wait for their backward call, in bytes; what is left holds keys "
        "and values of texts that are being continued; unset: a sixteenth of the free memory",
    )
    max_dht_bytes: int = Field(
        default=64 * 2**20,
        ge=2**20,
        le=2**36,
        description="memory for the DHT entries that others store at this node, in bytes",
    )
    max_calls: int = Field(default=64, ge=1, le=10**5, description="calls served at the same time")
    deny: Denied = ()
    denylist: DenylistPath = None
    caller_rows_per_s: float | None = Field(
        default=None,
        gt=0,
        le=10**9,
        description="rows of experts per second that one caller may send, forward and backward; callers with one "
        "token, or in one neighbourhood, count as one; unset: no limit",
    )
    caller_updates_per_s: float | None = Field(
        default=None,
        gt=0,
        le=10**9,
        description="optimizer steps per second that one such caller may cause, over all experts; each batch counts as "
        "a step, even if `rows_per_update` requires several batches for one; unset: no limit",
    )
    caller_expert_updates_per_hour: float | None = Field(
        default=None,
        gt=0,
        le=10**9,
        description="optimizer steps per hour that one such caller may cause in one expert; unset: no limit",
    )

    @model_validator(mode="after")
    def _forwards_to_a_known_port(self) -> Self:
        if (self.announce_host or self.announce_port) and not self.port:
            raise ValueError("port must be given too, so that the router can forward to it")
        return self

    @property
    def may_host_experts(self) -> bool:
        """False if it neither hosts experts nor adopts any."""
        return (self.experts, self.spare) != (0, 0)

    @property
    def asks_router(self) -> bool:
        """Whether to ask the router to forward this node's port."""
        return self.upnp and self.reachability != "private" and not (self.announce_host or self.announce_port)
