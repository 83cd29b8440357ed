"""How models that read a memory are compared, and that nothing held out is in their store."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.retro.goals import Compared, verdicts
from benchmarks.retro.runs import OVERLAPS, QUICK, SHARES, HeldOut, Size, World
from benchmarks.retro.store import Store
from dht.memory import Passage
from trainer_client.retrieval.neighbours import Runs, document_of


def results(gain: float, noise: float = 0.0) -> dict[str, Any]:
    """Of two seeds and four sequences: real neighbours gain so much, and it varies by `noise`."""
    runs = {}
    for seed in range(2):
        base = [2.0 + 0.1 * n for n in range(4)]
        real = [each - gain + (noise if n % 2 else -noise) for n, each in enumerate(base)]
        reads = dict.fromkeys((f"real {each}" for each in OVERLAPS), real)
        reads |= {f"share {share}": base for share in SHARES} | {"random": base, "nothing": base}
        runs[f"reads {seed}"] = {"bits_per_byte": {"python": reads}}
        runs[f"deeper {seed}"] = {"bits_per_byte": {"python": {"nothing": base}}}
    return {"learning": runs}


@pytest.mark.parametrize(
    ("gain", "noise", "is_reached"), [(0.2, 0.0, True), (0.0, 0.0, False), (0.2, 0.5, False)]
)
def test_a_gain_counts_beyond_two_standard_errors(gain: float, noise: float, is_reached: bool) -> None:
    wanted = [each for each in verdicts(results(gain, noise)) if each.goal == "more than the error"]
    assert [each.is_reached for each in wanted] == [is_reached]
    assert not [each for each in verdicts(results(gain, noise), is_quick=True) if each.words]


def test_the_standard_error_is_that_of_the_mean_over_sequences() -> None:
    compared = Compared(results(0.2, 0.1)["learning"])
    gain, error = compared.gain_and_error("real 50%", "random")
    assert gain == pytest.approx(0.2)
    # four sequences that are off by 0.1: the deviation is 0.1 * sqrt(4 / 3)
    assert error == pytest.approx(0.1 * (4 / 3) ** 0.5 / 2)


@pytest.mark.parametrize("size", [Size(), QUICK])
def test_the_deeper_model_costs_as_much_as_the_one_that_reads(size: Size) -> None:
    reads, deeper = size.flops(size.layers, reads=True), size.flops(size.deeper, reads=False)
    one_less = size.flops(size.deeper - 1, reads=False)
    assert one_less < 0.99 * reads <= deeper


def test_nothing_held_out_is_in_the_store_and_no_passage_is_of_its_own_document(tmp_path: Path) -> None:
    store = Store(tmp_path, 1e5, QUICK.context, QUICK.vocabulary, QUICK.spec)
    there = {document_of(passage) for passage in store.passages}
    for name in store.learned:
        assert not {document for document, _ in store.held_out[name]} & there
        assert {document for document, _ in store.learned[name]} >= {
            document_of(each)
            for each, domain in zip(store.passages, store.domains, strict=True)
            if domain == name
        }
    known = store.where(store.names)
    learned = store.sequences([each for name in store.names for each in store.learned[name]], 6, known)
    for row, document in enumerate(learned.documents):
        for some in learned.candidates_SUK[row]:
            assert document not in {document_of(store.passages[n]) for n in some.tolist()}
    given = store.neighbours(learned, 0.0)
    by_tokens: dict[tuple[int, ...], list[Passage]] = {}
    for number, passage in enumerate(store.passages):
        by_tokens.setdefault(tuple(store.tokens(number).tolist()), []).append(passage)
    for some, chunks in zip(given, learned.chunks, strict=True):
        for tokens_NL, chunk in zip(some, chunks, strict=True):
            for tokens_L in tokens_NL[tokens_NL[:, 0] >= 0]:
                overlaps = [
                    Runs(chunk.target).overlap(each.text) for each in by_tokens[tuple(tokens_L.tolist())]
                ]
                assert min(overlaps) == 0


def test_a_world_that_was_saved_is_the_same(tmp_path: Path) -> None:
    tokens, given = torch.arange(12).view(3, 4), torch.full((3, 1, 2, 5), -1)
    world = World(
        QUICK, tokens, given, {"python": HeldOut(tokens, {"real": given})}, torch.arange(9).numpy(), {"a": 1}
    )
    world.save(tmp_path / "world")
    again = World.load(tmp_path / "world", QUICK)
    assert torch.equal(again.tokens_ST, tokens)
    assert torch.equal(again.tested["python"].given["real"], given)
    assert (again.bytes_V.tolist(), json.dumps(again.about)) == (list(range(9)), '{"a": 1}')
