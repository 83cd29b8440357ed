"""Answers that no honest expert gives are noticed, and honest ones are accepted, whatever codec they came with."""

import asyncio
from typing import get_args

import numpy as np
import torch
from expert_fakes import (
    ExpertWork,
    FakeSwarm,
    make_manifest,
    make_peer_id,
    random_rows,
    send_to_best,
)
from hypothesis import given
from hypothesis import strategies as st

from expert_server.blocks import build_block
from peer.codec import CodecName, Floats, codec_of
from peer.encoding import decode, encode
from peer.metrics import total
from trainer_client.dispatch.batches import Direction
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.policy import (
    MOST_GRADIENT_GROWTH,
    MOST_GROWTH,
    AnswerScreening,
    CircuitBreakers,
    WaitPolicy,
)

PEER, OTHER = make_peer_id(1), make_peer_id(2)
MANIFEST = make_manifest((2, 2), k=2)


def sent(rows: Floats, codec: CodecName) -> Floats:
    data = bytearray(encode(rows, codec_of(codec)))
    return decode(data, rows.shape[1], codec_of(codec))


@given(st.integers(1, 12), st.integers(0, 2**20), st.sampled_from(get_args(CodecName)), st.floats(1e-3, 30))
def test_what_honest_experts_answer_is_let_through(
    rows: int, seed: int, codec: CodecName, size: float
) -> None:
    manifest = make_manifest((2, 2), k=2, hidden=16)
    test, block = AnswerScreening(), build_block(manifest, manifest.uids()[0])
    inputs = np.float32(size) * random_rows(rows, 16, seed)
    for _ in range(3):  # a trainer moves on by little
        with torch.no_grad():
            x_RD = torch.from_numpy(sent(inputs, codec))
            answer = (block(x_RD, torch.tensor([rows]), torch.arange(rows)) - x_RD).numpy()
        assert test.fault_of_answer(PEER, inputs, sent(answer, codec)) is None
        inputs = inputs * np.float32(1.0001)


@given(
    st.integers(1, 5),
    st.integers(0, 2**20),
    st.sampled_from(get_args(CodecName)),
    st.floats(1.2, 9),
    st.floats(0, 0.05),
)
def test_rows_that_point_the_same_way_may_have_the_same_answer(
    rows: int, seed: int, codec: CodecName, factor: float, noise: float
) -> None:
    """Experts normalize rows, so with int4 a row and its double get the same answer. Honest nodes used to be banned for
    that.
    """
    manifest = make_manifest((2, 2), k=2, hidden=16)
    test, block = AnswerScreening(), build_block(manifest, manifest.uids()[0])
    factors = np.float32(factor) ** np.arange(rows, dtype=np.float32)[:, None]
    inputs = factors * (random_rows(1, 16, seed) + np.float32(noise) * random_rows(rows, 16, seed + 1))
    for _ in range(2):
        with torch.no_grad():
            x_RD = torch.from_numpy(sent(inputs, codec))
            answer = (block(x_RD, torch.ones(rows, dtype=torch.int64), torch.zeros(rows)) - x_RD).numpy()
        assert test.fault_of_answer(PEER, inputs, sent(answer, codec)) is None
        inputs = inputs * np.float32(factor)


def test_huge_answers_are_seen() -> None:
    inputs = random_rows(4)
    answer = inputs.copy()
    answer[2, 3] = -2 * MOST_GROWTH * (1 + np.abs(inputs).max())
    assert AnswerScreening().fault_of_answer(PEER, inputs, answer) == "huge"


def test_huge_gradients_are_seen_and_those_of_a_nearly_constant_row_are_not() -> None:
    gradients = random_rows(4)
    assert AnswerScreening().fault_of_gradient(gradients, gradients) is None
    norm = torch.nn.LayerNorm(8)
    row = torch.full((4, 8), 0.5).requires_grad_()
    torch.autograd.backward(norm(row), torch.from_numpy(gradients))
    assert row.grad is not None
    assert AnswerScreening().fault_of_gradient(gradients, 100 * row.grad.numpy()) is None
    answer = gradients.copy()
    answer[2, 3] = -2 * MOST_GRADIENT_GROWTH * (1 + np.abs(gradients).max())
    assert AnswerScreening().fault_of_gradient(gradients, answer) == "huge"


