"""hivemind's own expert modules as expert kinds of Talkoot, so that both sides compute exactly the same.

`benchmarks.village` offers them to the nodes that it starts.
"""

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
