"""No caller causes more than its share of an expert's steps, and no minority decides how large gradients may be."""

import random
from collections import Counter, deque
from statistics import median_low

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from expert_server.experts.callers import (
    _MOST_DIRECTIONS,
    LONGEST_S,
    MOST_OF_ROWS,
    MOST_SIZE,
    Callers,
)

WINDOW = 16

calls = st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 100)), max_size=150)
batches = st.lists(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 100), min_size=1, max_size=3), max_size=150
)


class Window:
    """The latest steps and the rows sent before each, counted in another way."""

    def __init__(self) -> None:
        self.sent: deque[Counter[str]] = deque([Counter()], maxlen=WINDOW)
        self.steps: deque[dict[str, float]] = deque(maxlen=WINDOW)

    def most(self, caller: str) -> float:
        """The most steps that the caller may have caused in the window that ends with the next step."""
        rows = sum(self.sent, Counter())
        share = max(MOST_OF_ROWS * rows[caller] / rows.total(), 1 / len(rows))
        return share * min(len(self.steps) + 1, WINDOW) + 1

    def step(self, rows: dict[str, int]) -> None:
        self.steps.append({caller: own / sum(rows.values()) for caller, own in rows.items()})

    def caused(self, caller: str) -> float:
        return sum(step.get(caller, 0.0) for step in self.steps)


def send(callers: Callers, window: Window, batch: dict[str, int]) -> list[str]:
    """Sends one batch, and takes a step with the rows of all callers that may take part. Returns those that may not."""
    for caller, rows in batch.items():
        callers.note_rows(caller, caller, rows, 1.0)
        window.sent[-1][caller] += rows
    over = [caller for caller in batch if callers.is_held_back(caller)]
    part = {caller: rows for caller, rows in batch.items() if caller not in over}
    if part:
        most = {caller: window.most(caller) for caller in part}
        callers.note_step(part)
        window.step(part)
        for caller in part:
            assert window.caused(caller) <= most[caller] + 1e-6
        window.sent.append(Counter())
    return over


@settings(max_examples=100, deadline=None)
@given(batches)
def test_in_every_window_a_caller_causes_no_more_than_its_share_of_the_steps(
    sent: list[dict[str, int]],
) -> None:
    callers, window = Callers(WINDOW), Window()
    for batch in sent:
        send(callers, window, batch)


@settings(max_examples=10, deadline=None)
@given(st.integers(3, 12), st.integers(1, 50), st.integers(0, 1000))
def test_a_minority_that_sends_many_tiny_batches_gets_no_more_steps_than_its_heads(
    honest: int, flood: int, seed: int
) -> None:
    rng = random.Random(seed)
    hostile = (honest - 1) // 2
    callers, window = Callers(64), Counter[bool]()
    for turn in range(300):
        sender, rows = f"honest {rng.randrange(honest)}", rng.randint(200, 600)
        batches = [(f"hostile {n % hostile}", 1) for n in range(flood)] + [(sender, rows)]
        for caller, size in batches:
            callers.note_rows(caller, caller, size, 1.0)
            if not callers.is_held_back(caller):
                callers.note_step({caller: size})
                window[caller.startswith("hostile")] += turn >= 100  # once the window is full
    assert window[True] <= hostile * (1 + window.total() * (1 / (honest + hostile) + 1 / 64))


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 8), st.integers(1, 40), st.integers(0, 1000))
def test_one_person_with_many_keys_causes_no_more_steps_than_one_group_may(
    honest: int, keys: int, seed: int
) -> None:
    """This holds however few rows the person sends with each key."""
    rng = random.Random(seed)
    callers, caused = Callers(WINDOW), Counter[bool]()
    for turn in range(200):
        sender = f"honest {rng.randrange(honest)}"
        batches = [(f"key {n}", 1, "one line") for n in range(keys)] + [
            (sender, rng.randint(200, 600), sender)
        ]
        for caller, rows, group in batches:
            callers.note_rows(caller, group, rows, 1.0)
            if not callers.is_held_back(caller):
                callers.note_step({caller: rows})
                caused[caller.startswith("key")] += turn >= 100
    share = max(1 / (1 + honest), MOST_OF_ROWS * keys / (keys + 200))
    assert caused[True] <= caused.total() * (share + 1 / WINDOW) + 1


