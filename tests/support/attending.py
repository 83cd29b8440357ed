"""Transformer experts as after some training: at first their attention adds nothing, and a test would not see it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import nn

from expert_server.blocks import OWN_KINDS


def attend(block: nn.Module) -> nn.Module:
    """Draws the matrix that starts at zero."""
    for name, parameter in block.named_parameters():
        if name == "attention_output.weight":
            nn.init.xavier_uniform_(parameter)
    return block


@contextmanager
def attending_experts() -> Iterator[None]:
    """Experts that are built in this process meanwhile attend from the start."""
    build = OWN_KINDS["transformer"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OWN_KINDS, "transformer", lambda model, **changes: attend(build(model, **changes)))
        yield
