"""The web application: its answers match its OpenAPI file, and browsers can use it safely."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from simulated_readings import NOW, Answer, Asked, manifest, memory, node, peer, picture_of, replica, trainer

from peer.formatting import is_loopback
from peer.metrics import total
from peer.transport.addresses import Multiaddress
from peer.transport.endpoints import Endpoint
from talkoot.dashboard import api
from talkoot.dashboard.app import OPENAPI, targets
from talkoot.dashboard.history import Sample
from talkoot.dashboard.picture import Picture
from talkoot.dashboard.watcher import expert_samples_of, samples_of

HOSTILE = '<img src=x onerror="alert(1)">'


def small() -> Picture:
    model = manifest((2, 2))
    replicas = [replica(uid, number % 3) for number, uid in enumerate(model.uids())]
    nodes = [
        node(0, name=HOSTILE),
        node(1, metrics_address="127.0.0.1:9001"),
        node(2, rows_per_s=None, name=""),
    ]
    trainers = [
        trainer(0, metrics_address="127.0.0.1:9002"),
        trainer(1, loss=None, forward=None, failures={}),
    ]
    return picture_of(nodes, trainers, swarm=model, replicas=replicas, memories=[memory(replicas=(2, 1))])


@pytest.fixture
def asked(tmp_path: Path) -> Any:
    made = Asked(tmp_path, small())
    picture = made.watcher.picture
    assert picture is not None
    for second in range(3):
        made.history.add([*samples_of(picture), *expert_samples_of(picture)], NOW + 10 * second)
    made.history.add([Sample("loss", "old", 1.0)], NOW - 3000)
    yield made
    made.history.close()


# The OpenAPI file

DESCRIBED = json.loads(OPENAPI.read_text())
HOST = peer(0).to_base58()
ASKED = [
    ("/api/v1/swarm", "/api/v1/swarm"),
    ("/api/v1/nodes", "/api/v1/nodes?sort=name&order=desc&filter=0.1"),
    ("/api/v1/nodes/{peer_id}", f"/api/v1/nodes/{HOST}"),
    ("/api/v1/nodes/{peer_id}", "/api/v1/nodes/nobody"),
    ("/api/v1/nodes", "/api/v1/nodes?page=x"),
    ("/api/v1/leaderboard", "/api/v1/leaderboard"),
    ("/api/v1/experts", "/api/v1/experts?layer=1"),
    ("/api/v1/experts", "/api/v1/experts?layer=7"),
    ("/api/v1/experts/{uid}", "/api/v1/experts/0.1.0"),
    ("/api/v1/experts/{uid}", "/api/v1/experts/0.1"),
    ("/api/v1/trainers", "/api/v1/trainers"),
    ("/api/v1/memories", "/api/v1/memories"),
    ("/api/v1/memories", "/api/v1/memories?per_page=0"),
    ("/api/v1/history", "/api/v1/history?metric=loss&since=1"),
    ("/api/v1/history", "/api/v1/history?metric=latency_ms"),
    ("/api/v1/history", "/api/v1/history?metric=memory_replicas"),
    ("/api/v1/history", "/api/v1/history"),
    ("/sd", "/sd"),
    ("/healthz", "/healthz"),
]


def check_described(described: str, answer: Answer) -> None:
    """Raises if the answer is not as the file describes."""
    response = DESCRIBED["paths"][described]["get"]["responses"][str(answer.status)]
    if "$ref" in response:
        response = DESCRIBED["components"]["responses"][response["$ref"].rpartition("/")[2]]
    schema = response["content"]["application/json"]["schema"]
    Draft202012Validator(schema | {"components": DESCRIBED["components"]}).validate(answer.json())


@pytest.mark.parametrize(("described", "path"), ASKED)
def test_answers_are_as_the_openapi_file_says(asked: Asked, described: str, path: str) -> None:
    answer = asked.get(path)
    check_described(described, answer)
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "path", ["/api/v1/swarm", "/api/v1/nodes", "/api/v1/trainers", "/api/v1/leaderboard", "/sd"]
)
@pytest.mark.parametrize("picture", [None, picture_of([])], ids=["unseen", "empty"])
def test_answers_about_no_swarm_are_so_too(tmp_path: Path, path: str, picture: Picture | None) -> None:
    asked = Asked(tmp_path, picture)
    check_described(path, asked.get(path))
    asked.history.close()


@pytest.mark.parametrize(
    ("described", "path"),
    [("/api/v1/experts", "/api/v1/experts"), ("/api/v1/experts/{uid}", "/api/v1/experts/0.0.0")],
)
def test_experts_that_were_not_seen_are_unavailable(tmp_path: Path, described: str, path: str) -> None:
    asked = Asked(tmp_path, None)
    answer = asked.get(path)
    assert answer.status == 503
    check_described(described, answer)
    asked.history.close()


def test_every_path_that_is_served_is_described(asked: Asked) -> None:
    served = {route.path for route in asked.app.routes}  # type: ignore[attr-defined]  # all routes here have one
    assert served - {"/", "/static", "/api/v1/openapi.json"} == DESCRIBED["paths"].keys()
    assert {path for path, _ in ASKED} == DESCRIBED["paths"].keys() - {"/events", "/metrics"}


def test_the_openapi_file_is_served(asked: Asked) -> None:
    assert asked.get("/api/v1/openapi.json").json() == DESCRIBED


# Safety of browsers


@pytest.mark.parametrize(
    "path", ["/api/v1/swarm", "/api/v1/nodes", "/nothing", "/healthz", "/api/v1/nodes?page=x"]
)
def test_every_answer_keeps_a_browser_safe(asked: Asked, path: str) -> None:
    headers = asked.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
    assert "access-control-allow-origin" not in headers


def test_hostile_names_stay_json(asked: Asked) -> None:
    answer = asked.get("/api/v1/nodes")
    assert HOSTILE in {row["name"] for row in answer.json()["nodes"]}
    assert answer.headers["content-type"] == "application/json"
    refused = asked.get("/api/v1/nodes?sort=%3Cscript%3E")
    assert (refused.status, refused.headers["content-type"]) == (400, "application/json")


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "",
        "127.0.0.1.evil.example",
        "localhost.evil",
        "[::1].evil",
        "[::1]evil:80",
        "[::1",
        "::1",
        "localhost:80:evil",
        "localhost:evil",
        "localhost@evil",
        "127.0.0.1/evil",
        "[::1%25lo]",
        " localhost",
        "localhost, evil",
    ],
)
def test_on_loopback_other_names_are_refused(asked: Asked, host: str) -> None:
    for path in DESCRIBED["paths"]:
        answer = asked.get(path, host)
        assert answer.status == 421
        check_described(path, answer)


@pytest.mark.parametrize("host", ["localhost:8080", "127.0.0.1", "[::1]:8080", "127.9.9.9:1"])
def test_on_loopback_its_own_names_are_answered(asked: Asked, host: str) -> None:
    assert asked.get("/api/v1/swarm", host).status == 200


def test_elsewhere_any_name_is_answered(tmp_path: Path) -> None:
    asked = Asked(tmp_path, None, host="192.0.2.7")
    assert asked.get("/api/v1/swarm", "dashboard.example").status == 200
    asked.history.close()
    assert not is_loopback("192.0.2.7")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "TRACE"])
@pytest.mark.parametrize("path", ["/api/v1/swarm", "/events"])
def test_it_only_reads(asked: Asked, path: str, method: str) -> None:
    answer = asked.get(path, method=method)
    assert (answer.status, list(answer.json())) == (405, ["error"])
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static//etc/passwd"]
)
def test_nothing_beside_the_static_files_is_served(asked: Asked, path: str) -> None:
    assert asked.get(path).status == 404


# Many requests

LONG = ["nodes", f"nodes/{HOST}", "leaderboard", "trainers", "memories", "experts", "experts/0.0.0"]


class Held:
    """Makes answers that are not ready before the test says so."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        """The queries, in the order in which their answers are made."""
        self.goes_on = threading.Event()
        self._begun = threading.Event()

    def answer(self, picture: object, *query: object) -> dict[str, Any]:
        self.asked.append(query[0])
        self._begun.set()
        if not self.goes_on.wait(20):
            raise TimeoutError("the loop did not run meanwhile")
        raise api.ApiError(404, "made up")

    async def begins(self) -> None:
        """Waits until the first answer is being made."""
        assert await asyncio.to_thread(self._begun.wait, 20)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held()
    for name in (
        "nodes",
        "node",
        "leaderboard",
        "trainers",
        "memories",
        "experts",
        "expert",
        "history_query",
    ):
        monkeypatch.setattr(api, name, held.answer)
    monkeypatch.setattr("talkoot.dashboard.app.targets", held.answer)
    yield held
    held.goes_on.set()


@pytest.mark.parametrize(
    "path", [*(f"/api/v1/{name}" for name in LONG), "/api/v1/history?metric=loss", "/sd"]
)
def test_the_loop_runs_while_an_answer_is_made(asked: Asked, held: Held, path: str) -> None:
    async def scenario() -> int:
        asking = asyncio.create_task(asked.ask(path))
        await held.begins()
        assert (await asked.ask("/healthz")).status == 200
        held.goes_on.set()
        return (await asking).status

    assert asyncio.run(scenario()) == 404


def test_of_many_requests_one_is_answered_at_a_time_and_neighbourhoods_take_turns(
    asked: Asked, held: Held
) -> None:
    async def scenario() -> None:
        greedy = [asyncio.create_task(asked.ask(f"/api/v1/nodes?filter={n}")) for n in range(100)]
        await held.begins()
        other = asyncio.create_task(asked.ask("/api/v1/nodes?filter=other", "localhost", client="192.0.2.1"))
        for _ in range(100):  # a few turns of the loop, and all are in line
            await asyncio.sleep(0)
        assert len(held.asked) == 1
        held.goes_on.set()
        await asyncio.gather(*greedy, other)

    asyncio.run(scenario())
    assert len(held.asked) == 101
    assert "other" in [query["filter"] for query in held.asked[:3]]  # type: ignore[index]


def test_a_request_whose_client_has_gone_waits_no_longer(asked: Asked, held: Held) -> None:
    async def scenario() -> None:
        first = asyncio.create_task(asked.ask("/api/v1/nodes"))
        await held.begins()
        leaves = asyncio.Event()
        gone = [asyncio.create_task(asked.ask("/api/v1/nodes", leaves=leaves)) for _ in range(50)]
        await asyncio.sleep(0)
        leaves.set()
        await asyncio.gather(*gone)
        held.goes_on.set()
        await first

    asyncio.run(scenario())
    assert len(held.asked) == 1


def test_no_call_begins_before_the_last_one_has_ended_even_if_its_client_has_gone(
    asked: Asked, held: Held
) -> None:
    async def scenario() -> None:
        for _ in range(20):
            leaves = asyncio.Event()
            asking = asyncio.create_task(asked.ask("/api/v1/nodes", leaves=leaves))
            await held.begins()
            leaves.set()
            await asking
        assert len(held.asked) == 1
        held.goes_on.set()

    asyncio.run(scenario())


def test_long_lists_are_encoded_in_parts_as_other_json(asked: Asked) -> None:
    picture = asked.watcher.picture
    assert picture is not None
    (row,) = picture.replicas["0.0.0"]
    for count in (0, 1, 1000, 1001, 2500):
        picture.replicas["0.0.0"] = [row] * count
        answer = asked.get("/api/v1/experts/0.0.0")
        check_described("/api/v1/experts/{uid}", answer)
        assert len(answer.json()["replicas"]) == count


# News


async def stream(
    asked: Asked, events: int, take: bool = True, client: str = "127.0.0.1"
) -> list[dict[str, Any]]:
    """The first events that a page receives. None: the page is stuck and takes none."""
    got: list[dict[str, Any]] = []
    enough = asyncio.Event()

    async def send(message: Any) -> None:
        body = message.get("body", b"")
        if body:
            kind, data = body.decode().split("\n")[:2]
            assert kind == "event: swarm"
            got.append(json.loads(data.removeprefix("data: ")))
            if len(got) == events:
                enough.set()

    async def receive() -> dict[str, Any]:
        await enough.wait()
        return {"type": "http.disconnect"}

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/events",
        "headers": [(b"host", b"localhost")],
        "query_string": b"",
        "client": (client, 1),
    }
    async with asyncio.timeout(60):
        await asked.app(scope, receive, send)
    return got


def test_a_page_is_told_of_each_reading(asked: Asked) -> None:
    async def watch() -> list[dict[str, Any]]:
        watching = asyncio.create_task(stream(asked, 3))
        while not watching.done():
            asked.watcher.tell()
            await asyncio.sleep(0.001)
        return await watching

    got = asyncio.run(watch())
    assert [event["name"] for event in got] == ["sauna"] * 3
    assert total(asked.streams.open) == 0


def test_a_client_with_many_pages_leaves_others_their_share(tmp_path: Path) -> None:
    asked = Asked(tmp_path, small(), max_streams=4)

    async def watch() -> None:
        greedy = [asyncio.create_task(stream(asked, 10_000)) for _ in range(4)]
        await asyncio.sleep(0)  # all begin
        others = [asyncio.create_task(stream(asked, 10_000, client="192.0.2.1")) for _ in range(2)]
        await asyncio.wait(greedy[2:])
        assert total(asked.streams.open) == 4
        assert not any(task.done() for task in greedy[:2] + others)
        for task in greedy[:2] + others:
            task.cancel()
        await asyncio.gather(*greedy, *others, return_exceptions=True)

    asyncio.run(watch())
    assert total(asked.streams.open) == 0
    asked.history.close()


def test_pages_beyond_the_bound_are_refused(tmp_path: Path) -> None:
    asked = Asked(tmp_path, small(), max_streams=2)

    async def watch() -> Answer:
        watching = [asyncio.create_task(stream(asked, 10_000)) for _ in range(2)]
        await asyncio.sleep(0)  # both begin
        assert total(asked.streams.open) == 2
        answer = await asked.ask("/events", "localhost")
        for task in watching:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return answer

    answer = asyncio.run(watch())
    assert (answer.status, answer.headers["retry-after"]) == (503, "30")
    check_described("/events", answer)
    assert total(asked.streams.open) == 0
    asked.history.close()


# Service discovery

LOCAL, HOME, MIXED, PUBLIC = (
    [Multiaddress.of(Endpoint(text), peer(0)) for text in texts]
    for texts in (
        ["127.0.0.1:1"],
        ["192.168.1.5:1"],
        ["192.168.1.5:1", "8.8.8.8:1"],
        ["8.8.8.8:1", "example.org:1"],
    )
)


@pytest.mark.parametrize(
    ("address", "swarms"),
    [
        ("127.0.0.1:9100", [LOCAL]), ("[::1]:9100", [LOCAL]), ("192.168.1.9:9100", [LOCAL, HOME]),
        ("1.1.1.1:9100", [LOCAL, HOME, MIXED, PUBLIC]), ("[::ffff:127.0.0.1]:9100", []),
        ("[::ffff:192.168.1.9]:9100", []), ("[::ffff:1.1.1.1]:9100", []), ("a.example:9100", []),
        ("[::ffff:169.254.169.254]:80", []), ("[::ffff:0.0.0.0]:80", []), ("169.254.169.254:80", []), ("", []),
    ],
)  # fmt: skip
def test_only_what_the_swarm_itself_could_reach_is_scraped(
    address: str, swarms: list[list[Multiaddress]]
) -> None:
    picture = picture_of([node(0, metrics_address=address)])
    for bootstrap in (LOCAL, HOME, MIXED, PUBLIC):
        found = targets(picture, bootstrap)
        assert bool(found) is (bootstrap in swarms)


def test_live_nodes_and_trainers_are_found_by_role(asked: Asked) -> None:
    assert asked.get("/sd").json() == [
        {"targets": ["127.0.0.1:9001"], "labels": {"role": "node", "swarm": "sauna"}},
        {"targets": ["127.0.0.1:9002"], "labels": {"role": "trainer", "swarm": "sauna"}},
    ]


def test_a_node_that_has_gone_is_scraped_no_more() -> None:
    picture = picture_of([node(0, metrics_address="127.0.0.1:1")])
    gone = picture_of([], now=NOW + 100).with_earlier(picture.nodes, [])
    assert targets(gone, LOCAL) == []