def test_the_same_answer_for_all_rows_is_seen() -> None:
    inputs = random_rows(4)
    assert AnswerScreening().fault_of_answer(PEER, inputs, np.full_like(inputs, 1.0)) == "constant"
    same = np.repeat(inputs[:1], 4, axis=0)  # and is right for rows that are alike
    assert AnswerScreening().fault_of_answer(PEER, same, 2 * same) is None


def test_an_expert_that_adds_nothing_is_honest() -> None:
    """The last matrix of a block starts at zero."""
    test = AnswerScreening()
    for seed in range(3):
        inputs = random_rows(4, seed=seed)
        assert test.fault_of_answer(PEER, inputs, np.zeros_like(inputs)) is None


def test_an_answer_that_is_given_again_for_other_inputs_is_seen() -> None:
    test, answer = AnswerScreening(), random_rows(4, seed=9)
    assert test.fault_of_answer(PEER, random_rows(4, seed=1), answer) is None
    assert test.fault_of_answer(PEER, random_rows(4, seed=1), answer) is None  # the same was asked
    assert test.fault_of_answer(OTHER, random_rows(4, seed=2), answer) is None
    assert test.fault_of_answer(PEER, random_rows(4, seed=2), answer) == "replayed"


def test_what_is_remembered_is_bounded() -> None:
    test = AnswerScreening()
    for number in range(600):
        for seed in range(10):
            test.fault_of_answer(make_peer_id(number), random_rows(1, seed=seed), random_rows(1, seed=seed))
    assert len(test._lately) == 256
    assert max(map(len, test._lately.values())) == 8


def test_a_ban_grows_with_each_offence_and_good_answers_do_not_end_it() -> None:
    breakers = CircuitBreakers(longest_s=100.0)
    breakers.distrust(PEER, 0.0)
    breakers.distrust(PEER, 50.0)  # still of the same time
    breakers.succeeded(PEER)
    assert (breakers.banned(99.0), breakers.banned(100.0)) == (1, 0)
    breakers.distrust(PEER, 100.0)
    assert breakers.open_at(299.0) == {PEER}
    assert breakers.open_at(300.0) == frozenset()


class PoisonedSwarm(FakeSwarm):
    """A swarm in which the first peer's experts answer the same whatever they are asked."""

    def compute(self, direction: Direction, work: ExpertWork) -> Floats:
        answer = super().compute(direction, work)
        poisoned = self.peer_of[work.uid] == make_peer_id(0)
        return np.ones_like(answer) if poisoned else answer


async def dispatch(swarm: FakeSwarm) -> tuple[Dispatcher, list[np.ndarray]]:
    dispatcher = Dispatcher(swarm.directory(), swarm, WaitPolicy(5.0, 0.1, 1))
    scores = [random_rows(6, 2, seed=2), random_rows(6, 2, seed=3)]
    answered = []
    for _ in range(2):
        result = await send_to_best(dispatcher, random_rows(6), scores, 4, 6)
        answered.append(result.answered)
        assert not (result.updates[result.answered] == 1.0).all(axis=-1).any()
    return dispatcher, answered


def test_a_peer_that_answers_wrongly_is_left_out_and_banned() -> None:
    dispatcher, answered = asyncio.run(dispatch(PoisonedSwarm(MANIFEST)))
    assert total(dispatcher.metrics.wrong_answers) == 1
    assert total(dispatcher.metrics.failures, cause="data_loss") == 1
    assert dispatcher.open_breakers() == 1
    assert [row.sum() for row in answered] == [18, 18]
