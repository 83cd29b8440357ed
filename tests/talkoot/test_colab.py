"""The notebook for Colab: its cells run as they are, with a filled-in form, up to the join."""

import json
import os
import re
import signal
import site
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import wait_until
from training_swarm import HOST, Founder, founded

from peer.loop import LoopThread

ROOT = Path(__file__).parents[2]
NOTEBOOK: dict[str, Any] = json.loads((ROOT / "deploy" / "colab" / "talkoot.ipynb").read_text())


def cells(**form: str) -> list[str]:
    """The code of all cells, with these values in the fields of the form."""
    code = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    for name, value in form.items():
        code[0], count = re.subn(rf'^{name} = ".*?"', f'{name} = "{value}"', code[0], flags=re.MULTILINE)
        assert count == 1, name
    return code


@pytest.fixture
def founder(loop: LoopThread, tmp_path: Path) -> Iterator[Founder]:
    with founded(loop, tmp_path, experts=4) as found:
        yield found


def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Talkoot's requirements are installed already, as torch is on Colab."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_DEPS", "1")
    there = [path for path in sys.path if path.endswith("-packages")] or site.getsitepackages()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(there))


def test_notebook_joins_as_a_volunteer(
    founder: Founder,
    release_wheel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    without_network(monkeypatch)
    monkeypatch.setenv("TALKOOT_NODE_HOST", HOST)
    monkeypatch.setenv("TALKOOT_NODE_THREADS", "1")
    monkeypatch.setenv("TALKOOT_NODE_DRAIN_TIMEOUT_S", "0")
    monkeypatch.chdir(tmp_path)
    *up_to_the_join, serving = cells(
        INVITE=founder.invite,
        NAME="Aino in Colab",
        SOURCE=str(release_wheel),
        FOLDER=str(tmp_path / "talkoot"),
    )
    names: dict[str, Any] = {}
    try:
        for cell in up_to_the_join:
            exec(compile(cell, "cell", "exec"), names)
        said = capsys.readouterr().out
        assert "talkoot " in said
        assert (tmp_path / "talkoot" / "state" / "identity.key").exists()
        node: subprocess.Popen[str] = names["node"]
        assert node.poll() is None
        wait_until(lambda: hosted_by(founder, "Aino in Colab") >= 4, "the notebook's node in the swarm")
        node.send_signal(signal.SIGTERM)
        exec(compile(serving, "cell", "exec"), names)
    finally:
        if "node" in names:
            names["node"].kill()
            names["node"].communicate()
    assert "the node has left, with exit status" in capsys.readouterr().out


def hosted_by(founder: Founder, name: str) -> int:
    """How many experts the node with that name hosts, as the swarm sees it."""

    async def look() -> int:
        registry = founder.node.swarm.registry
        nodes = await registry.nodes(await registry.node_ids())
        return sum(node.expert_count for node in nodes.values() if node.name == name)

    return founder.loop.run(look(), 120)


def test_notebook_asks_for_an_invite() -> None:
    form, install, *_ = cells()
    names: dict[str, Any] = {}
    exec(compile(form, "cell", "exec"), names)
    with pytest.raises(SystemExit, match="put the invite into INVITE"):
        exec(compile(install, "cell", "exec"), names)


def test_notebook_asks_where_talkoot_is_installed_from() -> None:
    form, install, *_ = cells(INVITE="talkoot2abc")
    names: dict[str, Any] = {}
    exec(compile(form, "cell", "exec"), names)
    with pytest.raises(SystemExit, match="put what pip installs into SOURCE"):
        exec(compile(install, "cell", "exec"), names)


def test_notebook_is_kept_without_what_it_printed() -> None:
    assert all(cell["outputs"] == [] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code")
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
