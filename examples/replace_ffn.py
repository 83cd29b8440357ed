"""A small Transformer of your own, whose feed-forward blocks are replaced by the experts of a swarm.

    talkoot node --new deploy/swarm.toml --host 127.0.0.1      # prints the invite
    python examples/replace_ffn.py INVITE --steps 50

The model learns to repeat what it has read: the numbers 0 to 15 in some order, then the same again.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import talkoot

SYMBOLS = 16


class Block(nn.Module):
    """Attention and a feed-forward block, each with a residual connection."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.attention = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.feed_forward: nn.Module = FeedForward(hidden)

    def forward(self, x_BTD: Tensor) -> Tensor:
        later_TT = nn.Transformer.generate_square_subsequent_mask(x_BTD.shape[1])
        z_BTD = self.norm(x_BTD)
        attended_BTD, _ = self.attention(z_BTD, z_BTD, z_BTD, attn_mask=later_TT, is_causal=True)
        output_BTD: Tensor = self.feed_forward(x_BTD + attended_BTD)
        return output_BTD


class FeedForward(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden)
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        output_BTD: Tensor = x_BTD + self.layers(x_BTD)
        return output_BTD


class Model(nn.Module):
    def __init__(self, hidden: int, layers: int, heads: int = 4) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS, hidden)
        self.positions = nn.Embedding(2 * SYMBOLS, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        self.head = nn.Linear(hidden, SYMBOLS)

    def forward(self, symbols_BT: Tensor) -> Tensor:
        x_BTD = self.symbols(symbols_BT) + self.positions(torch.arange(symbols_BT.shape[1]))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV: Tensor = self.head(x_BTD)
        return logits_BTV


def batches(sequences: int) -> Iterator[Tensor]:
    while True:
        half_BT = torch.rand(sequences, SYMBOLS).argsort(dim=1)
        yield half_BT.repeat(1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("invite")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--state", metavar="DIR", help="folder of the trainer's identity")
    options = parser.parse_args()
    torch.manual_seed(0)
    with talkoot.SwarmClient.join(options.invite, state=options.state) as swarm:
        spec = swarm.manifest.model
        model = Model(spec.hidden, spec.layers)
        for number, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            block.feed_forward = swarm.mixture(layer=number)  # all that changes
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step, symbols_BT in zip(range(options.steps), batches(16), strict=False):
            logits_BTV = model(symbols_BT[:, :-1])[:, SYMBOLS - 1 :]
            loss = F.cross_entropy(logits_BTV.flatten(0, 1), symbols_BT[:, SYMBOLS:].flatten())
            optimizer.zero_grad()
            torch.autograd.backward(loss)  # the experts take their own steps
            optimizer.step()
            talkoot.rebalance(model)  # so that all experts get about as many rows
            swarm.report(step + 1, loss.item())  # for dashboards
            if step % 10 == 0 or step == options.steps - 1:
                print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    main()
