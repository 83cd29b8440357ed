"""The thread that continues all streams together, token by token. Streams join and leave between two tokens."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Protocol, Self, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from torch import Tensor

from dht.memory import Passage
from peer.errors import TalkootError, UserError
from peer.formatting import counted
from peer.metrics import SECONDS, start_at_zero
from talkoot.serve.schedule import FairSchedule
from talkoot.serve.text import TextStream
from talkoot.train.ask import Answered, QuestionAnswerer
from trainer_client.data.tokenizer import Tokenizer
from trainer_client.decoding import MOST_ROWS, Decoder, Decoding
from trainer_client.inference import make_generator, next_token
from trainer_client.settings import Sampling

logger: logging.Logger = logging.getLogger(__name__)

_INTERNAL = "an internal error; the server's log says more"
_CLOSE_S = 2.0
"""The longest wait for the current token when the engine closes: it may itself be waiting for experts."""


class EngineError(TalkootError):
    """Why an answer that had begun can't be continued."""


@dataclass(frozen=True)
class Job:
    """What a client wants to have continued."""

    prompt: Sequence[int]
    """For a model that answers questions, the tokens of `question`."""
    sampling: Sampling
    stops: tuple[str, ...] = ()
    alternatives: int | None = None
    """How many of the likeliest tokens to name at each place; None: no log probabilities at all."""
    question: str = ""
    """The question, for a model that answers questions."""


@dataclass(frozen=True)
class ScoredToken:
    """A token and its log probability in the model's prediction at temperature 1."""

    token: int
    logprob: float
    offset: int
    """How many characters of the answer were complete before it."""
    alternatives: tuple[tuple[int, float], ...]
    """The likeliest tokens with their log probabilities, the likeliest first."""


@dataclass(frozen=True)
class Piece:
    """A piece of an answer."""

    text: str = ""
    tokens: int = 0
    scored: tuple[ScoredToken, ...] = ()
    finish: str | None = None
    """Why the answer has ended: "stop" or "length"; None while it continues."""
    nodes: frozenset[str] = frozenset()
    """The nodes whose experts answered for this piece."""
    read: tuple[Passage, ...] = ()
    """Passages that the model was given for this piece."""

    @classmethod
    def joined(cls, pieces: Sequence["Piece"]) -> Self:
        """Joins at least one consecutive piece into one."""
        return cls(
            "".join(piece.text for piece in pieces),
            sum(piece.tokens for piece in pieces),
            tuple(chain.from_iterable(piece.scored for piece in pieces)),
            pieces[-1].finish,
            frozenset().union(*(piece.nodes for piece in pieces)),
            tuple(chain.from_iterable(piece.read for piece in pieces)),
        )


