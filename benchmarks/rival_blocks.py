"""hivemind's own expert modules as expert kinds of Talkoot, so that both sides compute exactly the same.

They are offered through the entry point group `talkoot.expert_kinds`. The benchmark puts a package folder that names
them on the path of the processes it starts.
"""

from pathlib import Path

from hivemind.moe.server.layers.common import FeedforwardBlock, TunedTransformer
from torch import Tensor, nn

from dht.manifest import ModelSpec

SEQUENCE = 128
"""The number of rows of a sequence that hivemind's transformer expert needs."""


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


def make_package(folder: Path) -> Path:
    """Makes the folder, which offers `rival-ffn` and `rival-transformer` to processes that have it on their path."""
    package = folder / "talkoot_rivals-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: talkoot-rivals\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        "[talkoot.expert_kinds]\n"
        f"rival-ffn = {__name__}:RivalFeedForward\n"
        f"rival-transformer = {__name__}:RivalTransformer\n"
    )
    return folder
