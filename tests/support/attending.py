"""Transformer experts as after some training: untrained, their attention adds nothing, and tests would not notice
it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import nn

from expert_server.blocks import OWN_KINDS


def attend(block: nn.Module) -> nn.Module:
    """Gives the matrix that starts at zero random values."""
    for name, parameter in block.named_parameters():
        if name == "attention_output.weight":
            nn.init.xavier_uniform_(parameter)
    return block


@contextmanager
def attending_experts() -> Iterator[None]:
    """Experts that are built in this process until the block ends have attention from the start."""
    build = OWN_KINDS["transformer"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OWN_KINDS, "transformer", lambda model, **changes: attend(build(model, **changes)))
        yield
