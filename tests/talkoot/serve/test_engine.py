"""The engine: streams share batches as if each were alone, start and stop at any time, and fail alone."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import pytest
import torch
from served_model import LIMIT_S, small_model
from torch import Tensor

from peer.errors import UnavailableError
from talkoot.serve.engine import Advance, Engine, EngineError, Job, Piece, Stream, Writing
from talkoot.serve.model import ServedModel
from trainer_client.decoding import Decoding, TextDecoder
from trainer_client.inference import decoded, generate
from trainer_client.model import LanguageModel
from trainer_client.settings import Sampling

T = TypeVar("T")


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return small_model()


class CountedDecoder(TextDecoder):
    """Counts sequences that have begun and not ended. It can be made to fail or wait."""

    def __init__(self, model: ServedModel) -> None:
        assert isinstance(model.model, LanguageModel)
        super().__init__(model.model)
        self.open: set[Decoding] = set()
        self.batches: list[int] = []
        self.before: Callable[[], None] = lambda: None

    def begin(self, prompt: Sequence[int], written: Sequence[int] = ()) -> Decoding:
        decoding = super().begin(prompt, written)
        self.open.add(decoding)
        end = decoding.end

        def ended() -> None:
            self.open.discard(decoding)
            end()

        decoding.end = ended  # type: ignore[method-assign]  # so that ends are counted
        return decoding

    def logits(self, sequences: Sequence[Decoding]) -> Tensor:
        self.before()
        self.batches.append(len(sequences))
        return super().logits(sequences)


def job(text: str, tokens: int, seed: int = 0, **changes: Any) -> Job:
    return Job(list(text.encode()), Sampling(max_tokens=tokens, seed=seed), **changes)


async def whole(stream: Stream) -> Piece:
    async with asyncio.timeout(LIMIT_S):
        return Piece.joined([piece async for piece in stream])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110  # another thread's state
            await asyncio.sleep(0.002)


def run(
    model: ServedModel, scenario: Callable[[Engine, CountedDecoder], Coroutine[Any, Any, T]], places: int = 8
) -> T:
    decoder = CountedDecoder(model)

    async def scene() -> T:
        engine = Engine(Writing(decoder), model.token_bytes, places, asyncio.get_running_loop())
        try:
            result = await scenario(engine, decoder)
            await until(lambda: not decoder.open)
            return result
        finally:
            await asyncio.to_thread(engine.close)

    return asyncio.run(scene())


def alone(model: ServedModel, wanted: Job) -> str:
    return "".join(decoded(generate(model.model, wanted.prompt, wanted.sampling), model.token_bytes))


def test_streams_share_batches_and_are_as_if_alone(model: ServedModel) -> None:
    jobs = [job("In the sauna"[: 4 + n], 10 + 7 * n, seed=n) for n in range(6)]

    async def scenario(engine: Engine, decoder: CountedDecoder) -> tuple[list[Piece], list[int]]:
        answers = await asyncio.gather(*(whole(engine.begin(each, "a")) for each in jobs))
        return answers, decoder.batches

    answers, batches = run(model, scenario)
    assert [answer.text for answer in answers] == [alone(model, each) for each in jobs]
    assert [answer.tokens for answer in answers] == [each.sampling.max_tokens for each in jobs]
    assert {answer.finish for answer in answers} == {"length"}
    assert max(batches) == 6
    assert len(batches) < 60, "together, not one after another"


def test_a_stream_that_lost_its_place_goes_on_where_it_was(model: ServedModel) -> None:
    """This holds beyond the context length, too."""
    long = [job("In the sauna", 70, seed=n) for n in range(2)]
    short = [job("one must behave", 20, seed=n) for n in range(2)]

    async def scenario(engine: Engine, decoder: CountedDecoder) -> list[Piece]:
        answering = [asyncio.create_task(whole(engine.begin(each, "a"))) for each in long]
        await until(lambda: len(decoder.batches) > 5)
        answering += [asyncio.create_task(whole(engine.begin(each, "b"))) for each in short]
        answers = await asyncio.gather(*answering)
        assert max(decoder.batches) == 2
        return answers

    answers = run(model, scenario, places=2)
    assert [answer.text for answer in answers] == [alone(model, each) for each in long + short]


def test_a_cancelled_stream_ends_and_frees_what_it_kept(model: ServedModel) -> None:
    async def scenario(engine: Engine, decoder: CountedDecoder) -> None:
        streams = [engine.begin(job("In the sauna", 10**6), "a") for _ in range(3)]
        await until(lambda: len(decoder.open) == 2)
        for stream in streams:
            engine.cancel(stream)
        await until(lambda: not decoder.open)
        assert (await whole(engine.begin(job("In the sauna", 3), "a"))).tokens == 3

    run(model, scenario, places=2)


def test_stop_sequences_end_a_stream(model: ServedModel) -> None:
    wanted = job("In the sauna", 60, seed=1)
    text = alone(model, wanted)
    stop = text[20:23]

    async def scenario(engine: Engine, decoder: CountedDecoder) -> Piece:
        return await whole(engine.begin(job("In the sauna", 60, seed=1, stops=(stop,), alternatives=0), "a"))

    answer = run(model, scenario)
    assert (answer.text, answer.finish) == (text[: text.index(stop)], "stop")
    assert [each.offset for each in answer.scored] == sorted(each.offset for each in answer.scored)
    assert all(each.offset < len(answer.text) for each in answer.scored)
    assert bytes(each.token for each in answer.scored).decode(errors="replace").startswith(answer.text)


def test_many_long_prompts_hold_up_no_other_text(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole prompt costs as much as dozens of tokens, and one client sends nothing else."""
    monkeypatch.setattr("talkoot.serve.engine.MOST_ROWS", 128)
    writing = Writing(CountedDecoder(model))
    greedy = [Stream(job("a" * 50, 9, seed=n), "greedy", model.token_bytes) for n in range(8)]
    modest = Stream(job("In the sauna", 9), "modest", model.token_bytes)

    def grown(*streams: Stream) -> list[Stream]:
        advances = writing.compute(streams)
        pieces = [advance and advance(frozenset()) for advance in advances]
        return [stream for stream, piece in zip(streams, pieces, strict=True) if piece]

    assert grown(*greedy, modest) == greedy[:2]
    # now it is the modest client's turn, although its text came last
    assert grown(*greedy, modest) == [*greedy[:4], modest]
    assert grown(*greedy, modest) == [*greedy[:6], modest]
    assert grown(*greedy, modest) == [*greedy, modest]


