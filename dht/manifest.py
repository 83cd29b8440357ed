"""The manifest: the description of the model that all peers of a swarm share, signed by the swarm's founder."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from dht.presets import PRESETS, PresetName, completed, default_preset
from dht.uid import UID, grid_coordinates
from peer import PROTOCOL_VERSION
from peer.choices import Activation, Norm, OptimizerName, check_heads
from peer.codec import CodecName, codec_of, encoded_bytes
from peer.errors import SettingsError, SwarmError, WireError
from peer.formatting import counted
from peer.settings import describe_validation_error, read_toml

SwarmName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}[a-z0-9]$")]


def _spdx(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,62}", text):
        raise ValueError("must be a licence's SPDX identifier, such as Apache-2.0 or CC-BY-SA-4.0")
    return text


License = Annotated[str, AfterValidator(_spdx)]


MOST_KNOWN_EXPERTS = 4096
"""If a swarm has no more experts than that, in all layers, trainers know all of them."""
LEAST_CONTEXT = 2
"""The smallest context, in tokens."""
_LEAST_ENCODER_CONTEXT = 16
"""In tokens. A corrupted text needs room for its marks."""


class _Part(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)


class ModelSpec(_Part):
    """The language model: `layers` times (a local part at the trainer, then a mixture of experts)."""

    layers: int = Field(default=2, ge=1, le=64, description="mixture layers of the model")
    causal: tuple[bool, ...] = Field(
        default=(),
        max_length=64,
        description="for each layer, whether a token sees only the tokens before it; layers with false come first and "
        "are an encoder, the others are its decoder; empty: all layers are causal, and there is no encoder",
    )
    hidden: int = Field(default=128, ge=8, le=16384, description="columns of every activation")
    heads: int = Field(default=4, ge=1, le=256, description="attention heads")
    head_size: int | None = Field(
        default=None, ge=2, le=512, description="columns of an attention head, even; unset: hidden / heads"
    )
    context: int = Field(default=128, ge=LEAST_CONTEXT, le=65536, description="longest sequence, in tokens")
    local_layers: int = Field(
        default=1, ge=0, le=16, description="local Transformer layers before each mixture"
    )
    local: Literal["layer", "attention"] = Field(
        default="layer",
        description="attention: one more attention after these layers, so that the mixture takes the place of a "
        "feed-forward block, as in the Switch Transformer (local_layers 0) and GLaM (1)",
    )
    feed_forward: int = Field(default=512, ge=8, le=65536, description="inner size of feed-forward blocks")
    shared_feed_forward: int = Field(
        default=0,
        ge=0,
        le=65536,
        description="inner size of a feed-forward block that the trainer adds to each mixture for every token; 0: none",
    )
    norm: Norm = Field(default="layer", description="LayerNorm or RMSNorm, in every layer")
    activation: Activation = Field(
        default="gelu",
        description="activation of feed-forward blocks; swiglu and geglu have three matrices of hidden × "
        "feed_forward, gelu two",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of all initial parameters")

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        check_heads(self.hidden, self.heads, self.head_size)
        return self

    @model_validator(mode="after")
    def _encoder_comes_first(self) -> Self:
        if not self.causal:
            return self
        if len(self.causal) != self.layers:
            raise ValueError(
                f"causal has {counted(len(self.causal), 'value')} for {counted(self.layers, 'layer')}"
            )
        if self.causal != tuple(sorted(self.causal)):
            raise ValueError("causal: the layers with false are the encoder, which comes first")
        if not self.causal[-1]:
            raise ValueError("causal: no layer is left for the decoder; at least the last must be true")
        if self.encoder_layers and self.context < _LEAST_ENCODER_CONTEXT:
            raise ValueError(
                f"an encoder-decoder's context must be {_LEAST_ENCODER_CONTEXT} or more, not {self.context}"
            )
        return self

    @property
    def encoder_layers(self) -> int:
        """How many of the first layers belong to the encoder; 0: the model has none."""
        return self.causal.count(False)

    def is_causal(self, layer: int) -> bool:
        """Whether a token attends only to those before it in this layer."""
        return layer >= self.encoder_layers


class ExpertSpec(_Part):
    """The experts: their grid, their kind, and their sizes if these differ from the model's."""

    grid: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(
        default=(4, 4),
        min_length=1,
        max_length=4,
        description="size of each grid dimension, the same in every layer",
    )
    kind: str = Field(
        default="transformer", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="kind of the experts"
    )
    width: int | None = Field(
        default=None,
        ge=8,
        le=16384,
        description="columns of an expert's inputs and answers, an even number; if it is less than hidden, the "
        "trainer projects to this width and back; unset: hidden",
    )
    heads: int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="attention heads of an expert; unset: as many as the model's, or fewer if those do not divide the "
        "width evenly",
    )
    head_size: int | None = Field(
        default=None,
        ge=2,
        le=512,
        description="columns of an expert's attention head, even; unset: width / heads",
    )
    feed_forward: int | None = Field(
        default=None,
        ge=8,
        le=65536,
        description="inner size of an expert's feed-forward block; unset: the model's",
    )

    @model_validator(mode="after")
    def _grid_is_not_too_large(self) -> Self:
        if self.count > 2**20:
            raise ValueError(f"the grid has {self.count} experts; at most {2**20} in a layer")
        return self

    @property
    def count(self) -> int:
        """Experts in one layer."""
        return math.prod(self.grid)


