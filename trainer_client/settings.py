"""The settings of `talkoot train` and `talkoot generate`, and those that go with each preset of a manifest."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import platformdirs
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from dht.presets import PRESETS as FOUNDED
from dht.presets import PresetName
from peer.errors import SettingsError
from peer.settings import (
    Denied,
    DenylistPath,
    MetricsHost,
    MetricsPort,
    P2pd,
    PeerName,
    RoleSettings,
    describe_validation_error,
    several,
)
from peer.transport.endpoints import HostName

if TYPE_CHECKING:
    from dht.manifest import Manifest

RouterName = Literal["product-key", "noisy-top-k", "switch", "base", "glam"]
Balance = Literal["bias", "loss", "both", "none"]
Precision = Literal["fp32", "bf16"]
Objective = Literal["causal", "span-corruption", "infilling", "permutation", "rag-sequence", "rag-token"]
Marginal = Literal["sequence", "token"]
"""What RAG sums over passages: whole answers, or each token of one."""

_BALANCED: dict[str, Any] = {
    "router": "product-key",
    "balance": "bias",
    "learning_rate": 2e-3,
    "warmup_steps": 20,
}

_THIN_LINES: dict[str, Any] = _BALANCED | {"nodes_per_token": 2}

PRESETS: dict[str, dict[str, Any]] = {
    "transformer": _THIN_LINES,
    "ffn": _THIN_LINES,
    "paper": _BALANCED,
    "none": {},
}
"""The settings with which the models of dht/presets.py were measured (docs/recipe.md)."""

MAX_STEPS = 10**7
_VALIDATIONS, _LEAST_STEPS_BETWEEN = 10, 10
"""The default number of validations between the first and the last, and the default fewest steps between two."""
_CHUNK, _SMALLEST_CHUNK = 64, 4
"""Tokens for which passages are looked up together: usually, and the fewest."""
_EARLY_VALIDATIONS = (10, 100, 1_000, 10_000, 100_000)
"""The steps after which a long run validates by default before the first of those. Each costs a few forward passes."""
_OF_THIS_MACHINE = {
    *("threads", "state", "checkpoint", "checkpoint_every", "checkpoints_kept"),
    *("log", "tensorboard", "plot", "wait_for_experts_s", "min_experts"),
    *("announce_every_s", "metrics_host", "metrics_port", "deny", "denylist"),
    *("average_host", "average_port", "p2pd", "start_from"),
}
"""Settings of this machine. They don't affect what is learned, so checkpoints leave them out."""


