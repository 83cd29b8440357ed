"""Continues sequences token by token, many at once.

The keys and values of each sequence's local attention are kept, and experts keep theirs, so that a token costs the
computation of one row. The first computation of a sequence takes all of its tokens at once. It is repeated if an expert
does not answer, or no longer has what it kept because its parameters have changed or it needed the memory.

Shapes: S sequences, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dht.memory import Passage
from peer.errors import DataError, UserError
from peer.formatting import counted
from peer.identity import PeerID
from trainer_client.encoder_decoder import EncodedSource, EncoderDecoder
from trainer_client.model import LanguageModel, SequenceState
from trainer_client.retrieval.lookup import Find, Neighbours

_LONGEST_PAUSE = 16
"""While experts are trained, kept rows soon become useless. So after failed attempts, up to this many tokens are
computed without keeping rows.
"""
_MOST_FORGOTTEN = 3
"""How many times a node may forget a sequence before replicas of its experts on other nodes are preferred."""
MOST_ROWS = 2048
"""The most rows that are computed at once when whole sequences are computed."""


def require_finite(predicted: Tensor) -> Tensor:
    """Returns the prediction. Raises UserError if a number is not finite."""
    if not predicted.isfinite().all():
        raise UserError("the model's prediction is not finite: its checkpoint or an expert is broken")
    return predicted


@dataclass(eq=False)
class EncoderSource:
    """What an encoder reads."""

    tokens: tuple[int, ...]
    encoded: EncodedSource | None = None
    """The encoder's result; None: it has not read the source yet."""


