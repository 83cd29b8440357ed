"""Run as a program: loads model folders with `transformers` where Talkoot can't be imported, and writes what came out.

`loads_with_transformers.py WORK SENTENCE`: for each folder WORK/NAME it reads WORK/NAME.in.safetensors, with tokens
[B, T], and writes WORK/NAME.out.safetensors. What is wrong in itself is an AssertionError.
"""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

for package in ("peer", "dht", "expert_server", "trainer_client", "talkoot"):
    sys.modules[package] = None  # type: ignore[assignment]  # so that its import fails

import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache  # noqa: E402

_GENERATED = 4


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@contextmanager
def choices_of(model: Any) -> Iterator[list[Tensor]]:
    """The experts [R, K] that each mixture chooses."""
    found: list[Tensor] = []
    kept = [mixture._route for mixture in model.mixtures]

    def recording(route: Any) -> Any:
        def routed(*given: Any) -> tuple[Tensor, Tensor]:
            numbers, weights = route(*given)
            found.append(numbers)
            return numbers, weights

        return routed

    for mixture, route in zip(model.mixtures, kept, strict=True):
        mixture._route = recording(route)
    yield found
    for mixture, route in zip(model.mixtures, kept, strict=True):
        mixture._route = route


def check_cached(model: Any, tokens: Tensor, logits: Tensor, least: int) -> None:
    """Checks that a text in pieces gives the same logits as the whole text."""
    cache, length = DynamicCache(config=model.config), tokens.shape[1]
    ends = [least + 1, least + 2, least + 5, *range(least + 6, length + 1)]
    for start, end in zip([0, *ends], ends, strict=False):
        output = model(tokens[:, start:end], past_key_values=cache, use_cache=True)
        close(output.logits, logits[:, start:end])
    assert cache.get_seq_length() == length


def check_padded(model: Any, tokens: Tensor, logits: Tensor, least: int) -> None:
    """Checks that a shorter text gives the same logits in a batch with a longer one, and the same loss."""
    short, length = least + 3, tokens.shape[1]
    mask = torch.ones_like(tokens)
    mask[0, : length - short] = 0
    padded = tokens.clone()
    padded[0, length - short :] = tokens[0, :short]
    padded[0, : length - short] = 7
    close(model(padded, attention_mask=mask).logits[0, length - short :], logits[0, :short])
    close(model(padded, attention_mask=mask).logits[1:], logits[1:])
    loss = model(padded[:1], attention_mask=mask[:1], labels=padded[:1]).loss
    close(loss, model(tokens[:1, :short], labels=tokens[:1, :short]).loss)
    inputs = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 2, "pad_token_id": 0}
    head, mask_of_head = padded[:, :-2], mask[:, :-2]
    both = model.generate(head, **inputs | {"attention_mask": mask_of_head})
    alone = model.generate(tokens[:1, : short - 2], **inputs | {"attention_mask": None})
    assert both[0, -2:].tolist() == alone[0, -2:].tolist()


def check_generation(model: Any, tokens: Tensor, least: int) -> Tensor:
    """Greedy tokens after the first ones. Checks that cached and uncached results agree, also with beam search."""
    prompt = tokens[:2, : least + 2]
    given = {
        "do_sample": False,
        "max_new_tokens": _GENERATED,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(prompt),
    }
    greedy: Tensor = model.generate(prompt, **given)
    assert torch.equal(greedy, model.generate(prompt, **given, use_cache=False))
    beams = model.generate(prompt, **given, num_beams=3)
    assert torch.equal(beams, model.generate(prompt, **given, num_beams=3, use_cache=False))
    return greedy[:, least + 2 :]


def check_saved(model: Any, tokens: Tensor, logits: Tensor, folder: Path) -> None:
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    close(again(tokens).logits, logits)
    tokenizer = AutoTokenizer.from_pretrained(
        folder.with_name(folder.name.removesuffix("-saved")), trust_remote_code=True
    )
    tokenizer.save_pretrained(folder)


def check_training(model: Any, tokens: Tensor) -> Tensor:
    loss: Tensor = model(tokens, labels=tokens).loss
    torch.autograd.backward(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    gates = [mixture.gate.linear.weight.grad for mixture in model.mixtures]
    assert any(grad is not None and grad.abs().sum() > 0 for grad in gates)
    model.zero_grad()
    return loss.detach()


def check_half_precision(folder: Path, tokens: Tensor, logits: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    found = model(tokens).logits
    assert found.dtype is torch.bfloat16
    # Some tokens go to other experts.
    assert (found - logits).abs().median() < 0.1 * logits.abs().median()
    model.generate(tokens[:2], attention_mask=None, max_new_tokens=1, pad_token_id=0)


def check_refusals(model: Any, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="at most"):
        model(tokens[:1].expand(2, -1).repeat(1, 1 + model.config.max_position_embeddings // tokens.shape[1]))
    if model.config.prefix:
        with pytest.raises(ValueError, match=f"continues texts of {model.config.prefix} tokens or more"):
            model(tokens[:, : model.config.prefix - 1], use_cache=True)
    for part, key, value in (("manifest", "kind", "conv"), ("routing", "router", "other")):
        config = copy.deepcopy(model.config)
        values = config.manifest["experts"] if part == "manifest" else config.routing
        values[key] = value
        with pytest.raises(ValueError, match=f"'{value}'"):
            type(model)(config)


def read(folder: Path, sentence: str) -> None:
    tokens = load_file(folder.with_name(folder.name + ".in.safetensors"))["tokens"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "TalkootForCausalLM"
    assert model.dtype is torch.float32
    least = max(1, model.config.prefix)
    few = tokens[:4, : min(tokens.shape[1], least + 9)]
    with torch.no_grad():
        with choices_of(model) as choices:
            logits = model(tokens).logits
        some = model(few).logits
        check_cached(model, few, some, least)
        check_padded(model, few, some, least)
        generated = check_generation(model, few, least)
        check_saved(model, few, some, folder.with_name(folder.name + "-saved"))
        close(model(few, logits_to_keep=2).logits, some[:, -2:])
        check_half_precision(folder, few[:, :-1], some[:, :-1])
        check_refusals(model, few)
    loss = check_training(model, few)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer(sentence)["input_ids"]
    assert tokenizer.decode(ids) == sentence
    found = {
        "logits": logits,
        "choices": torch.stack(choices),
        "generated": generated,
        "loss": loss,
        "ids": torch.tensor(ids),
    }
    save_file(
        {name: t.contiguous() for name, t in found.items()},
        folder.with_name(folder.name + ".out.safetensors"),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for path in sorted(Path(sys.argv[1]).glob("*.in.safetensors")):
        read(path.with_name(path.name.removesuffix(".in.safetensors")), sys.argv[2])