class RoutingSpec(_Part):
    """How tokens find experts, and how many."""

    top_k: int = Field(default=4, ge=1, le=64, description="experts for each token")
    prefix: int = Field(
        default=0,
        ge=0,
        description="number of first tokens whose mean chooses the experts for a whole sequence; these tokens have no "
        "loss; 0: each token chooses its own",
    )
    product_keys: bool = Field(
        default=True,
        description="whether an expert's score is the sum of one for each grid dimension (product keys); false: the "
        f"gate has a score for each expert, and computes more; with at most {MOST_KNOWN_EXPERTS} experts in all layers",
    )
    gate_width: int | None = Field(
        default=None,
        ge=1,
        le=16384,
        description="columns of each token that the gate reads, the first ones; with fewer, the gate of a large grid "
        "computes less; unset: hidden",
    )


class OptimizerSpec(_Part):
    """The optimizer of the experts."""

    name: OptimizerName = Field(default="adamw", description="optimizer of the experts")
    learning_rate: float = Field(default=1e-3, gt=0, le=1, allow_inf_nan=False, description="step size")
    momentum: float | None = Field(
        default=None, ge=0, lt=1, allow_inf_nan=False, description="momentum of sgd; unset: 0.9"
    )
    weight_decay: float = Field(
        default=0.01,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="weight decay of matrices, not of biases and norms: decoupled in adamw, added to the gradient in "
        "adam and sgd",
    )
    clip_norm: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="largest gradient norm of one step"
    )
    rows_per_update: int = Field(
        default=1,
        ge=1,
        le=10**6,
        description="rows whose gradients an expert adds up, over calls and callers, before it takes a step; after 30 "
        "s, it takes the step anyway; 1: a step for each batch",
    )
    warmup_updates: int = Field(
        default=10, ge=0, le=10**7, description="steps over which the step size rises linearly"
    )
    decay_updates: int = Field(
        default=0,
        ge=0,
        le=10**9,
        description="steps over which the step size falls to a tenth, as a cosine; after that, it stays constant; 0: "
        "it does not fall",
    )
    guard_factor: float = Field(
        default=10.0,
        ge=5,
        allow_inf_nan=False,
        description="growth factor of the parameter norm at which an expert returns to its last good state",
    )

    @model_validator(mode="after")
    def _momentum_belongs_to_sgd(self) -> Self:
        if self.momentum is not None and self.name != "sgd":
            raise ValueError(f"momentum is for sgd, and the optimizer is {self.name}")
        return self

    @property
    def sgd_momentum(self) -> float:
        return 0.9 if self.momentum is None else self.momentum

    @property
    def moments(self) -> int:
        """How many numbers the optimizer stores for each parameter."""
        if self.name == "sgd":
            return 1 if self.sgd_momentum else 0
        return 2


class WireSpec(_Part):
    """How activations and gradients are encoded on the wire."""

    codec: CodecName = Field(
        default="fp32",
        description="codec of trainers' calls and of the answers; int8: with a scale for each row; int4: with a scale "
        "for each 64 numbers, which are rotated together; int4 needs a width that is a multiple of 16",
    )


class AdmissionSpec(_Part):
    """Who may take part."""

    mode: Literal["open", "token"] = Field(
        default="open",
        description="who may join; open: anybody with the invite; token: anybody with an invite that the founder made "
        "with `talkoot invite`",
    )
    export: tuple[Literal["trainer", "reader"], ...] = Field(
        default=("trainer",),
        max_length=2,
        description="roles that may export the model; in mode open, everybody may",
    )