def with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, completed by those of the preset that they name. An unknown name changes nothing."""
    name = values.get("preset")
    preset = PRESETS.get(name) if isinstance(name, str) else None  # any value may be given
    return dict(values) if preset is None else {**preset, **values}


def _one_or_several(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class TrainerSettings(RoleSettings):
    """How a trainer trains, and how long it waits for experts. Times are in seconds."""

    env_prefix: ClassVar[str] = "TALKOOT_TRAIN_"
    removed: ClassVar[Mapping[str, str]] = {"spot_checks": "check_share"} | dict.fromkeys(
        (
            *("in_flight_limit", "least_deadline_s", "backoff_first_s", "backoff_longest_s", "most_hedged"),
            *("refresh_every_s", "average_deadline_s", "average_relays", "average_tunnel_streams"),
        ),
        "",
    )

    data: Annotated[tuple[str, ...], BeforeValidator(_one_or_several)] = Field(
        default=(),
        description="text, .jsonl and .parquet files, folders of them, and globs; unset: Python's own help",
    )
    objective: Objective = Field(
        default="causal",
        description="what the model learns; causal: the next token; rag-sequence, rag-token: to answer the questions "
        "in `data` from a `memory`; others: to restore a text, with an encoder",
    )
    field: str = Field(default="text", description="the field of .jsonl and .parquet files that has the text")
    validation_share: float = Field(
        default=0.1, gt=0, lt=1, description="share of the text, at its end, that is kept for validation"
    )
    tokenizer: str = Field(
        default="bytes",
        min_length=1,
        description="what text is split into: bytes; bpe (byte pairs learned from the data); or the path of a "
        "tokenizer.json",
    )
    vocabulary: int = Field(
        default=4096, ge=257, le=65536, description="tokens that bpe learns, including the 256 bytes"
    )
    steps: int = Field(
        default=200, ge=1, le=MAX_STEPS, description="training steps in all, including those before a resume"
    )
    batch_size: int = Field(default=8, ge=1, le=65536, description="sequences in a batch")
    accumulate: int = Field(default=1, ge=1, le=65536, description="batches in a step")
    in_flight: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        default=1,
        description="steps that run at once; auto: one at first, then as many as hide the latency",
    )
    precision: Precision = Field(
        default="fp32",
        description="precision of the dense part's activations; its parameters are always float32",
    )
    learning_rate: float = Field(
        default=2e-3, gt=0, le=1, allow_inf_nan=False, description="highest learning rate of the dense part"
    )
    warmup_steps: int = Field(
        default=20, ge=0, le=10**7, description="steps over which the learning rate rises linearly"
    )
    clip_norm: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="largest gradient norm of the dense part"
    )
    weight_decay: float = Field(
        default=0.01,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="decoupled weight decay of the dense part's matrices; biases and norms have none",
    )
    validate_every: int | None = Field(
        default=None,
        ge=0,
        le=10**7,
        description="steps between validations; 0: only before and after training; unset: about ten in a run, at least "
        "10 steps apart; a long run also validates early, after 10, 100, 1,000... steps",
    )
    validation_batches: int = Field(default=4, ge=1, le=10_000, description="batches in a validation")
    seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**63,
        description="seed of this trainer's batches, noise and dropout; unset: one that no other trainer has",
    )
    preset: PresetName | None = Field(
        default=None,
        description="preset for router, balance and learning rate, which other settings override; unset: the swarm's",
    )
    router: RouterName = Field(default="product-key", description="how experts are chosen for each token")
    top_k: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="experts for each token, at most the manifest's top_k; unset: as many as the router needs",
    )
    nodes_per_token: int | None = Field(
        default=None,
        ge=2,
        le=64,
        description="most nodes that a token is sent to; it is sent to more if experts fail, or if so few nodes do not "
        "have top_k experts; fewer nodes mean less traffic and less choice of experts; unset: any number",
    )
    balance: Balance | None = Field(
        default=None,
        description="how tokens are spread evenly over experts; bias: a number added to each expert's score when "
        "experts are chosen; loss: a term added to the model's loss; both; or none; unset: bias for product-key, none "
        "for base, loss for the other routers",
    )
    balance_weight: float = Field(
        default=0.01, ge=0, le=100, allow_inf_nan=False, description="weight of the balancing loss"
    )
    expert_dropout: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="dropout of the experts' updates in training; for the router switch only",
    )
    gate_scale: float = Field(
        default=0.1,
        gt=0,
        le=10,
        allow_inf_nan=False,
        description="scale of the gate's initial weights, for the router switch only: their variance is this number "
        "divided by hidden",
    )
    memory: str | None = Field(
        default=None,
        min_length=1,
        description="name or id of a memory whose passages the model reads while it learns, writes or answers; unset: "
        "none",
    )
    memory_chunk: int | None = Field(
        default=None,
        ge=_SMALLEST_CHUNK,
        le=1024,
        description="tokens of the text for which passages are looked up together, fewer than the swarm's context; "
        "unset: 64, or a quarter of the context if it is no longer than that",
    )
    memory_passages: int | None = Field(
        default=None,
        ge=1,
        le=8,
        description="passages that are read for each chunk or question; unset: one for a chunk, two for a question",
    )
    memory_length: int = Field(
        default=128, ge=4, le=1024, description="tokens that are read of each passage, from its beginning"
    )
    memory_layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(several)] = Field(
        default=(),
        description="layers of the model that read passages, counted from 0; unset: the middle one",
    )
    memory_overlap: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="in training, a passage is left out if it contains more than this share of the eight-word runs of "
        "the text to be predicted; passages of the text's own document are always left out",
    )
    call_deadline_s: float = Field(
        default=10.0,
        gt=0,
        le=600,
        allow_inf_nan=False,
        description="longest time that a call to experts may take, in seconds",
    )
    grace_s: float = Field(
        default=0.5,
        ge=0,
        le=600,
        allow_inf_nan=False,
        description="seconds to wait for more answers once every token has k_min; for gradients, longer if the first "
        "ones took longer",
    )
    k_min: int = Field(
        default=2,
        ge=1,
        le=64,
        description="answers that each token must have before late ones are left out; if it goes to fewer experts, "
        "all of theirs",
    )
    check_share: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="share of the answers in which the trainer computes some rows again, to find nodes that lie; 0: "
        "none",
    )
    wait_for_experts_s: float = Field(
        default=60.0,
        ge=0,
        le=7 * 86400,
        allow_inf_nan=False,
        description="longest wait for `min_experts`, in seconds; then training starts if any expert is live. Also the "
        "longest pause while none is live",
    )
    min_experts: float = Field(
        default=0.75,
        gt=0,
        le=1,
        description="share of the swarm's experts that must be live before training starts; the others join later by "
        "themselves",
    )
    checkpoint: Path | None = Field(
        default=None, description="folder of checkpoints; unset: a new one for each run, in the state folder"
    )
    checkpoint_every: int = Field(
        default=100, ge=0, le=10**7, description="steps between checkpoints; 0: only at the end"
    )
    checkpoints_kept: int = Field(default=3, ge=1, le=10_000, description="newest checkpoints that are kept")
    average_every: int = Field(
        default=20,
        ge=0,
        le=10**7,
        description="steps between averages of the dense part with another trainer's; 0: never",
    )
    average_host: HostName | None = Field(
        default=None,
        description="address at which other trainers reach this one; unset: that of the first network interface",
    )
    average_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="TCP port at which other trainers reach this one; 0: any free one",
    )
    p2pd: P2pd = "auto"
    start_from: Literal["swarm", "fresh"] = Field(
        default="swarm",
        description="swarm: a new run starts from another trainer's dense part, and so does a resumed run that is far "
        "behind; fresh: neither does",
    )
    log: Path | None = Field(default=None, description="file that gets a JSON line for each step")
    tensorboard: Path | None = Field(default=None, description="folder for TensorBoard")
    plot: Path | None = Field(
        default=None, description="PNG file with a plot of the loss, written at the end"
    )
    name: PeerName | None = Field(
        default=None,
        description="this trainer's name on the swarm's dashboards; unset: no name",
    )
    announce_every_s: float = Field(
        default=10.0,
        ge=0.5,
        le=120,
        allow_inf_nan=False,
        description="seconds between announcements of this trainer's progress; others forget a trainer whose next "
        "announcement is late by two periods, or by a minute if that is shorter",
    )
    deny: Denied = ()
    denylist: DenylistPath = None
    metrics_host: MetricsHost = "127.0.0.1"
    metrics_port: MetricsPort = 0
    threads: int | None = Field(default=None, ge=1, le=1024, description="torch threads; unset: one per core")
    state: Path | None = Field(
        default=None,
        description="folder for the trainer's identity and state; one process at a time can use it; unset: "
        "~/.local/state/talkoot/trainer",
    )

    @model_validator(mode="before")
    @classmethod
    def _take_preset(cls, values: Any) -> Any:
        return with_preset(values) if isinstance(values, dict) else values

    def saved(self, seed: int) -> dict[str, Any]:
        """The settings that a checkpoint stores, for JSON. `seed`: the one in use."""
        values = self.model_dump(mode="json", exclude=_OF_THIS_MACHINE)
        return values | {"seed": seed, "data": [str(Path(path).absolute()) for path in self.data]}

    def resumed(self, saved: Mapping[str, Any]) -> Self:
        """The settings stored in a checkpoint, overridden by those given now. Raises SettingsError.

        The checkpoint may be another trainer's, so it sets nothing of this machine.
        """
        given = self.model_dump(include=self.model_fields_set)
        known = {
            name: value
            for name, value in saved.items()
            if name not in self.removed and name not in _OF_THIS_MACHINE
        }
        try:
            return type(self).model_validate({**known, **given})
        except ValidationError as error:
            raise SettingsError(describe_validation_error(error, type(self))) from error

    def in_swarm(self, manifest: "Manifest") -> Self:
        """These settings with the preset that the swarm's manifest recommends, unless one was set. Values that were set
        stay.

        Raises SettingsError if the preset that was set is for another kind of experts.
        """
        preset = manifest.preset
        if self.preset is not None:
            self._check_preset(manifest)
            return self
        if preset == "none":
            return self
        given = self.model_dump(include=self.model_fields_set - {"preset"})
        return type(self).model_validate({**given, "preset": preset})

    def _check_preset(self, manifest: "Manifest") -> None:
        """Raises SettingsError."""
        if self.preset is None or self.preset == "none":
            return
        kind = FOUNDED[self.preset].tables["experts"]["kind"]
        if kind != manifest.experts.kind:
            raise SettingsError(
                f"--preset {self.preset} is for experts of kind {kind!r}, but this swarm's are "
                f"{manifest.experts.kind!r}: pass --preset {manifest.preset}, or leave it out to use the preset "
                "that the swarm recommends"
            )

    @property
    def answers_questions(self) -> bool:
        return self.objective in ("rag-sequence", "rag-token")

    def chunk_in(self, context: int) -> int:
        """Tokens for which passages are looked up together, by a model with this context."""
        return self.memory_chunk or (_CHUNK if context > _CHUNK else max(_SMALLEST_CHUNK, context // 4))

    @property
    def passages_read(self) -> int:
        """Passages read for each chunk or question."""
        return self.memory_passages or (2 if self.answers_questions else 1)

    @property
    def marginal(self) -> Marginal:
        return "token" if self.objective == "rag-token" else "sequence"

    @property
    def state_folder(self) -> Path:
        """The folder for the trainer's identity, text and checkpoints."""
        return self.state or platformdirs.user_state_path("talkoot") / "trainer"

    def validates_after(self, step: int) -> bool:
        """Whether a run that goes on after `step` steps validates then."""
        if self.validate_every is not None:
            return self.validate_every > 0 and step % self.validate_every == 0
        every = max(_LEAST_STEPS_BETWEEN, -(-self.steps // (_VALIDATIONS + 1)))
        return step % every == 0 or (step in _EARLY_VALIDATIONS and step <= every / 2)


class Sampling(RoleSettings):
    """How the next token is drawn from the model's prediction."""

    env_prefix: ClassVar[str] = "TALKOOT_GENERATE_"

    temperature: float = Field(
        default=0.8,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="randomness of the choice; 0: always the likeliest token",
    )
    top_k: int | None = Field(default=None, ge=1, description="only the k likeliest tokens; unset: all")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="only the likeliest tokens that together have this probability"
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**63, description="equal seeds give equal text; unset: a new one each time"
    )
    max_tokens: int = Field(default=200, ge=1, le=10**7, description="tokens to generate")
