"""The dashboard's settings, from a TOML file, the environment (`TALKOOT_DASHBOARD_…`) and flags."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from peer.settings import RoleSettings


class DashboardSettings(RoleSettings):
    """Where the dashboard listens, how often it reads, and how much it keeps. Times are in seconds."""

    env_prefix: ClassVar[str] = "TALKOOT_DASHBOARD_"

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        max_length=253,
        description="address to listen on; anybody who reaches it sees the page and its invite",
    )
    port: int = Field(default=8080, ge=0, le=65535, description="TCP port of the page; 0: any free one")
    state: Path | None = Field(
        default=None,
        description="folder of the dashboard's identity and history; one process at a time uses it; unset: "
        "~/.local/state/talkoot/dashboard",
    )
    refresh_s: float = Field(
        default=2.0, ge=0.1, le=600, allow_inf_nan=False, description="seconds between two looks at the swarm"
    )
    list_every_s: float = Field(
        default=30.0,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        description="seconds between two looks through the index of all nodes; those that host experts show at once",
    )
    silence_factor: float = Field(
        default=1.5,
        ge=1,
        le=10,
        allow_inf_nan=False,
        description="a peer that did not renew its record for so many of its own periods has gone",
    )
    most_nodes: int = Field(
        default=20_000, ge=1, le=10**6, description="most nodes shown; of more some are drawn"
    )
    most_trainers: int = Field(default=1000, ge=1, le=10**5, description="most trainers shown")
    most_gone: int = Field(default=1000, ge=0, le=10**5, description="most nodes listed that have gone")
    gone_kept_s: float = Field(
        default=86400.0, ge=0, le=30 * 86400, description="how long they are listed, in seconds"
    )
    most_cells: int = Field(default=65536, ge=1, le=10**7, description="largest layer's grid that is shown")
    max_streams: int = Field(
        default=200, ge=1, le=10**5, description="pages that are kept up to date at one time"
    )
    max_connections: int = Field(default=1000, ge=1, le=10**5, description="connections served at one time")
    experts_every_s: float = Field(
        default=15.0, ge=0, le=3600, allow_inf_nan=False, description="seconds between figures of each expert"
    )
    history_series: int = Field(
        default=256, ge=1, le=10**5, description="figures whose history is kept, the newest ones"
    )
    history_experts: int = Field(
        default=1024, ge=0, le=10**5, description="experts whose history is kept; of a larger swarm none is"
    )
