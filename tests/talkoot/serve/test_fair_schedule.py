"""Which streams get places when there are more streams than places."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from talkoot.serve.schedule import SLICE, FairSchedule

Stream = tuple[str, int]


def filled(places: int, wanted: dict[str, int]) -> FairSchedule[Stream]:
    schedule = FairSchedule[Stream](places)
    for client, streams in wanted.items():
        for number in range(streams):
            schedule.add(client, (client, number))
    return schedule


def shares(schedule: FairSchedule[Stream]) -> Counter[str]:
    return Counter(client for client, _ in schedule.running)


demands = st.dictionaries(st.sampled_from("abcde"), st.integers(1, 12), min_size=1)


@given(places=st.integers(1, 10), first=demands, later=demands)
def test_places_are_shared_as_evenly_as_the_demand_lets(
    places: int, first: dict[str, int], later: dict[str, int]
) -> None:
    schedule = filled(places, first)
    schedule.next_round()
    for client, streams in later.items():
        for number in range(streams):
            schedule.add(client, (client, 100 + number))
    schedule.next_round()
    wanted = Counter(first) + Counter(later)
    got = shares(schedule)
    assert got.total() == min(places, wanted.total())
    for client, most in wanted.items():
        if got[client] < most:
            assert all(got[other] <= got[client] + 1 for other in wanted)


@given(places=st.integers(1, 6), wanted=demands)
def test_every_stream_ends_and_each_gets_its_rounds(places: int, wanted: dict[str, int]) -> None:
    schedule = filled(places, wanted)
    left = dict.fromkeys(schedule, 5)
    for _ in range(5 * sum(wanted.values())):
        lost = schedule.next_round()
        assert not set(lost) & set(schedule.running)
        for stream in schedule.running:
            left[stream] -= 1
            if not left[stream]:
                schedule.remove(stream)
        if not len(schedule):
            break
    assert set(left.values()) == {0}


def test_with_fewer_places_than_clients_all_get_their_turn() -> None:
    schedule = filled(2, dict.fromkeys("abcde", 1))
    rounds: Counter[str] = Counter()
    for _ in range(50 * SLICE):
        schedule.next_round()
        rounds.update(shares(schedule))
    assert max(rounds.values()) - min(rounds.values()) <= 2 * SLICE


def test_a_lone_client_never_loses_a_place() -> None:
    schedule = filled(2, {"a": 5})
    assert [schedule.next_round() for _ in range(3 * SLICE)] == [[]] * 3 * SLICE
    assert schedule.running == [("a", 0), ("a", 1)]


def test_a_stream_can_leave_before_it_gets_a_place() -> None:
    schedule = filled(1, {"a": 2, "b": 1})
    schedule.next_round()
    for stream in list(schedule):
        schedule.remove(stream)
    assert (len(schedule), schedule.waiting, schedule.running) == (0, 0, [])
