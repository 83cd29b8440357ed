"""Continues sequences token by token, many at once.

Of each sequence the keys and values of the local attention are kept, and experts keep theirs, so that a token costs the
computation of one row. The first computation of a sequence takes all of its tokens at once. It is made anew when an
expert does not answer, or no longer has what it kept because its parameters have changed or it needed the memory.

Shapes: S sequences, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dht.memory import Passage
from peer.errors import DataError, UserError
from peer.identity import PeerID
from trainer_client.encoder_decoder import EncodedSource, EncoderDecoder
from trainer_client.model import LanguageModel, SequenceState
from trainer_client.retrieval.lookup import Find, Neighbours

_LONGEST_PAUSE = 16
"""While experts are trained, what they keep is soon of no use: then most tokens are computed without an attempt."""
_MOST_FORGOTTEN = 3
"""Times that a node may forget a sequence, before replicas of its experts elsewhere are preferred."""
_MOST_ROWS = 2048
"""Of several sequences that are computed at once from their first tokens on."""


def require_finite(predicted: Tensor) -> Tensor:
    """Returns it. Raises UserError if a number is not finite."""
    if not predicted.isfinite().all():
        raise UserError("the model's prediction is not finite: its checkpoint or an expert is broken")
    return predicted


class Decoding:
    """One sequence while it is continued."""

    def __init__(
        self, tokens: Sequence[int], context: int, shortest: int, source: Sequence[int] | None = None
    ) -> None:
        """`shortest`: the fewest tokens that the model continues. `source`: what an encoder reads."""
        self.source = source
        self.tokens: list[int] = list(tokens)
        """Those that the model sees. When they outgrow the context, the older half of it is dropped."""
        self._context = context
        self._remaining = max(context // 2, shortest)
        self._encoded: EncodedSource | None = None
        self._state: SequenceState | None = None
        self._logits: Tensor | None = None
        """Of the token after these; None if they are not computed yet."""
        self._failures = 0
        """Attempts to go on that came to nothing since the last that did not."""
        self._forgotten = Counter[PeerID]()
        """How often each node did not keep the sequence."""
        self._pause = 0
        """Tokens for which nothing is kept, before the next attempt."""
        self._neighbours: dict[tuple[int, ...], Neighbours] = {}
        """Of each whole chunk of the tokens."""
        self._read: dict[Passage, None] = {}

    @property
    def avoided(self) -> frozenset[PeerID]:
        """Nodes that forget it again and again."""
        return frozenset(peer_id for peer_id, times in self._forgotten.items() if times >= _MOST_FORGOTTEN)

    @property
    def is_full(self) -> bool:
        """Whether nothing can follow: a decoder that drops its first tokens would no longer know where it began."""
        return self.source is not None and len(self.tokens) == self._context

    def append(self, token: int) -> None:
        self._logits = None
        if len(self.tokens) == self._context:
            del self.tokens[: self._context + 1 - self._remaining]
            self._state = None
        self.tokens.append(token)

    def take_read(self) -> tuple[Passage, ...]:
        """The passages that the model was given since the last time, each once."""
        passages = tuple(self._read)
        self._read.clear()
        return passages

    def end(self) -> None:
        """Frees what is kept for the sequence. May be called twice."""
        self._state = self._logits = self._encoded = None


class Decoder:
    """Computes what follows each sequence as if it were alone. Belongs to one thread."""

    def __init__(
        self,
        model: LanguageModel | EncoderDecoder,
        is_usable: Callable[[], bool] = lambda: True,
        find: Find | None = None,
    ) -> None:
        """`is_usable` is asked after each computation whether its result counts; if not, it is repeated.

        `find`: passages for chunks of the text, for a model that reads a memory; None: it reads nothing.
        """
        model.eval()
        self._model = model
        self._is_usable = is_usable
        self._find = find

    def begin(self, prompt: Sequence[int]) -> Decoding:
        """Of a prompt that is longer than the context the model sees the last tokens. An encoder reads it.

        Raises DataError if the prompt is shorter than the model was trained to continue.
        """
        if isinstance(self._model, EncoderDecoder):
            return Decoding([self._model.end], self._model.context, 1, prompt[-self._model.context :])
        shortest = self._model.first_scored
        if len(prompt) < shortest:
            raise DataError(
                f"the prompt has {len(prompt)} tokens, and this swarm's models go on from {shortest} or more: "
                "give a longer one"
            )
        return Decoding(prompt[-self._model.context :], self._model.context, shortest)

    @torch.no_grad()
    def logits(self, sequences: Sequence[Decoding]) -> Tensor:
        """Logits of the token after each. Float32 [S, V]"""
        for each in sequences:
            if each._state is not None and len(each.tokens) - each._state.length > 1:
                each._state = None
        going_on = [each for each in sequences if each._logits is None and each._state is not None]
        if going_on:
            self._extend(going_on)
        while anew := [each for each in sequences if each._logits is None]:
            for group in self._groups(anew):
                if self._model.can_extend:
                    self._extend(group)
                else:
                    self._compute(group)
        return torch.stack([each._logits for each in sequences if each._logits is not None])

    def _groups(self, sequences: Sequence[Decoding]) -> Iterator[list[Decoding]]:
        """Of what is computed from the first token on: the shortest first; of one length if nothing is kept."""
        group: list[Decoding] = []
        for each in sorted(sequences, key=lambda each: len(each.tokens)):
            length = len(each.tokens)
            is_alike = self._model.can_extend or not group or len(group[0].tokens) == length
            if group and not (is_alike and (len(group) + 1) * length <= _MOST_ROWS):
                yield group
                group = []
            group.append(each)
        yield group

    def _extend(self, sequences: Sequence[Decoding]) -> None:
        """Computes what is new in each."""
        states = [each._state or self._begin(each) for each in sequences]
        for each in sequences:
            each._state = None  # a computation that fails leaves a state that is of no use
        new = [each.tokens[state.length :] for each, state in zip(sequences, states, strict=True)]
        read = self._read(sequences, [state.length for state in states])
        if read and isinstance(self._model, LanguageModel):
            logits_SV = self._model.extend(new, states, read)
        else:
            logits_SV = self._model.extend(new, states)
        if not self._is_usable():
            for each in sequences:
                each._encoded = None
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
        if isinstance(self._model, EncoderDecoder):
            sources = [each.source or () for each in sequences]
            logits_SV = self._model.next_token_logits(sources, [each.tokens[1:] for each in sequences])
        else:
            logits_SV = self._whole(self._model, sequences)
        if self._is_usable():
            for each, logits_V in zip(sequences, logits_SV, strict=True):
                each._logits = logits_V

    def _whole(self, model: LanguageModel, sequences: Sequence[Decoding]) -> Tensor:
        tokens_ST = torch.tensor([each.tokens for each in sequences])
        read = self._read(sequences, [0] * len(sequences))
        logits_STV: Tensor = model(tokens_ST, torch.stack(read)) if read else model(tokens_ST)
        return logits_STV[:, -1].float()

    def _begin(self, sequence: Decoding) -> SequenceState:
        """An encoder reads its source once."""
        if not isinstance(self._model, EncoderDecoder):
            return self._model.begin(sequence.avoided)
        if sequence._encoded is None:
            (sequence._encoded,) = self._model.encode([sequence.source or ()])
        return self._model.begin(sequence._encoded, sequence.avoided)

    def _read(self, sequences: Sequence[Decoding], lengths: Sequence[int]) -> list[Tensor]:
        """Neighbours of the chunks of each that end after so many tokens, [U, N, L]. None at all if it reads none."""
        if self._find is None or isinstance(self._model, EncoderDecoder) or self._model.retrieval is None:
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
