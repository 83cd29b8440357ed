"""hivemind's own expert modules as kinds of ours, so that both sides compute the very same thing.

Offered through the entry point group `talkoot.expert_kinds`; the benchmark puts a package folder that names them on the
path of the processes it starts.
"""

import tempfile
from pathlib import Path

from hivemind.moe.server.layers.common import FeedforwardBlock, TunedTransformer
from torch import Tensor, nn

from dht.manifest import ModelSpec

SEQUENCE = 128
"""Rows of a sequence that hivemind's transformer expert wants."""


class RivalFeedForward(nn.Module):
    """hivemind's `ffn` expert."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        self.block = FeedforwardBlock(model.hidden)

    def forward(self, x_RD: Tensor, lengths_S: Tensor, positions_R: Tensor) -> Tensor:
        output_RD: Tensor = self.block(x_RD)
        return output_RD


class RivalTransformer(nn.Module):
    """hivemind's `transformer` expert, on whole sequences."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        self.block = TunedTransformer(model.hidden)

    def forward(self, x_RD: Tensor, lengths_S: Tensor, positions_R: Tensor) -> Tensor:
        x_STD = x_RD.view(len(lengths_S), SEQUENCE, -1)
        output_RD: Tensor = self.block(x_STD).flatten(0, 1)
        return output_RD


def make_package() -> Path:
    """A folder that offers the kinds `rival-ffn` and `rival-transformer` to whoever has it on the path."""
    folder = Path(tempfile.mkdtemp(prefix="talkoot-benchmark-"))
    package = folder / "talkoot_rivals-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: talkoot-rivals\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        "[talkoot.expert_kinds]\n"
        f"rival-ffn = {__name__}:RivalFeedForward\n"
        f"rival-transformer = {__name__}:RivalTransformer\n"
    )
    return folder
