"""The trainer's settings, from a TOML file, the environment (`TALKOOT_TRAIN_…`) and flags."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from peer.settings import RoleSettings

RouterName = Literal["product-key", "noisy-top-k", "switch", "base", "glam"]


class TrainerSettings(RoleSettings):
    """How a trainer trains, and how long it waits for experts. Times are in seconds."""

    env_prefix: ClassVar[str] = "TALKOOT_TRAIN_"

    steps: int = Field(default=200, ge=1, le=10**7, description="training steps of this run")
    batch_size: int = Field(default=8, ge=1, le=65536, description="sequences in a step")
    learning_rate: float = Field(
        default=2e-3, gt=0, le=1, allow_inf_nan=False, description="highest step size of the dense part"
    )
    warmup_steps: int = Field(
        default=20, ge=0, le=10**7, description="steps in which the step size rises linearly"
    )
    clip_norm: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="largest gradient norm of the dense part"
    )
    validate_every: int = Field(
        default=0, ge=0, le=10**7, description="steps between validations; 0 validates only before and after"
    )
    validation_batches: int = Field(default=4, ge=1, le=10_000, description="batches in a validation")
    seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**63,
        description="from which this trainer's batches, noise and dropout are drawn; unset: its own",
    )
    router: RouterName = Field(default="product-key", description="how tokens find their experts")
    top_k: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="experts for each token, at most the manifest's top_k; unset: the router's own number",
    )
    balance_weight: float = Field(
        default=0.01,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="weight of the balancing loss, in noisy-top-k, switch and glam",
    )
    expert_dropout: float = Field(
        default=0.1, ge=0, lt=1, description="part of what experts answer that training drops, in switch"
    )
    gate_scale: float = Field(
        default=0.1,
        gt=0,
        le=10,
        allow_inf_nan=False,
        description="scale of the gate's first weights, in switch: their variance is this over hidden",
    )
    call_deadline_s: float = Field(
        default=10.0,
        gt=0,
        le=600,
        allow_inf_nan=False,
        description="seconds: the longest that a call to experts may take",
    )
    grace_s: float = Field(
        default=0.5,
        ge=0,
        le=600,
        allow_inf_nan=False,
        description="seconds to wait for the other answers once every row has k_min",
    )
    k_min: int = Field(
        default=2, ge=1, le=64, description="answers that a row needs before the others may be late"
    )
    least_deadline_s: float = Field(
        default=3.0,
        gt=0,
        le=600,
        allow_inf_nan=False,
        description="seconds: the shortest deadline, when calls have answered quickly",
    )
    most_hedged: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="part of the calls that may go to a second replica too, when the first is slow; 0: none",
    )
    spot_checks: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="part of the answers that are compared with another replica's; 0: none",
    )
    refresh_every_s: float = Field(
        default=3.0,
        ge=0.1,
        le=60,
        allow_inf_nan=False,
        description="seconds between two looks at who is alive",
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="torch threads; unset: one for each core"
    )
    state: Path | None = Field(default=None, description="folder of the trainer's identity and state")
