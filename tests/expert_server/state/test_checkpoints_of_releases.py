"""Checkpoints that nodes of every release so far have written: they load, and the expert goes on from them."""

from pathlib import Path

import pytest
from checkpoint_samples import AN_UID, SWARM, assert_same, make_store, step

from dht.manifest import Manifest
from expert_server.experts.expert import Expert

RELEASES = sorted((Path(__file__).parents[2] / "releases").glob("*/node"))


def test_there_is_a_release() -> None:
    assert RELEASES


@pytest.mark.parametrize("folder", RELEASES, ids=lambda path: path.parent.name)
def test_checkpoint_of_a_release_loads_and_the_expert_goes_on(folder: Path) -> None:
    manifest = Manifest.from_json((folder / "manifest.json").read_bytes())
    checkpoint = make_store(folder, swarm_id=SWARM).load_newest(AN_UID)
    assert checkpoint is not None
    assert checkpoint.update_count == 3
    expert = Expert(AN_UID, manifest)
    expert.import_state(checkpoint.state, checkpoint.update_count)
    assert_same(expert.export_state(), checkpoint.state)
    assert step(expert).update_count == 4
