"""The products that nodes return in backward calls: those of honest nodes fit with any codec, and false ones do not."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from dispatch_swarm import DEADLINE, LENGTH, make_dispatcher, random_gradients, ranked, run
from expert_fakes import WELL, FakeSwarm, make_manifest, make_peer_id, random_rows, send_to_best
from hypothesis import given
from hypothesis import strategies as st

from peer.codec import CodecName, Floats, codec_of, decode_scalars, encode_scalars
from peer.encoding import decode, encode, rounding_error
from peer.metrics import total
from trainer_client.credit import CreditAccounts
from trainer_client.dispatch.batches import AnsweredRows, CallReply, Kept, NodeCall
from trainer_client.dispatch.policy import are_bounded, products_fit

seeds = st.integers(0, 2**32 - 1)
ROWS, K, WIDTH = 6, 4, 32


def sent(rows: Floats, codec: CodecName, seed: bytes | None = None) -> Floats:
    return decode(bytearray(encode(rows, codec_of(codec), seed)), rows.shape[1], codec_of(codec))


@given(seeds, st.sampled_from(get_args(CodecName)), st.floats(1e-6, 1e3), st.floats(1e-3, 1e2), st.booleans())
def test_products_of_an_honest_node_fit(
    seed: int, codec: CodecName, of_gradients: float, of_updates: float, spiky: bool
) -> None:
    """The gradients have any size, including rows in which nearly all is in one number, which int4 rounds worst."""
    rng = np.random.default_rng(seed)
    f_RKD = (of_updates * rng.standard_normal((ROWS, K, WIDTH))).astype(np.float32)
    g_RD = (of_gradients * rng.standard_normal((ROWS, WIDTH))).astype(np.float32)
    if spiky:
        g_RD[:, 1:] *= 1e-3
        f_RKD[:, :, 1:] *= 1e-3
    shares_RK = rng.dirichlet(np.ones(K), ROWS).astype(np.float32)
    s_RD = (shares_RK[..., None] * f_RKD).sum(axis=1)
    computed_N = np.einsum("rd,rkd->rk", sent(g_RD, codec, b"seed"), f_RKD).ravel()
    products_RK = decode_scalars(encode_scalars(computed_N, codec_of(codec)), codec_of(codec)).reshape(
        ROWS, K
    )
    error = rounding_error(WIDTH, codec_of(codec))
    assert products_fit(shares_RK, products_RK, g_RD, sent(s_RD, codec), error).all()
    assert are_bounded(products_RK, g_RD, random_rows(ROWS, WIDTH)).all()


def test_the_product_of_rows_that_are_nearly_orthogonal_fits() -> None:
    """The float32 sum is off by more than a thousandth. There is one expert, since others' products would hide that."""
    rng, width = np.random.default_rng(1), 256
    g_RD, s_RD = (rng.standard_normal((20_000, width), dtype=np.float32) for _ in range(2))
    products_RK = np.einsum("rd,rd->r", g_RD, s_RD)[:, None]
    exact_R = (g_RD.astype(np.float64) * s_RD).sum(axis=1)
    assert (np.abs(products_RK[:, 0] - exact_R) > 1e-3 * np.abs(exact_R)).any()
    assert products_fit(np.ones((len(g_RD), 1), np.float32), products_RK, g_RD, s_RD, (0.0, 0.0)).all()


@given(seeds, st.sampled_from(["fp32", "bf16", "int8"]))
def test_products_that_are_far_from_the_answers_do_not_fit(seed: int, codec: CodecName) -> None:
    rng = np.random.default_rng(seed)
    g_RD, s_RD = (rng.standard_normal((ROWS, WIDTH), dtype=np.float32) for _ in range(2))
    lengths_R = np.linalg.norm(g_RD, axis=1) * np.linalg.norm(s_RD, axis=1)
    shares_RK = np.full((ROWS, 2), 0.5, np.float32)
    exact_R = (g_RD * s_RD).sum(axis=1)
    products_RK = np.stack([exact_R, exact_R + 0.5 * lengths_R], axis=1)
    error = rounding_error(WIDTH, codec_of(codec))
    assert not products_fit(shares_RK, products_RK, g_RD, s_RD, error).any()


