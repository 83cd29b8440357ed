"""Presets: model settings that were measured (docs/recipe.md). They complete the file that founds a swarm.

A manifest names its preset, so that trainers know the settings that go with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from peer.errors import WireError

if TYPE_CHECKING:
    from peer.codec import CodecName

PresetName: TypeAlias = Literal["transformer", "ffn", "paper", "none"]
Values: TypeAlias = Mapping[str, Any]
"""The content of a founder's file: keys, and tables of keys."""

_LARGEST_HEAD: Final = 512


@dataclass(frozen=True)
class Preset:
    """The values for keys that a founder's file leaves out."""

    tables: Mapping[str, Values]
    """Tables that do not depend on the model's sizes."""
    feed_forward: float
    """The inner size of feed-forward blocks, as a multiple of hidden. For narrow experts, it holds at half width, and
    other widths compute as much.
    """
    is_narrow: bool = False
    """Whether experts are narrower than hidden."""
    head_size: float | None = None
    """The size of an expert's only head, as a share of hidden. None: experts have the model's heads."""
    codec: "CodecName | None" = None
    """None: the narrowest codec that costs at most 0.5% of the loss."""

    def sizes(self, hidden: int, width: int | None) -> dict[str, dict[str, Any]]:
        """The keys that depend on the model's hidden size. `width`: the experts' width, if the file gives it."""
        feed_forward = self.feed_forward
        if width is None and self.is_narrow:
            width = _narrow(hidden)
            # all widths take the same amount of computing, projections included
            feed_forward += hidden / width - 2
        width = width or hidden
        experts = {}
        if width < hidden:
            experts["width"] = width
        if self.head_size is not None:
            experts |= {"heads": 1, "head_size": min(_LARGEST_HEAD, _near(self.head_size * hidden))}
        return {
            "model": {"feed_forward": _near(feed_forward * hidden)},
            "experts": experts,
            "wire": {"codec": self.codec or _narrowest_codec(width)},
        }


_OPTIMIZER = {"learning_rate": 2e-3, "warmup_updates": 20}
_INSTEAD_OF_FEED_FORWARD = {"layers": 2, "local": "attention", "local_layers": 0}

PRESETS: Final[Mapping[str, Preset]] = {
    "transformer": Preset(
        {
            "model": _INSTEAD_OF_FEED_FORWARD,
            "experts": {"grid": (8, 8), "kind": "transformer"},
            "optimizer": _OPTIMIZER,
        },
        feed_forward=19 / 12,
        is_narrow=True,
        head_size=1 / 12,
    ),
    "ffn": Preset(
        {
            "model": _INSTEAD_OF_FEED_FORWARD,
            "experts": {"grid": (8, 8), "kind": "ffn"},
            "optimizer": _OPTIMIZER,
        },
        feed_forward=1.0,
    ),
    "paper": Preset(
        {
            "model": {"layers": 2, "hidden": 64, "context": 64},
            "experts": {"grid": (8, 16), "kind": "transformer"},
            "optimizer": _OPTIMIZER,
        },
        feed_forward=2.0,
        codec="fp32",
    ),
}
"""`transformer` and `ffn` learned best with their kind of experts. `paper` is the experiment of Ryabinin & Gusev 2020,
section 4.3, as `benchmarks.paper` trains it: 256 experts in all.
"""


def default_preset(values: Values) -> PresetName:
    """The preset of a file that names none: that of its kind of experts, or else `transformer`."""
    experts = values.get("experts")
    kind = experts.get("kind") if isinstance(experts, Mapping) else None
    return "ffn" if kind == "ffn" else "transformer"


def completed(values: Values, more: Values) -> dict[str, Any]:
    """The values, and those of `more` for keys that they lack."""
    result = {**more, **values}
    for key, table in more.items():
        own = values.get(key)
        if isinstance(own, Mapping) and isinstance(table, Mapping):
            result[key] = {**table, **own}
    return result


def _near(size: float) -> int:
    """A multiple of 8, which processors handle fast."""
    return max(8, 8 * round(size / 8))


def _narrow(hidden: int) -> int:
    """The width nearest to 7/16 of hidden that consists of whole int4 blocks."""
    block = 16 if hidden < 256 else 64
    return min(hidden, max(block, block * round(7 * hidden / 16 / block)))


def _narrowest_codec(width: int) -> "CodecName":
    from peer.codec import block_of_int4  # here: it loads numpy, which reading settings must not

    try:
        block_of_int4(width)
    except WireError:
        return "int8"
    return "int4"