def test_a_caller_leaves_steps_to_others_of_its_group() -> None:
    """However many tiny batches it sends, and however few steps its group has caused."""
    callers, caused = Callers(64), Counter[str]()
    for turn in range(200):
        batches = [("flood", 1, "school")] * 10 + [("pupil", 100, "school"), ("other", 100, "other")]
        for caller, rows, group in batches:
            callers.note_rows(caller, group, rows, 1.0)
            if not callers.is_held_back(caller):
                callers.note_step({caller: rows})
                caused[caller] += turn >= 100
    assert caused["flood"] <= (1 / 4 + 1 / 64) * caused.total() + 1


@given(batches, st.lists(st.sampled_from(["", "x", "y"]), min_size=6, max_size=6))
def test_in_groups_the_shares_of_all_still_come_to_all_steps(
    sent: list[dict[str, int]], groups: list[str]
) -> None:
    """So there is always somebody who may take the next step."""
    callers = Callers(WINDOW)
    for batch in sent:
        for caller, rows in batch.items():
            callers.note_rows(caller, groups["abcdef".index(caller)], rows, 1.0)
        callers.note_step(batch)
        assert not all(map(callers.is_held_back, callers._rows))
        assert sum(group.members for group in callers._groups.values()) == len(callers._rows)


@given(calls)
def test_a_caller_alone_or_with_half_of_the_rows_is_never_held_back(sent: list[tuple[str, int]]) -> None:
    callers, window = Callers(WINDOW), Window()
    for caller, rows in sent:
        assert (
            not send(callers, window, {caller: rows + 100 * (caller == "a")})
            or caller != "a"
            or (2 * sum(window.sent, Counter())["a"] < sum(window.sent, Counter()).total())
        )
    alone = Callers(WINDOW)
    for _, rows in sent:
        assert not send(alone, Window(), {"alone": rows})


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 20), st.integers(0, 1000))
def test_callers_with_batches_alike_are_never_held_back(count: int, seed: int) -> None:
    """This holds however different their speeds are."""
    rng = random.Random(seed)
    names = [str(number) for number in range(count)]
    speeds = [rng.uniform(0.1, 1.0) for _ in names]
    callers = Callers()
    for (caller,) in (rng.choices(names, speeds) for _ in range(600)):
        callers.note_rows(caller, caller, 64, 1.0)
        assert not callers.is_held_back(caller)
        callers.note_step({caller: 64})


@settings(deadline=None)
@given(batches, st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 100)), min_size=1, max_size=6))
def test_whoever_goes_on_calling_gets_a_step_in_the_end(
    sent: list[dict[str, int]], those_who_stay: list[tuple[str, int]]
) -> None:
    callers, window = Callers(WINDOW), Window()
    for batch in sent:
        send(callers, window, batch)
    waiting = {caller for caller, _ in those_who_stay}
    for _ in range(3000):
        for caller, rows in those_who_stay:
            if not send(callers, window, {caller: rows}):
                waiting.discard(caller)
        if not waiting:
            return
    pytest.fail(f"{waiting} wait for ever")


def test_what_is_remembered_is_bounded() -> None:
    callers = Callers()
    for number in range(10_000):
        callers.note_rows(f"peer {number}", f"peer {number}", 1, 1.0)
        if number % 50 == 49:
            callers.note_step({f"peer {earlier}": 1 for earlier in range(number - 49, number + 1)})
    remembered = [
        len(each) for each in (callers._rows, callers._caused, callers._sizes, callers._usual_sizes)
    ]
    assert max(remembered) <= 4096
    assert callers._all_rows == sum(callers._rows.values())