class Stream:
    """One answer while it is computed. Iterating yields its pieces; pieces that have accumulated are joined."""

    def __init__(self, job: Job, client: str, token_bytes: Sequence[bytes]) -> None:
        self.job = job
        self.client = client
        self.cancelled = False
        """Whether the client no longer wants the rest. Set under the engine's lock."""
        self.decoding: Decoding | None = None
        """Set while the stream has a place."""
        self.tokens = job.prompt
        """The tokens from which it continues when it gets a place."""
        self.asked_at: float = time.monotonic()
        self.has_begun = False
        self.nodes = set[str]()
        """The nodes that have worked for its next piece. For the engine's thread."""
        self.computed_in = 0
        """The last round in which it was computed as a whole. For the engine's thread."""
        self._text = TextStream(token_bytes, job.stops)
        self._generator = make_generator(job.sampling.seed)
        self._scored: list[ScoredToken] = []
        self._left = job.sampling.max_tokens
        self._pending: list[Piece] = []
        self._came = asyncio.Event()
        self._failed: EngineError | None = None

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Raises EngineError if the answer can't be continued."""
        while True:
            await self._came.wait()
            self._came.clear()
            if self._failed is not None:
                raise self._failed
            piece = Piece.joined(self._pending)
            self._pending.clear()
            yield piece
            if piece.finish is not None:
                return

    def put(self, news: Piece | EngineError) -> None:
        """Call it on the loop's thread."""
        if isinstance(news, EngineError):
            self._failed = news
        else:
            self._pending.append(news)
        self._came.set()

    def rest(self) -> None:
        """Frees the memory of the stream, which continues from the same tokens later."""
        if self.decoding is not None:
            self.tokens = list(self.decoding.tokens)
            self.decoding.end()
            self.decoding = None

    def advance(self, logits_V: Tensor, nodes: frozenset[str]) -> Piece:
        """Draws the next token. Raises UserError if the model's prediction is broken."""
        assert self.decoding is not None
        token = next_token(logits_V, self.job.sampling, self._generator)
        self.decoding.append(token)
        self._left -= 1
        if self.job.alternatives is not None:
            self._scored.append(self._score(logits_V, token, self._text.decoded))
        text = self._text.feed(token)
        if not self._left and not self._text.has_stopped:
            text += self._text.finish()
        finish = "stop" if self._text.has_stopped else None if self._left else "length"
        return Piece(text, 1, self._certain(finish), finish, nodes, self.decoding.take_read())

    def _certain(self, finish: str | None) -> tuple[ScoredToken, ...]:
        """The tokens whose text has been returned, at least in part. The others may turn out to belong to a stop
        sequence.
        """
        given = [each for each in self._scored if finish == "length" or each.offset < self._text.length]
        del self._scored[: len(given)]
        return tuple(given)

    def _score(self, logits_V: Tensor, token: int, offset: int) -> ScoredToken:
        logprobs_V = logits_V.log_softmax(dim=0)
        values, tokens = logprobs_V.topk(min(self.job.alternatives or 0, len(logprobs_V)))
        alternatives = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
        return ScoredToken(token, logprobs_V[token].item(), offset, alternatives)


class EngineMetrics:
    """What the engine counts."""

    def __init__(self, metrics: CollectorRegistry | None = None) -> None:
        self.tokens = start_at_zero(
            Counter(
                "talkoot_serve_tokens", "Tokens of prompts, and tokens generated.", ["kind"], registry=metrics
            ),
            "prompt",
            "generated",
        )
        self.first_token: Histogram = Histogram(
            "talkoot_serve_first_token_seconds",
            "From a request to the first token of its answer.",
            buckets=SECONDS,
            registry=metrics,
        )
        self.step: Histogram = Histogram(
            "talkoot_serve_step_seconds",
            "For one more token of the texts that are computed, or a look whether questions have been answered.",
            buckets=SECONDS,
            registry=metrics,
        )
        self.computed: Gauge = Gauge(
            "talkoot_serve_streams", "Answers that are computed now.", registry=metrics
        )
        self.waiting: Gauge = Gauge(
            "talkoot_serve_waiting", "Answers that wait for a place.", registry=metrics
        )


Advance: TypeAlias = Callable[[frozenset[str]], Piece]
"""A function that returns a stream's next piece. Its argument: the nodes that have worked for that piece. Raises
UserError.
"""


class Work(Protocol):
    """What is done in each round for the streams that have a place."""

    @property
    def waiting(self) -> Collection[Stream]:
        """The streams for which nothing was done in the last round."""

    def compute(self, streams: Sequence[Stream]) -> Sequence[Advance | None]:
        """The next step of each stream; None if a stream has nothing new. Raises UserError if none of them can be
        continued.
        """

    def close(self) -> None: ...