class Decoding:
    """One sequence that is being continued."""

    def __init__(
        self, tokens: Sequence[int], context: int, shortest: int, source: EncoderSource | None = None
    ) -> None:
        """`shortest`: the fewest tokens that the model can continue. `source`: for an encoder-decoder."""
        self.source = source
        self.tokens: list[int] = list(tokens)
        """The tokens that the model sees. When they outgrow the context, the older half of it is dropped."""
        self._context = context
        self._remaining = max(context // 2, shortest)
        self._state: SequenceState | None = None
        self._logits: Tensor | None = None
        """Logits of the next token; None if they are not computed yet."""
        self._failures = 0
        """Consecutive failed attempts to continue."""
        self._forgotten = Counter[PeerID]()
        """How many times each node did not keep the sequence."""
        self._pause = 0
        """How many more tokens to compute before the next attempt to keep rows."""
        self._neighbours: dict[tuple[int, ...], Neighbours] = {}
        """The neighbours of each whole chunk of the tokens."""
        self._read: dict[Passage, None] = {}

    @property
    def avoided(self) -> frozenset[PeerID]:
        """Nodes that have forgotten the sequence several times."""
        return frozenset(peer_id for peer_id, times in self._forgotten.items() if times >= _MOST_FORGOTTEN)

    @property
    def next_rows(self) -> int:
        """How many rows the next token costs: one if the sequence's own are kept, otherwise all, and those of the
        source if the encoder has not read it yet.
        """
        is_kept = self._state is not None or self._logits is not None
        unread = self.source.tokens if self.source is not None and self.source.encoded is None else ()
        return (1 if is_kept else len(self.tokens)) + len(unread)

    @property
    def is_full(self) -> bool:
        """Whether nothing can follow, because a decoder must not drop its first tokens."""
        return self.source is not None and len(self.tokens) == self._context

    def append(self, token: int) -> None:
        self._logits = None
        if len(self.tokens) == self._context:
            del self.tokens[: self._context + 1 - self._remaining]
            self._state = None
        self.tokens.append(token)

    def take_read(self) -> tuple[Passage, ...]:
        """The passages that the model was given since the last call, without duplicates."""
        passages = tuple(self._read)
        self._read.clear()
        return passages

    def end(self) -> None:
        """Frees what is kept for the sequence. May be called twice."""
        self._state = self._logits = self.source = None


class Decoder(ABC):
    """Computes what follows each sequence, as if it were alone. For one thread."""

    end: int | None = None
    """The token that ends what the model writes; None: there is no such token."""

    def __init__(self, model: LanguageModel | EncoderDecoder, is_usable: Callable[[], bool]) -> None:
        """`is_usable` is asked after each computation whether its result is valid; if not, it is repeated."""
        model.eval()
        self._can_extend: Callable[[], bool] = lambda: model.can_extend
        self._is_usable = is_usable

    @abstractmethod
    def begin(self, prompt: Sequence[int], written: Sequence[int] = ()) -> Decoding:
        """Begins with a prompt. If it is longer than the context, the model sees its last tokens. `written`: the tokens
        that were already written after it.

        Raises DataError if the prompt is shorter than what the model was trained to continue.
        """

    @torch.no_grad()
    def logits(self, sequences: Sequence[Decoding]) -> Tensor:
        """Logits of the token after each sequence: float32 [S, V]."""
        for each in sequences:
            if each._state is not None and len(each.tokens) - each._state.length > 1:
                each._state = None
        going_on = [each for each in sequences if each._logits is None and each._state is not None]
        if going_on:
            self._extend(going_on)
        while anew := [each for each in sequences if each._logits is None]:
            for group in self._groups(anew):
                if self._can_extend():
                    self._extend(group)
                else:
                    self._compute(group)
        return torch.stack([each._logits for each in sequences if each._logits is not None])

    def _groups(self, sequences: Sequence[Decoding]) -> Iterator[list[Decoding]]:
        """Groups of sequences to compute from the first token on, the shortest first. If nothing is kept, the sequences
        of a group have equal length.
        """
        group: list[Decoding] = []
        for each in sorted(sequences, key=lambda each: len(each.tokens)):
            length = len(each.tokens)
            is_alike = self._can_extend() or not group or len(group[0].tokens) == length
            if group and not (is_alike and (len(group) + 1) * length <= MOST_ROWS):
                yield group
                group = []
            group.append(each)
        yield group

    def _extend(self, sequences: Sequence[Decoding]) -> None:
        """Computes the new tokens of each sequence."""
        states = self._states(sequences)
        for each in sequences:
            each._state = None  # if the computation fails, the state can't be used
        new = [each.tokens[state.length :] for each, state in zip(sequences, states, strict=True)]
        logits_SV = self._extended(sequences, new, states)
        if not self._is_valid(sequences):
            return
        for each, state, tokens, logits_V in zip(sequences, states, new, logits_SV, strict=True):
            each._forgotten.update(state.forgetful)
            if len(tokens) == len(each.tokens):
                is_kept, each._pause = not each._pause, max(0, each._pause - 1)
            else:
                is_kept = state.is_answered
                each._failures = 0 if is_kept else each._failures + 1
                each._pause = min(2**each._failures // 4, _LONGEST_PAUSE)
                if not is_kept:
                    continue
            each._logits = logits_V
            each._state = state if is_kept and state.can_go_on else None

    def _compute(self, sequences: Sequence[Decoding]) -> None:
        """Computes whole sequences of one length."""
        logits_SV = self._whole(sequences)
        if self._is_valid(sequences):
            for each, logits_V in zip(sequences, logits_SV, strict=True):
                each._logits = logits_V

    def _is_valid(self, sequences: Sequence[Decoding]) -> bool:
        """Whether the last computation of these sequences is valid."""
        return self._is_usable()

    @abstractmethod
    def _states(self, sequences: Sequence[Decoding]) -> list[SequenceState]:
        """The states of these sequences. Creates those that are missing."""

    @abstractmethod
    def _extended(
        self, sequences: Sequence[Decoding], new: Sequence[Sequence[int]], states: Sequence[SequenceState]
    ) -> Tensor:
        """Logits of the token after the `new` ones, [S, V]. Adds the new tokens to the states."""

    @abstractmethod
    def _whole(self, sequences: Sequence[Decoding]) -> Tensor:
        """Logits of the token after each sequence, [S, V], computed from its first token on."""


class TextDecoder(Decoder):
    """Continues texts."""

    def __init__(
        self,
        model: LanguageModel,
        is_usable: Callable[[], bool] = lambda: True,
        find: Find | None = None,
    ) -> None:
        """`find`: returns passages for chunks of the text, for a model that reads a memory; None: it reads none."""
        super().__init__(model, is_usable)
        self._model = model
        self._find = find

    def begin(self, prompt: Sequence[int], written: Sequence[int] = ()) -> Decoding:
        shortest, context = self._model.first_scored, self._model.context
        if len(prompt) < shortest:
            raise DataError(
                f"the prompt has {counted(len(prompt), 'token')}, but this swarm's models need {shortest} or more: "
                "give a longer prompt"
            )
        return Decoding([*prompt, *written][-context:], context, shortest)

    def _states(self, sequences: Sequence[Decoding]) -> list[SequenceState]:
        return [each._state or self._model.begin(each.avoided) for each in sequences]

    def _extended(
        self, sequences: Sequence[Decoding], new: Sequence[Sequence[int]], states: Sequence[SequenceState]
    ) -> Tensor:
        return self._model.extend(new, states, self._read(sequences, [state.length for state in states]))

    def _whole(self, sequences: Sequence[Decoding]) -> Tensor:
        tokens_ST = torch.tensor([each.tokens for each in sequences])
        read = self._read(sequences, [0] * len(sequences))
        logits_STV: Tensor = self._model(tokens_ST, torch.stack(read)) if read else self._model(tokens_ST)
        return logits_STV[:, -1].float()

    def _read(self, sequences: Sequence[Decoding], lengths: Sequence[int]) -> list[Tensor]:
        """For each sequence, the neighbours of those chunks that end at the given numbers of tokens, [U, N, L]. Empty
        if the model reads no memory.
        """
        if self._find is None or self._model.retrieval is None:
            return []
        spec = self._model.retrieval.spec
        chunks = [
            [tuple(each.tokens[at : at + spec.chunk]) for at in range(0, len(each.tokens), spec.chunk)][
                : spec.chunks(len(each.tokens))
            ]
            for each in sequences
        ]
        known = {chunk: found for each in sequences for chunk, found in each._neighbours.items()}
        unknown = list({chunk for some in chunks for chunk in some} - known.keys())
        if unknown:
            known |= dict(zip(unknown, self._find(unknown), strict=True))
        read = []
        for each, some, length in zip(sequences, chunks, lengths, strict=True):
            for chunk in some:
                if chunk not in each._neighbours:
                    each._read |= dict.fromkeys(known[chunk].passages)
            each._neighbours = {chunk: known[chunk] for chunk in some}
            new = [known[chunk].tokens_NL for chunk in some[spec.chunks(length) :]]
            read.append(torch.stack(new) if new else spec.nothing(0))
        return read


class TargetDecoder(Decoder):
    """Writes targets with the decoder of an encoder-decoder, for prompts that the encoder reads."""

    def __init__(self, model: EncoderDecoder, is_usable: Callable[[], bool] = lambda: True) -> None:
        super().__init__(model, is_usable)
        self._model = model
        self.end = model.end
        self._sources = WeakValueDictionary[tuple[int, ...], EncoderSource]()
        """The sources of sequences that are being continued. The encoder reads equal ones once."""

    def begin(self, prompt: Sequence[int], written: Sequence[int] = ()) -> Decoding:
        context = self._model.context
        tokens = tuple(prompt[-context:])
        source = self._sources.setdefault(tokens, EncoderSource(tokens))
        return Decoding([self._model.end, *written], context, 1, source)

    def _states(self, sequences: Sequence[Decoding]) -> list[SequenceState]:
        encoded = self._encoded(sequences)
        return [
            each._state or self._model.begin(source, each.avoided)
            for each, source in zip(sequences, encoded, strict=True)
        ]

    def _extended(
        self, sequences: Sequence[Decoding], new: Sequence[Sequence[int]], states: Sequence[SequenceState]
    ) -> Tensor:
        return self._model.extend(new, states)

    def _whole(self, sequences: Sequence[Decoding]) -> Tensor:
        prefixes = [each.tokens[1:] for each in sequences]
        return self._model.next_token_logits(self._encoded(sequences), prefixes)

    def _encoded(self, sequences: Sequence[Decoding]) -> list[EncodedSource]:
        sources = [each.source for each in sequences if each.source is not None]
        unread = [source for source in dict.fromkeys(sources) if source.encoded is None]
        if unread:
            read = self._model.encode([source.tokens for source in unread])
            for source, encoded in zip(unread, read, strict=True):
                source.encoded = encoded
        return [source.encoded or () for source in sources]

    def _is_valid(self, sequences: Sequence[Decoding]) -> bool:
        if self._is_usable():
            return True
        for each in sequences:
            if each.source is not None:
                each.source.encoded = None
        return False


def make_decoder(
    model: LanguageModel | EncoderDecoder,
    is_usable: Callable[[], bool] = lambda: True,
    find: Find | None = None,
) -> Decoder:
    """The decoder for this model. `is_usable`, `find`: as for `TextDecoder`."""
    if isinstance(model, EncoderDecoder):
        return TargetDecoder(model, is_usable)
    return TextDecoder(model, is_usable, find)
