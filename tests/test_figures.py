"""The figures of the code: they are computed from this tree, and what must not happen in it does not."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "figures.py"


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(TOOL))


@pytest.fixture(scope="module")
def tree(tool: dict[str, Any]) -> Any:
    return tool["working_tree"]()


@pytest.fixture(scope="module")
def edges(tool: dict[str, Any], tree: Any) -> dict[str, set[str]]:
    found: dict[str, set[str]] = tool["import_edges"](tree)
    return found


def test_no_module_imports_itself_by_way_of_others(tool: dict[str, Any], edges: dict[str, set[str]]) -> None:
    assert tool["cycles"](edges) == []


def test_imports_only_go_down_the_floors(tool: dict[str, Any], edges: dict[str, set[str]]) -> None:
    assert "peer.errors" in edges["dht.manifest"]
    assert tool["upward_imports"](edges) == []


def test_cycles_and_upward_imports_are_found(tool: dict[str, Any]) -> None:
    edges = {"peer.a": {"peer.b"}, "peer.b": {"peer.c"}, "peer.c": {"peer.b"}, "peer.d": {"peer.d", "dht.e"}}
    edges |= {"dht.e": {"peer.a"}, "expert_server.f": {"trainer_client.g"}, "trainer_client.g": set()}
    assert sorted(tool["cycles"](edges)) == [["peer.b", "peer.c"], ["peer.d"]]
    assert tool["upward_imports"](edges) == [("expert_server.f", "trainer_client.g"), ("peer.d", "dht.e")]


def test_settings_are_those_of_the_models(tool: dict[str, Any], tree: Any) -> None:
    settings, _ = (ROOT / "docs" / "settings.md").read_text().split("### Presets")
    rows = settings.count("\n| `")
    counted = tool["settings"](tree)
    assert sum(counted.values()) == rows


@pytest.mark.slow
def test_table_is_printed_from_the_tree() -> None:
    ended = subprocess.run(
        [sys.executable, TOOL, "--json"], capture_output=True, text=True, timeout=60, check=True
    )
    figures = json.loads(ended.stdout)["tree"]
    assert figures["import cycles"] == figures["upward imports"] == 0
    assert figures["modules (without __init__)"] > 100
    assert figures["lines"] > 10_000