# How large gradients may be


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 6),
    st.lists(st.floats(0.1, 10), min_size=1, max_size=6),
    st.lists(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=5), max_size=5),
    st.randoms(use_true_random=False),
)
def test_no_minority_moves_the_size_beyond_the_sizes_of_the_others(
    rounds: int, honest: list[float], hostile: list[list[float]], rng: random.Random
) -> None:
    callers = Callers()
    sizes: dict[str, deque[float]] = {}
    hostile = hostile[: len(honest) - 1]
    for _ in range(rounds):
        turns = [(f"honest {n}", size * rng.uniform(0.5, 2)) for n, size in enumerate(honest)]
        turns += [(f"hostile {n}", size) for n, own in enumerate(hostile) for size in own]
        rng.shuffle(turns)
        for caller, size in turns:
            factor = callers.note_rows(caller, caller, 1, size)
            sizes.setdefault(caller, deque(maxlen=8)).append(size)
            usual = [median_low(own) for name, own in sizes.items() if name.startswith("honest")]
            of_hostile = len(sizes) - len(usual)
            if of_hostile < len(usual) and len(sizes) > 1:
                assert factor * size <= (1 + 1e-9) * max(min(size, MOST_SIZE * max(usual)), 0.0)
                assert factor * size >= (1 - 1e-9) * min(size, MOST_SIZE * min(usual))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.5, 2), min_size=2, max_size=6), st.integers(1, 60), st.sampled_from([1e-9, 1e9]))
def test_many_keys_of_one_group_do_not_set_how_large_gradients_may_be(
    honest: list[float], keys: int, size: float
) -> None:
    callers = Callers()
    for n, own in enumerate(honest):
        callers.note_rows(f"honest {n}", f"honest {n}", 1, own)
    for n in range(keys):
        factor = callers.note_rows(f"key {n}", "one line", 1, size)
        assert factor * size <= (1 + 1e-9) * min(size, MOST_SIZE * max(honest))
    for n, own in enumerate(honest):
        assert callers.note_rows(f"honest {n}", f"honest {n}", 1, own) * own >= (1 - 1e-9) * min(
            own, MOST_SIZE * min(honest)
        )


def test_a_caller_alone_is_not_scaled_and_one_that_sends_nothing_but_zeros_does_not_count() -> None:
    callers = Callers()
    assert [callers.note_rows("alone", "alone", 1, size) for size in (1.0, 1e3, 1e-3, 1e6)] == [1.0] * 4
    assert callers.note_rows("zeros", "zeros", 10, 0.0) == 1.0
    assert callers.note_rows("alone", "alone", 1, 1e9) == 1.0


def test_the_size_follows_training() -> None:
    """The size falls and rises by much more than `MOST_SIZE`, and no gradient is scaled."""
    callers = Callers()
    for step in range(300):
        size = 10.0 ** (abs(step - 150) / 30)
        for caller in "abc":
            assert callers.note_rows(caller, caller, 1, size) == 1.0


def test_of_two_callers_the_one_with_tiny_gradients_does_not_shrink_the_others() -> None:
    callers = Callers()
    for _ in range(10):
        assert callers.note_rows("tiny", "tiny", 1, 1e-9) == 1.0
        assert callers.note_rows("honest", "honest", 1, 1.0) == 1.0


def test_callers_that_left_do_not_count() -> None:
    callers = Callers(WINDOW)
    for caller in ("gone", "also gone"):
        callers.note_rows(caller, caller, 1, 1e-3)
        callers.note_step({caller: 1})
    for _ in range(WINDOW):
        for caller in "ab":
            callers.note_rows(caller, caller, 1, 1.0)
            callers.note_step({caller: 1})
    assert callers.note_rows("a", "a", 1, 3.9) == 1.0


def test_keys_without_end_that_cause_no_step_take_no_memory_without_end() -> None:
    """For example, gradients that overflow cause no step."""
    callers = Callers()
    for number in range(20_000):
        callers.note_rows(str(number), str(number), 1, 0.0)
    assert len(callers._rows) <= 8192