class Writing:
    """Writes texts, which grow by one token in each round.

    A text whose rows are not kept, such as a new prompt, must be computed as a whole. In each round, this is done for
    at most `MOST_ROWS` rows, or for one text, so that other texts grow meanwhile. Clients take turns, and so do the
    texts of each. Texts that nodes forget during a round are computed again on top of that.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.waiting: Set[Stream] = frozenset()
        self._decoder = decoder
        self._round = 0
        self._served: dict[str, int] = {}
        """The last round in which a whole text of each client was computed; for a new one, the round before it came."""

    def compute(self, streams: Sequence[Stream]) -> list[Advance | None]:
        decodings = {stream: self._decoding(stream) for stream in streams}
        whole = [stream for stream, decoding in decodings.items() if decoding.next_rows > 1]
        self.waiting = set(whole) - self._due(whole, decodings)
        chosen = [stream for stream in streams if stream not in self.waiting]
        logits_SV = self._decoder.logits([decodings[stream] for stream in chosen])
        advances = {
            stream: partial(stream.advance, logits_V)
            for stream, logits_V in zip(chosen, logits_SV, strict=True)
        }
        return [advances.get(stream) for stream in streams]

    def close(self) -> None:
        pass

    def _decoding(self, stream: Stream) -> Decoding:
        if stream.decoding is None:
            stream.decoding = self._decoder.begin(stream.tokens)
        return stream.decoding

    def _due(self, whole: Sequence[Stream], decodings: Mapping[Stream, Decoding]) -> set[Stream]:
        """Those of the whole texts that are computed in this round."""
        self._served = {stream.client: self._served.get(stream.client, self._round) for stream in decodings}
        self._round += 1
        due, rows = set[Stream](), 0
        for stream in sorted(whole, key=lambda each: (self._served[each.client], each.computed_in)):
            rows += decodings[stream].next_rows
            if due and rows > MOST_ROWS:
                break
            due.add(stream)
            self._served[stream.client] = stream.computed_in = self._round
        return due


class Answering:
    """Answers questions, each as a whole, as soon as the memory's hosts and the experts allow."""

    AT_ONCE = 4
    _ROUND_S = 0.1
    """The longest time until a new question is noticed."""
    waiting: Set[Stream] = frozenset()

    def __init__(self, questions: QuestionAnswerer, tokenizer: Tokenizer) -> None:
        self._questions, self._tokenizer = questions, tokenizer
        self._threads = ThreadPoolExecutor(self.AT_ONCE, "talkoot-answer")
        self._answers: dict[Stream, Future[Answered]] = {}
        """Answers that are being computed. An unwanted answer occupies its thread until its next token."""

    def compute(self, streams: Sequence[Stream]) -> list[Advance | None]:
        self._begin(streams)
        if not any(self._is_ready(stream) for stream in streams):
            wait(self._unready(), self._ROUND_S, FIRST_COMPLETED)
        return [
            partial(self._piece, self._answers.pop(stream)) if self._is_ready(stream) else None
            for stream in streams
        ]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self, streams: Sequence[Stream]) -> None:
        for stream in [stream for stream in self._answers if stream.cancelled and self._is_ready(stream)]:
            del self._answers[stream]
        new = [stream for stream in streams if stream not in self._answers]
        for stream in new[: self.AT_ONCE - len(self._unready())]:
            self._answers[stream] = self._threads.submit(self._answer, stream)

    def _answer(self, stream: Stream) -> Answered:
        def require_client() -> None:
            if stream.cancelled:
                raise UserError("nobody is waiting for this answer any longer")

        return self._questions.answer(stream.job.question, between=require_client)

    def _is_ready(self, stream: Stream) -> bool:
        return stream in self._answers and self._answers[stream].done()

    def _unready(self) -> list["Future[Answered]"]:
        return [answer for answer in self._answers.values() if not answer.done()]

    def _piece(self, answer: "Future[Answered]", nodes: frozenset[str]) -> Piece:
        answered = answer.result()
        tokens = len(self._tokenizer.encode(answered.text))
        return Piece(answered.text, tokens, finish="stop", nodes=nodes, read=answered.sources)