def test_texts_of_one_client_take_turns_if_no_rows_are_kept(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("talkoot.serve.engine.MOST_ROWS", 128)
    decoder = CountedDecoder(model)
    decoder._can_extend = lambda: False
    writing = Writing(decoder)
    streams = [Stream(job("a" * 30, 9, seed=n), "a client", model.token_bytes) for n in range(8)]

    def grown() -> list[int]:
        advances = writing.compute(streams)
        return [n for n, advance in enumerate(advances) if advance and advance(frozenset())]

    assert [grown() for _ in range(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_prediction_that_is_not_finite_ends_one_stream(model: ServedModel) -> None:
    class Broken(CountedDecoder):
        def logits(self, sequences: Sequence[Decoding]) -> Tensor:
            logits_SV = super().logits(sequences)
            broken = [sequence.tokens[0] == ord("X") for sequence in sequences]
            logits_SV[torch.tensor(broken)] = torch.nan
            return logits_SV

    async def scene() -> None:
        engine = Engine(Writing(Broken(model)), model.token_bytes, 8, asyncio.get_running_loop())
        try:
            good, bad = engine.begin(job("In", 30), "a"), engine.begin(job("Xn", 30), "a")
            with pytest.raises(EngineError, match="not finite"):
                await whole(bad)
            assert (await whole(good)).tokens == 30
        finally:
            await asyncio.to_thread(engine.close)

    asyncio.run(scene())


def test_a_piece_names_the_nodes_that_answered_in_all_rounds_since_the_last_one() -> None:
    """An answer to a question takes many rounds. In the first one, it waits."""
    rounds = iter([{"Urho"}, {"Aino"}, {"Eino"}, set[str](), {"Veikko"}])

    class Slow:
        def __init__(self) -> None:
            self.rounds = 0
            self.waiting: Sequence[Stream] = ()

        def compute(self, streams: Sequence[Stream]) -> list[Advance | None]:
            self.rounds += 1
            self.waiting = streams if self.rounds == 1 else ()
            finish = {4: None, 5: "stop"}
            if self.rounds not in finish:
                return [None]
            return [lambda nodes: Piece("so ", 1, finish=finish[self.rounds], nodes=nodes)]

        def close(self) -> None:
            pass

    async def scene() -> list[Piece]:
        loop = asyncio.get_running_loop()
        engine = Engine(Slow(), [], 8, loop, nodes=lambda: frozenset(next(rounds)))
        pieces: list[Piece] = []
        stream = engine.begin(job("where?", 9), "a")
        stream.put = pieces.append  # type: ignore[method-assign, assignment]  # else it would join them
        try:
            await until(lambda: len(pieces) == 2)
        finally:
            await asyncio.to_thread(engine.close)
        return pieces

    assert [piece.nodes for piece in asyncio.run(scene())] == [{"Aino", "Eino"}, {"Veikko"}]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (UnavailableError("no expert of this swarm answered"), "no expert"),
        (RuntimeError("what?"), "internal error"),
    ],
)
def test_a_fault_ends_the_streams_and_later_ones_are_answered(
    model: ServedModel, fault: Exception, said: str
) -> None:
    def fail() -> None:
        raise fault

    async def scenario(engine: Engine, decoder: CountedDecoder) -> None:
        decoder.before = fail
        streams = [engine.begin(job("In the sauna", 9), "a") for _ in range(3)]
        for stream in streams:
            with pytest.raises(EngineError, match=said):
                await whole(stream)
        decoder.before = lambda: None
        assert (await whole(engine.begin(job("In the sauna", 9), "a"))).tokens == 9

    run(model, scenario)


def test_what_a_slow_reader_misses_is_one_piece(model: ServedModel) -> None:
    async def scenario(engine: Engine, decoder: CountedDecoder) -> list[Piece]:
        stream = engine.begin(job("In the sauna", 40), "a")
        await until(lambda: len(decoder.batches) == 40 and not decoder.open)
        await asyncio.sleep(0)
        return [piece async for piece in stream]

    pieces = run(model, scenario)
    assert sum(piece.tokens for piece in pieces) == 40
    assert len(pieces) <= 2
    assert "".join(piece.text for piece in pieces) == alone(model, job("In the sauna", 40))


def test_closing_waits_for_no_stream(model: ServedModel) -> None:
    async def scenario(engine: Engine, decoder: CountedDecoder) -> None:
        for _ in range(20):
            engine.begin(job("In the sauna", 10**6), "a")
        await until(lambda: len(decoder.batches) > 2)
        await asyncio.to_thread(engine.close)
        assert not [thread for thread in threading.enumerate() if thread.name == "talkoot-engine"]
        with pytest.raises(EngineError, match="restart it"):
            engine.begin(job("In the sauna", 3), "a")

    run(model, scenario)


def test_closing_does_not_wait_for_experts_and_what_breaks_then_is_no_news(
    model: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    let_go = threading.Event()

    def wait_in_vain() -> None:
        assert let_go.wait(LIMIT_S)
        raise UnavailableError("no expert of this swarm answered")

    async def scenario(engine: Engine, decoder: CountedDecoder) -> None:
        decoder.before = wait_in_vain
        engine.begin(job("In the sauna", 9), "a")
        await until(lambda: bool(decoder.open))
        began = time.monotonic()
        await asyncio.to_thread(engine.close)
        assert time.monotonic() - began < LIMIT_S / 2
        assert engine.is_alive()
        let_go.set()
        await until(lambda: not engine.is_alive())

    run(model, scenario)
    assert not caplog.records


def test_a_fault_in_the_choice_of_one_token_breaks_off_no_other_answer(model: ServedModel) -> None:
    async def scenario(engine: Engine, decoder: CountedDecoder) -> Piece:
        broken = job("In the sauna", 20)
        # Something that no request can ask for.
        object.__setattr__(broken.sampling, "temperature", "hot")
        streams = [engine.begin(job("In the sauna", 20), "A"), engine.begin(broken, "B")]
        with pytest.raises(EngineError, match="an internal error"):
            await whole(streams[1])
        return await whole(streams[0])

    answer = run(model, scenario)
    assert (answer.tokens, answer.finish) == (20, "length")
