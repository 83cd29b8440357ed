"""Trains an exported model further on your own text, on this machine alone. Talkoot need not be installed.

    pip install torch transformers
    talkoot export --join INVITE -o model
    python examples/fine_tune.py model mine.txt --out my-model

The result is a model folder too: `talkoot serve --model` serves it, and `talkoot import` starts a swarm from it. With a
text that the swarm's model has not been trained on, the loss falls on the held-out part of the text.
"""

import argparse
import os
import time
from pathlib import Path

# torch's threads must not spin while they wait: if other programs use the cores, a small model is many times
# slower. OpenMP reads this when torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

HELD_OUT = 0.1
"""The share of the text that is held out: its end."""


def pieces(tokens_N: Tensor, context: int) -> Tensor:
    """Cuts the text into pieces [pieces, context + 1]; what is left at the end is dropped. Each piece begins with the
    last token of the previous one.
    """
    return tokens_N.unfold(0, context + 1, context)


def loss_of(model: nn.Module, pieces_BT: Tensor) -> Tensor:
    """The loss in nats per token."""
    logits_BTV = model(input_ids=pieces_BT[:, :-1]).logits
    loss: Tensor = nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), pieces_BT[:, 1:].flatten())
    return loss


@torch.no_grad()
def held_out_loss(model: nn.Module, pieces_BT: Tensor, batch_size: int) -> float:
    model.eval()
    total = 0.0
    for first in range(0, len(pieces_BT), batch_size):
        batch_BT = pieces_BT[first : first + batch_size]
        total += len(batch_BT) * loss_of(model, batch_BT).item()
    model.train()
    return total / len(pieces_BT)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="the folder of an exported model")
    parser.add_argument("text", type=Path, help="a file of text in UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the result")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    options = parser.parse_args()
    # otherwise transformers would download a model of this name, and run its Python
    if not options.model.is_dir():
        parser.error(f"no folder {options.model}: pass one that `talkoot export` wrote")
    if not options.text.is_file():
        parser.error(f"no file {options.text}: pass one with your text")

    # the folder's two Python files are Talkoot's own; its README.md has their checksums
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True)
    context = model.config.max_position_embeddings
    # not verbose: the text is longer than the context, and is cut below
    tokens_N = torch.tensor(tokenizer(options.text.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    pieces_BT = pieces(tokens_N, context)
    held_out = max(1, round(HELD_OUT * len(pieces_BT)))
    if len(pieces_BT) <= held_out:
        raise SystemExit(f"the text has {len(tokens_N)} tokens: give one of at least {2 * context + 1}")
    training_BT, held_out_BT = pieces_BT[:-held_out], pieces_BT[-held_out:]

    print(f"step 0: held-out loss {held_out_loss(model, held_out_BT, options.batch_size):.4f}", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    generator = torch.Generator().manual_seed(0)
    model.train()
    start_s = time.monotonic()
    for step in range(1, options.steps + 1):
        drawn = torch.randint(len(training_BT), (options.batch_size,), generator=generator)
        loss = loss_of(model, training_BT[drawn])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            step_s = time.monotonic() - start_s
            print(f"a step takes {step_s:.1f} s: about {options.steps * step_s:.0f} s in all", flush=True)
        if step % 50 == 0 or step == options.steps:
            loss_now = held_out_loss(model, held_out_BT, options.batch_size)
            print(f"step {step}: held-out loss {loss_now:.4f}", flush=True)

    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"saved in {options.out}")


if __name__ == "__main__":
    main()
