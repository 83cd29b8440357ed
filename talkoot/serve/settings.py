"""The settings of `talkoot serve`, from a TOML file, the environment (`TALKOOT_SERVE_…`) and flags."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from peer.settings import RoleSettings


class ServeSettings(RoleSettings):
    """Where the server listens, who may use it, and its limits."""

    env_prefix: ClassVar[str] = "TALKOOT_SERVE_"

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        max_length=253,
        description="IP address to listen on; without API keys, anybody who can reach it can use the model",
    )
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port; 0: any free one")
    api_key_file: Path | None = Field(
        default=None,
        description="file of API keys, one per line; clients must send one of them; unset: no key is needed",
    )
    model_name: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="what clients call the model; unset: the swarm's name",
    )
    max_tokens: int = Field(
        default=4096, ge=1, le=10**6, description="most tokens in one answer; requests for more are refused"
    )
    max_streams: int = Field(
        default=32, ge=1, le=1024, description="answers that are computed together; others wait their turn"
    )
    max_waiting: int = Field(
        default=128,
        ge=0,
        le=10_000,
        description="answers that may wait; further requests of a client are refused while it has one under way",
    )
    max_per_client: int = Field(
        default=64,
        ge=1,
        le=10_000,
        description="answers of one client at the same time, computed or waiting; a client is an API key, or without "
        "keys an IP address",
    )