def test_products_that_fit_and_are_huge_are_not_bounded() -> None:
    """Both are equally large, so that their mean is right."""
    g_RD = random_rows(2, WIDTH)
    products_RK = np.array([[1e9, -1e9], [1, -1]], np.float32)
    assert are_bounded(products_RK, g_RD, g_RD).tolist() == [False, True]


def test_the_largest_product_follows_from_the_rows_own_gradient() -> None:
    """A row with a large gradient gives no room to another one."""
    g_RD, inputs_RD = np.zeros((2, 2, 16), np.float32)
    g_RD[:, 0] = 1.0, 1000.0
    most_R = 2 * 1000.0 * 16**0.5 * g_RD[:, 0]
    for times in (0.99, 1.01):
        fits_R = are_bounded(times * most_R[:, None], g_RD, inputs_RD)
        assert fits_R.tolist() == [times < 1] * 2


def test_how_far_a_product_may_be_off() -> None:
    """Each row by itself: beside a row with large numbers, and with the error that a codec makes."""
    g_RD, s_RD = np.zeros((2, 2, 16), np.float32)
    g_RD[:, 0], s_RD[:, 0] = (1.0, 1000.0), (1.0, 0.0)
    s_RD[1, 1] = 1000.0
    ones = np.ones((2, 1), np.float32)

    def fits(off: tuple[float, float], part: float = 0.0) -> list[bool]:
        products_RK = np.array([[1.0 + off[0]], [off[1]]], np.float32)
        return products_fit(ones, products_RK, g_RD, s_RD, (part, 0.0)).tolist()  # type: ignore[no-any-return]  # numpy

    assert fits((0.0009, 9.0)) == [True, True], "a thousandth; for rows that are orthogonal, by their sizes"
    assert fits((0.002, 11.0)) == [False, False]
    assert fits((1.9, 0.0), part=0.5) == [True, True], "half of G, twice S, and half of that"
    assert fits((2.1, 0.0), part=0.5) == [False, True]


@given(seeds, st.sampled_from(get_args(CodecName)), st.floats(1e-3, 1e3), st.sampled_from([16, 48, 64, 256]))
def test_no_row_is_further_from_what_was_encoded_than_its_codec_says(
    seed: int, codec: CodecName, size: float, width: int
) -> None:
    rng = np.random.default_rng(seed)
    rows_RD = np.clip(size * rng.standard_normal((8, width)) ** 5, -60000, 60000).astype(np.float32)
    part, beside = rounding_error(width, codec_of(codec))
    for seed_of_rounding in (None, b"seed"):
        found_RD = sent(rows_RD, codec, seed_of_rounding)
        apart_R = np.linalg.norm(found_RD - rows_RD, axis=1)
        assert (apart_R <= 1.001 * part * np.linalg.norm(rows_RD, axis=1) + beside).all()


# In a pass


class LyingSwarm(FakeSwarm):
    """Two peers with two experts each. Peer 0 lies about products."""

    def __init__(self, lie: Callable[[Floats], Floats], keeps: bool = True) -> None:
        super().__init__(make_manifest((4,)), peers=2)
        self._lie = lie
        self._keeps = keeps

    async def call(self, call: NodeCall) -> AsyncGenerator[CallReply, None]:
        async for reply in super().call(call):
            lies = isinstance(reply, AnsweredRows) and call.node.peer_id == make_peer_id(0)
            if lies and isinstance(reply, AnsweredRows) and reply.products is not None:
                reply = replace(reply, products=self._lie(reply.products))
            yield reply
        if call.keep and self._keeps:
            yield Kept(call.batch, b"k" * 16)


