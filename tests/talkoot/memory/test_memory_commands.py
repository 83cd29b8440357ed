"""The whole life of a memory, by commands: it is built, published, listed, searched, and withdrawn."""

import contextlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from commands import run_here
from preloaded import Preloaded
from training_swarm import talkoot
from victim import MANIFEST_TOML, NodeVictim, founder, member

from expert_server.settings import NodeSettings

QUICK = {"announce_every_s": 2, "p2pd": "off", "upnp": False}
SUBJECTS = {
    "bread": "The baker kneads the dough of flour and water, lets the yeast rise, and puts the loaf into a hot oven.",
    "glaciers": "A glacier is a river of ice that flows slowly down its valley and carries stones from the mountains.",
    "violins": "A violin has four strings that are bowed or plucked, and its wooden body makes their sound louder.",
    "bees": "Honey bees dance inside the hive to tell the others in which direction they found blossoms with nectar.",
    "locks": "A canal lock lifts a boat from one level of water to another by closing a gate and filling a chamber.",
    "comets": "A comet comes near the sun on a long orbit, and the heat draws a bright tail of dust out of its ice.",
}


def written(folder: Path) -> Path:
    """Writes a file for each subject, with a few passages."""
    folder.mkdir()
    for name, sentence in SUBJECTS.items():
        paragraphs = [f"Part {number} about {name}. {sentence} " * 4 for number in range(4)]
        (folder / f"{name}.txt").write_text("\n\n".join(paragraphs))
    return folder


def events(*arguments: str) -> list[dict[str, Any]]:
    """The events that a command prints. It runs in this process, as an interpreter takes seconds to start."""
    ended = talkoot(*arguments)
    assert ended.status == 0, ended.err
    return [json.loads(line) for line in ended.out.splitlines()]


def read(node: NodeVictim, *arguments: str) -> Any:
    """The output of a command that only reads."""
    ended = talkoot(*arguments, "--join", node.invite, "--json")
    assert ended.status == 0, ended.err
    return json.loads(ended.out)


def search(node: NodeVictim, question: str) -> list[dict[str, Any]]:
    passages: list[dict[str, Any]] = read(node, "search", question)["passages"]
    return passages


@pytest.mark.timeout(900)  # three processes start, one after the other
def test_a_memory_is_built_published_found_and_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "memory"
    texts = written(tmp_path / "texts")
    built = talkoot("memory", "build", texts, "-o", folder, "--name", "subjects", "--license", "CC0-1.0")
    assert built.status == 0, built.err
    with contextlib.ExitStack() as stack:
        hosting = {"experts": 0, "memory_disk": "100MB", **QUICK}
        node = stack.enter_context(founder(tmp_path, MANIFEST_TOML, **hosting))
        stack.enter_context(member(tmp_path, node.invite, "second", **hosting))
        own = ("--state", str(node.state), "--host", "127.0.0.1", "--announce-every-s", "2", "--p2pd", "off")
        publish = ("memory", "publish", str(folder), *own, "--log-format", "json")
        with Preloaded(
            "-m", "talkoot", *publish, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as killed:
            assert killed.stdout is not None
            assert killed.stdout.readline()
            killed.kill()
        *_, published = events(*publish)
        assert (published["event"], published["name"], published["replicas"]) == ("published", "subjects", 2)

        (memory,) = read(node, "memory", "list")["memories"]
        assert (memory["name"], memory["licenses"], memory["fewest_replicas"]) == ("subjects", ["CC0-1.0"], 2)
        assert len(read(node, "memory", "inspect", "subjects")["hosts"]) == 2

        question = "how do bees tell each other where blossoms are?"
        best = search(node, question)[0]
        assert best["source"] == "bees.txt"
        assert "nectar" in best["text"]
        *_, revoked = events(
            "memory", "revoke", str(folder), "--passage", best["hash"], *own, "--log-format", "json"
        )
        assert (revoked["event"], revoked["revision"], revoked["hosts"]) == ("revoked", 2, 2)
        assert best["hash"] not in {found["hash"] for found in search(node, question)}


def test_the_memory_to_unlist_is_not_taken_for_the_name_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def note(terminal: object, name: str, join: object, state: object, settings: NodeSettings) -> None:
        asked.append((name, settings.name))

    monkeypatch.setattr("talkoot.memory.unlist.run_unlist", note)
    for more in ((), ("--name", "Ada")):
        assert run_here("memory", "unlist", "my-notes-bfPmoJ8PQVwE", "--join", "x", *more).returncode == 0
    assert asked == [("my-notes-bfPmoJ8PQVwE", None), ("my-notes-bfPmoJ8PQVwE", "Ada")]
