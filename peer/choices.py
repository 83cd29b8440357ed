"""What a manifest chooses by name for layers and their training. It imports no torch: see `peer.codec`."""

from typing import Literal, TypeAlias

Norm: TypeAlias = Literal["layer", "rms"]
Activation: TypeAlias = Literal["gelu", "swiglu", "geglu"]
OptimizerName: TypeAlias = Literal["adamw", "adam", "sgd"]


def check_heads(hidden: int, heads: int, head_size: int | None, name: str = "hidden") -> None:
    """Raises ValueError if a head has an odd number of columns: rotary positions turn pairs of them."""
    if head_size is None and hidden % (2 * heads):
        raise ValueError(
            f"{name} ({hidden}) must be an even multiple of heads ({heads}), unless head_size is set"
        )
    if head_size is not None and head_size % 2:
        raise ValueError(f"head_size ({head_size}) must be even")