def test_those_who_stay_take_steps_again_soon_after_one_with_large_batches_left() -> None:
    now = 0.0
    callers = Callers(clock=lambda: now)

    def call(caller: str, rows: int) -> bool:
        callers.note_rows(caller, caller, rows, 1.0)
        if callers.is_held_back(caller):
            return False
        callers.note_step({caller: rows})
        return True

    for _ in range(300):
        now += 1
        assert call("large", 2048)
        assert all([call("a", 16), call("b", 16)])
    now += LONGEST_S
    taken = 0
    for _ in range(300):
        now += 1
        taken += call("a", 16) + call("b", 16)
    assert taken == 600


# Which way gradients may lead


def note(
    callers: Callers, caller: str, direction: NDArray[np.float64], group: str = "", rows: int = 64
) -> bool:
    """Returns whether the caller is held back. Nobody is for its steps, as there are none."""
    callers.note_rows(caller, group or caller, rows, 1.0)
    callers.note_direction(caller, rows, direction)
    return callers.is_held_back(caller)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 7),
    st.integers(0, 6),
    st.integers(1, 3),
    st.sampled_from(["flipped", "alike", "random", "huge"]),
    st.integers(0, 10**6),
)
def test_no_minority_holds_back_a_caller_whom_no_honest_one_opposes(
    honest: int, liars: int, keys: int, lie: str, seed: int
) -> None:
    """Whatever they send, and under however many keys each."""
    rng = np.random.default_rng(seed)
    liars = min(liars, honest - 1)
    own = rng.standard_normal((honest, 8))
    own[:, 0] = 4 * np.abs(own[:, 0]) + 2
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    callers = Callers()
    for n, mine in enumerate(own):  # else liars would be most of those that have called
        note(callers, f"honest {n}", mine)
    for _ in range(4):
        turns = [(f"honest {n}", "") for n in range(honest)]
        turns += [(f"key {key} of {n}", f"liar {n}") for n in range(liars) for key in range(keys)]
        rng.shuffle(turns)
        for caller, group in turns:
            if not group:
                mine = own[int(caller.split()[1])]
                are_opposed = [mine @ other < 0 for other in own]
                assert not note(callers, caller, mine) or any(are_opposed)
            else:
                said = {
                    "flipped": -own.sum(axis=0),
                    "alike": -own[0],
                    "random": rng.standard_normal(8),
                    "huge": -1e30 * own.sum(axis=0),
                }[lie]
                note(callers, caller, said, group)


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 6), st.integers(1, 4), st.sampled_from([1.0, 2.0, 1e9]), st.integers(0, 10**6))
def test_a_minority_that_flips_signs_is_held_back(honest: int, keys: int, size: float, seed: int) -> None:
    """However large its gradients. Each call has as much noise, and tiny calls hide nothing."""
    rng = np.random.default_rng(seed)
    true = rng.standard_normal(256)
    callers, held, withheld = Callers(), 0, 0
    for turn in range(12):
        for n in range(honest):
            withheld += note(callers, f"honest {n}", true + rng.standard_normal(256), f"group {n}")
        for key in range(keys):
            note(callers, f"key {key}", 0.1 * size * rng.standard_normal(256), "liar", 1)
            held += note(callers, f"key {key}", size * (rng.standard_normal(256) - true), "liar") and turn > 3
    assert not withheld
    assert held == 8 * keys


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(2, 4), st.integers(0, 10**6))
def test_never_are_all_callers_held_back(count: int, dimensions: int, seed: int) -> None:
    """This holds even if each caller opposes most others, as three may in a plane."""
    rng = np.random.default_rng(seed)
    callers, held = Callers(), {}
    for _ in range(8):
        for n in range(count):
            held[n] = note(callers, str(n), rng.standard_normal(dimensions))
            assert len(held) < count or not all(map(callers.is_held_back, map(str, range(count))))


