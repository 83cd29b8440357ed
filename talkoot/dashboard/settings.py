"""The dashboard's settings, from a TOML file, the environment (`TALKOOT_DASHBOARD_…`) and flags."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from peer.settings import RoleSettings


class DashboardSettings(RoleSettings):
    """Where the dashboard listens, and how often it reads the swarm. Times are in seconds."""

    env_prefix: ClassVar[str] = "TALKOOT_DASHBOARD_"
    removed: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (
            *("list_every_s", "silence_factor", "most_nodes", "most_trainers", "most_gone", "gone_kept_s"),
            *("most_cells", "max_streams", "max_connections", "experts_every_s", "history_series"),
            "history_experts",
        ),
        "",
    )

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        max_length=253,
        description="IP address to listen on; anybody who can reach it sees the page and the swarm's invite",
    )
    port: int = Field(default=8080, ge=0, le=65535, description="TCP port of the page; 0: any free one")
    state: Path | None = Field(
        default=None,
        description="folder for the dashboard's identity and history; one process at a time can use it; unset: "
        "~/.local/state/talkoot/dashboard",
    )
    refresh_s: float = Field(
        default=2.0, ge=0.1, le=600, allow_inf_nan=False, description="seconds between readings of the swarm"
    )