class Manifest(_Part):
    """What all peers of a swarm share. The TOML file that founds a swarm has the same structure."""

    name: SwarmName = Field(description="the swarm's name: 2 to 32 small letters, digits and hyphens")
    protocol_version: int = Field(
        default=PROTOCOL_VERSION, description="protocol version of the swarm's peers; others are refused"
    )
    preset: PresetName = Field(
        default="none",
        description="preset with the keys that a founder's file leaves out, and with the settings of trainers that "
        "don't set their own; none: the defaults below; a file without this key has the preset of its experts' kind",
    )
    license: License | None = Field(
        default=None,
        description="SPDX identifier of the model's licence, such as Apache-2.0, for the card of an exported model; "
        "unset: the card says that there is no licence",
    )
    model: ModelSpec = ModelSpec()
    experts: ExpertSpec = ExpertSpec()
    routing: RoutingSpec = RoutingSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    wire: WireSpec = WireSpec()
    admission: AdmissionSpec = AdmissionSpec()

    @model_validator(mode="after")
    def _top_k_is_not_too_large(self) -> Self:
        if self.routing.top_k > self.experts.count:
            raise ValueError(
                f"top_k ({self.routing.top_k}) is more than a layer's {counted(self.experts.count, 'expert')}"
            )
        return self

    @model_validator(mode="after")
    def _experts_have_sizes(self) -> Self:
        width = self.width
        if width > self.model.hidden:
            raise ValueError(
                f"the experts' width ({width}) is more than the model's hidden size ({self.model.hidden})"
            )
        if width % 2:
            raise ValueError(f"the experts' width ({width}) must be even")
        check_heads(width, self._expert_heads, self.experts.head_size, "the experts' width")
        return self

    @model_validator(mode="after")
    def _gate_reads_what_there_is(self) -> Self:
        if self.gate_width > self.model.hidden:
            raise ValueError(
                f"gate_width ({self.gate_width}) is more than the model's hidden size ({self.model.hidden})"
            )
        return self

    @model_validator(mode="after")
    def _experts_with_own_scores_are_known(self) -> Self:
        if not self.routing.product_keys and self.experts_total > MOST_KNOWN_EXPERTS:
            raise ValueError(
                f"product_keys = false allows at most {MOST_KNOWN_EXPERTS} experts in all layers; the grid and the "
                f"layers make {self.experts_total}"
            )
        return self

    @model_validator(mode="after")
    def _codec_fits(self) -> Self:
        try:
            encoded_bytes(0, self.width, codec_of(self.wire.codec))
        except WireError as error:
            raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def _prefix_leaves_something_to_learn(self) -> Self:
        if self.routing.prefix >= self.model.context:
            raise ValueError(
                f"prefix ({self.routing.prefix}) must be less than the model's context ({self.model.context})"
            )
        if self.routing.prefix and self.model.encoder_layers:
            raise ValueError(
                "prefix must be 0 where the model has an encoder: a decoder writes from its first token on"
            )
        return self

    @classmethod
    def from_toml(cls, path: Path) -> Self:
        """The manifest that a founder's file describes. Raises SettingsError, which names the file and the wrong
        key.
        """
        values = read_toml(path)
        try:
            return cls.founded(values)
        except ValidationError as error:
            raise SettingsError(f"{path}: {describe_validation_error(error, cls)}") from error

    @classmethod
    def founded(cls, values: Mapping[str, Any]) -> Self:
        """The manifest of a new swarm. Missing keys are taken from its preset. Raises ValidationError or SwarmError."""
        values = {"preset": default_preset(values), **values}
        preset = PRESETS.get(values["preset"]) if isinstance(values["preset"], str) else None
        if preset is None:
            return cls._validated(values)
        values = completed(values, preset.tables)
        known = cls._validated(values)
        return cls._validated(completed(values, preset.sizes(known.model.hidden, known.experts.width)))

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Raises SwarmError if the manifest is invalid or of another protocol version."""
        try:
            version = _Versioned.model_validate_json(text).protocol_version
            if version != PROTOCOL_VERSION:
                raise SwarmError(
                    f"this swarm speaks protocol version {version}, this software {PROTOCOL_VERSION}: "
                    + ("update Talkoot" if version > PROTOCOL_VERSION else "ask its founder to update")
                )
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise SwarmError(
                f"the swarm's manifest is not valid: {describe_validation_error(error, cls)}; a later Talkoot may have "
                "made it: update this one"
            ) from error

    @classmethod
    def from_own_json(cls, text: bytes) -> Self | None:
        """The manifest that a founder published itself. One of another protocol version is read as if it were of this
        one, because a founder that updates continues its swarm; None if that is not possible. Raises SwarmError if it
        is invalid.
        """
        try:
            version = _Versioned.model_validate_json(text).protocol_version
        except ValidationError:
            return cls.from_json(text)
        if version == PROTOCOL_VERSION:
            return cls.from_json(text)
        try:
            return cls.model_validate(json.loads(text) | {"protocol_version": PROTOCOL_VERSION})
        except ValidationError:
            return None

    def differences(self, other: Self) -> dict[str, str]:
        """The keys whose values differ, such as `model.hidden`, each with its values in words: `is 64, not 128`."""
        values, others = (
            set_keys(each.model_dump(mode="json", exclude={"protocol_version"})) for each in (self, other)
        )
        return {
            key: f"is {_in_toml(value)}, not {_in_toml(others[key])}"
            for key, value in values.items()
            if value != others[key]
        }

    def to_json(self) -> bytes:
        """Leaves out keys with default values, so that a release with more keys writes the same bytes."""
        values = {"name": self.name, "protocol_version": self.protocol_version}
        return json.dumps(values | self.model_dump(mode="json", exclude_defaults=True)).encode()

    @classmethod
    def _validated(cls, values: Mapping[str, Any]) -> Self:
        version = values.get("protocol_version", PROTOCOL_VERSION)
        if version != PROTOCOL_VERSION:
            raise SwarmError(
                f"the manifest asks for protocol version {version}, this software speaks {PROTOCOL_VERSION}: leave "
                "protocol_version out of it"
            )
        return cls.model_validate(values)

    @property
    def width(self) -> int:
        """Columns of the rows that are sent to experts and back; at most `model.hidden`."""
        return self.experts.width or self.model.hidden

    @property
    def gate_width(self) -> int:
        """Columns that gates read; at most `model.hidden`."""
        return self.routing.gate_width or self.model.hidden

    @property
    def score_sizes(self) -> tuple[int, ...]:
        """The sizes of a gate's score tables: those of the grid with product keys, else the number of experts."""
        return self.experts.grid if self.routing.product_keys else (self.experts.count,)

    @property
    def expert_model(self) -> ModelSpec:
        """The sizes that experts are built with: the model's, with the experts' own sizes, and `width` in place of
        `hidden`.
        """
        experts = self.experts
        sizes = {
            "hidden": self.width,
            "heads": self._expert_heads,
            "head_size": experts.head_size,
            "feed_forward": experts.feed_forward or self.model.feed_forward,
        }
        return self.model.model_copy(update=sizes)

    @property
    def _expert_heads(self) -> int:
        experts, heads = self.experts, self.model.heads
        if experts.heads or experts.head_size:
            return experts.heads or heads
        return next((n for n in range(heads, 1, -1) if self.width % (2 * n) == 0), 1)

    @property
    def experts_total(self) -> int:
        """Experts in all layers."""
        return self.model.layers * self.experts.count

    def uids(self) -> list[UID]:
        """Every expert of the swarm, in order."""
        return [
            UID(layer, coordinate)
            for layer in range(self.model.layers)
            for coordinate in grid_coordinates(self.experts.grid)
        ]

    def holds(self, uid: UID) -> bool:
        """Whether the UID is on this swarm's grid."""
        return (
            0 <= uid.layer < self.model.layers
            and len(uid.coordinate) == len(self.experts.grid)
            and all(0 <= x < size for x, size in zip(uid.coordinate, self.experts.grid, strict=True))
        )


def set_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a founder's file sets, with their values. Those in tables are named like `model.hidden`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": each for inner, each in value.items()}
        else:
            found[key] = value
    return found


def _in_toml(value: object) -> str:
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)


class _Versioned(BaseModel):
    """Reads only the version, to tell a manifest of another version from a broken one."""

    protocol_version: int


def parse_uid(text: str, manifest: Manifest) -> UID:
    """Raises WireError if the text is not the UID of an expert on the swarm's grid."""
    uid = UID.parse(text)
    if not manifest.holds(uid):
        raise WireError(
            f"{uid} is not on this swarm's grid of {manifest.model.layers} × {manifest.experts.grid}"
        )
    return uid