@pytest.mark.parametrize(("count", "others"), [(5, 2), (7, 3)])
def test_an_expert_learns_as_much_from_callers_of_another_domain_as_without_the_rule(
    count: int, others: int
) -> None:
    """Fewer than half want something else, so that they oppose most others at the end of training."""
    rng = np.random.default_rng(0)
    wanted = np.zeros((count, 64))
    wanted[:others, 0] = 1.0
    ends = []
    for has_rule in (True, False):
        callers, state = Callers(), np.zeros(64)
        for _ in range(300):
            for n, own in enumerate(wanted):
                pull = own - state + 0.3 * rng.standard_normal(64)
                if not (note(callers, str(n), pull) and has_rule):
                    state += 0.02 * pull
        ends.append(state[0])
    assert ends == pytest.approx([others / count] * 2, abs=0.1)


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_callers_with_unrelated_gradients_are_not_held_back(count: int) -> None:
    rng = np.random.default_rng(count)
    callers = Callers()
    for _ in range(600 // count):
        for n in range(count):
            assert not note(callers, str(n), rng.standard_normal(256))


def test_directions_are_compared_only_where_one_of_three_or_more_callers_could_be_held_back() -> None:
    callers = Callers()
    for number in range(4):
        assert callers.compares_directions == (number >= 3)
        callers.note_rows(str(number), str(number), 1, 1.0)


def test_of_two_callers_none_is_held_back_and_one_that_turns_round_is_held_back_no_longer() -> None:
    callers, true = Callers(), np.eye(8)[0]
    for _ in range(10):
        assert not note(callers, "a", true)
        assert not note(callers, "b", -true)
    assert [note(callers, "c", true), note(callers, "b", -true)] == [False, True]
    for _ in range(10):
        note(callers, "b", true)
    assert not callers.is_held_back("b")


def test_a_caller_that_pointed_against_others_is_held_back_no_longer_once_they_have_left() -> None:
    """Directions are noted only among three callers or more, as `compute` does it."""
    now = 0.0
    callers, true = Callers(clock=lambda: now), np.eye(8)[0]

    def call(caller: str, direction: NDArray[np.float64]) -> bool:
        callers.note_rows(caller, caller, 64, 1.0)
        if callers.compares_directions:
            callers.note_direction(caller, 64, direction)
        return callers.is_held_back(caller)

    for _ in range(3):
        assert not any([call("a", true), call("c", true)])
        call("b", -true)
    callers.note_step({"a": 64, "c": 64})
    now += LONGEST_S / 2
    assert call("b", -true)
    now += LONGEST_S / 2 + 1
    assert not call("b", -true)


def test_keys_of_one_group_push_out_the_directions_of_no_others() -> None:
    callers, true = Callers(), np.eye(8)[0]
    for n in range(5):
        note(callers, f"honest {n}", true)
    for n in range(3 * _MOST_DIRECTIONS):
        assert note(callers, f"key {n}", -true, "one line")
        assert len(callers._pulls) <= _MOST_DIRECTIONS
    assert {f"honest {n}" for n in range(5)} <= callers._pulls.keys()


def test_gradients_that_were_scaled_down_are_not_forgotten_as_if_they_had_counted_in_full() -> None:
    callers, true = Callers(), np.eye(8)[0]
    for caller in "abc":
        note(callers, caller, true)
    callers.note_rows("liar", "liar", 64, 1e3)
    callers.note_direction("liar", 64, -MOST_SIZE * true)
    assert note(callers, "liar", true)


@pytest.mark.parametrize("keys", [1, 3])
def test_nobody_earns_a_good_record_with_huge_gradients_while_no_others_call(keys: int) -> None:
    """Their size is not limited then, and a record of that size would outweigh thousands of flipped calls."""
    callers, true = Callers(), np.eye(8)[0]
    for key in range(keys):
        callers.note_rows(f"liar {key}", "liar", 64, 1e12)
        callers.note_direction(f"liar {key}", 64, 1e12 * true)
    held = 0
    for _ in range(20):
        for n in range(5):
            assert not note(callers, f"honest {n}", true)
        held += note(callers, "liar 0", -true, "liar")
    assert held >= 15


def test_a_direction_that_is_not_finite_changes_nothing() -> None:
    callers, true = Callers(), np.eye(8)[0]
    for caller in "abc":
        note(callers, caller, true)
    assert not note(callers, "a", np.full(8, np.nan))
    assert note(callers, "liar", -true)
    assert note(callers, "liar", np.full(8, np.inf))
    assert not note(callers, "a", true)