async def gradients_of(swarm: FakeSwarm) -> tuple[tuple[Floats, Floats], float, int]:
    """The gradients of inputs and logits, the number of wrong answers counted, and the number of peers avoided."""
    dispatcher = make_dispatcher(swarm)
    scores = [ranked(8, 4)[0] / np.float32(4)]
    result = await send_to_best(dispatcher, random_rows(8), scores, 4, LENGTH, keep=True)
    found = await dispatcher.send_back(result, random_gradients(result))
    return found, total(dispatcher.metrics.wrong_answers), dispatcher.banned()


def honest(products: Floats) -> Floats:
    return products


def one_more(products: Floats) -> Floats:
    lied = products.copy()
    lied[:, np.flatnonzero(products.any(axis=0))[0]] += 5
    return lied


def far_apart(products: Floats) -> Floats:
    """Changes the products so that their mean with equal weights stays right."""
    lied = products.copy()
    lied[:, np.flatnonzero(products.any(axis=0))] += np.array([1e9, -1e9], np.float32)
    return lied


def test_honest_products_of_a_kept_call_are_taken() -> None:
    async def scenario() -> None:
        (inputs, logits), wrong, banned = await gradients_of(LyingSwarm(honest))
        assert inputs.any()
        assert logits.any(axis=0).all()
        assert (wrong, banned) == (0, 0)

    run(scenario())


@pytest.mark.parametrize("lie", [one_more, far_apart])
def test_a_node_whose_products_do_not_fit_its_answers_is_banned_and_teaches_the_gate_nothing(
    lie: Callable[[Floats], Floats],
) -> None:
    async def scenario() -> None:
        (inputs, logits), wrong, banned = await gradients_of(LyingSwarm(lie))
        (honest_inputs, honest_logits), _, _ = await gradients_of(LyingSwarm(honest))
        np.testing.assert_array_equal(inputs, honest_inputs)
        assert not logits[:, [0, 2]].any(), "peer 0 has experts 0 and 2"
        np.testing.assert_array_equal(logits[:, [1, 3]], honest_logits[:, [1, 3]])
        assert (wrong, banned) == (1, 1)

    run(scenario())


@pytest.mark.parametrize(("lie", "experts"), [(honest, 4), (one_more, 2)])
def test_gradients_with_products_that_do_not_fit_bring_no_credit(
    lie: Callable[[Floats], Floats], experts: int
) -> None:
    async def scenario() -> None:
        credit = CreditAccounts()
        dispatcher = make_dispatcher(LyingSwarm(lie), credit=credit)
        result = await send_to_best(dispatcher, random_rows(8), ranked(8, 4), 4, LENGTH, keep=True)
        assert credit.all_pairs == 8 * 4
        await dispatcher.send_back(result, random_gradients(result))
        assert credit.all_pairs == 8 * 4 + 8 * experts

    run(scenario())


def test_products_of_experts_that_have_moved_on_are_only_bounded() -> None:
    """A node that has kept nothing computes them again, after other steps."""

    async def scenario() -> None:
        (_, logits), wrong, _ = await gradients_of(LyingSwarm(one_more, keeps=False))
        assert logits.any(axis=0).all()
        assert wrong == 0
        (_, logits), wrong, _ = await gradients_of(LyingSwarm(far_apart, keeps=False))
        assert not logits[:, [0, 2]].any()
        assert wrong == 1

    run(scenario())


def test_the_products_of_rows_that_did_not_come_teach_nothing() -> None:
    async def scenario() -> None:
        swarm = LyingSwarm(honest)
        dispatcher = make_dispatcher(swarm)
        result = await send_to_best(dispatcher, random_rows(8), ranked(8, 4), 4, LENGTH, keep=True)
        swarm.behaviours |= {make_peer_id(n): replace(WELL, after_s=2 * DEADLINE) for n in range(2)}
        for gradients in await dispatcher.send_back(result, random_gradients(result)):
            assert not gradients.any()

    run(scenario())