class Engine:
    """Continues streams on a separate thread until it is closed."""

    def __init__(
        self,
        work: Work,
        token_bytes: Sequence[bytes],
        places: int,
        loop: asyncio.AbstractEventLoop,
        nodes: Callable[[], frozenset[str]] = frozenset,
        metrics: CollectorRegistry | None = None,
    ) -> None:
        """`places`: how many streams are computed together. `loop`: the loop on which streams are read. `nodes`:
        returns the nodes that have answered since its last call.
        """
        self._work = work
        self._token_bytes = token_bytes
        self._loop = loop
        self._nodes = nodes
        self._metrics = EngineMetrics(metrics)
        self._schedule = FairSchedule[Stream](places)
        self._changed = threading.Condition()
        self._closing = False
        self._metrics.computed.set_function(lambda: len(self._schedule) - self._schedule.waiting)
        self._metrics.waiting.set_function(lambda: self._schedule.waiting)
        self._thread = threading.Thread(target=self._run, name="talkoot-engine", daemon=True)
        self._thread.start()

    def begin(self, job: Job, client: str) -> Stream:
        """Begins a stream. The caller limits the number of streams, and cancels those that it no longer wants. Raises
        EngineError if the engine is closed.
        """
        if not self.is_alive():
            raise EngineError("the server can no longer compute: restart it")
        stream = Stream(job, client, self._token_bytes)
        self._metrics.tokens.labels("prompt").inc(len(job.prompt))
        with self._changed:
            self._schedule.add(client, stream)
            self._changed.notify()
        return stream

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def cancel(self, stream: Stream) -> None:
        """Ends a stream before its next token. Harmless if it has ended."""
        with self._changed:
            stream.cancelled = True
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_CLOSE_S)
        self._work.close()

    def _run(self) -> None:
        while (streams := self._next_streams()) is not None:
            if not streams:
                continue
            try:
                with self._metrics.step.time():
                    news = self._advance(streams)
            except Exception as error:  # a fault that these streams caused must not affect the next ones
                if self._closing:
                    continue  # the swarm that it needs is being left
                if isinstance(error, UserError):
                    said = str(error)
                    logger.warning("%s broke off: %s", counted(len(streams), "answer"), said)
                else:
                    said = _INTERNAL
                    logger.exception("%s broke off", counted(len(streams), "answer"))
                news = dict.fromkeys(streams, EngineError(said))
            self._deliver(news)

    def _next_streams(self) -> list[Stream] | None:
        """Waits until there are streams to continue; None when it closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or len(self._schedule))
            for stream in [stream for stream in self._schedule if stream.cancelled or self._closing]:
                self._end(stream)
            for stream in self._schedule.next_round():
                stream.rest()
            return None if self._closing else self._schedule.running

    def _advance(self, streams: Sequence[Stream]) -> dict[Stream, Piece | EngineError]:
        advances = self._work.compute(streams)
        answered = self._nodes()
        news: dict[Stream, Piece | EngineError] = {}
        for stream, advance in zip(streams, advances, strict=True):
            if stream not in self._work.waiting:
                stream.nodes |= answered
            if advance is None:
                continue
            try:
                news[stream] = piece = advance(frozenset(stream.nodes))
            except UserError as error:
                news[stream] = EngineError(str(error))
                continue
            except Exception:  # an error in one stream must not end the others
                logger.exception("an answer broke off")
                news[stream] = EngineError(_INTERNAL)
                continue
            stream.nodes.clear()
            self._metrics.tokens.labels("generated").inc(piece.tokens)
            if not stream.has_begun:
                stream.has_begun = True
                self._metrics.first_token.observe(time.monotonic() - stream.asked_at)
        return news

    def _deliver(self, news: dict[Stream, Piece | EngineError]) -> None:
        with self._changed:
            for stream, each in news.items():
                if isinstance(each, EngineError) or each.finish is not None:
                    self._end(stream)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(_put, news)

    def _end(self, stream: Stream) -> None:
        self._schedule.remove(stream)
        stream.rest()


def _put(news: dict[Stream, Piece | EngineError]) -> None:
    for stream, each in news.items():
        stream.put(each)
