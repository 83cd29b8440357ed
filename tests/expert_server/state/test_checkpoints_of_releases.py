"""A node loads the checkpoints of every recorded release, and those that it writes now."""

from pathlib import Path

import pytest
from checkpoint_samples import AN_UID, SWARM, assert_same, make_store, step
from make_release import recorded_samples, write_node_sample

from dht.manifest import Manifest
from expert_server.experts.expert import Expert


@pytest.fixture(
    params=[*recorded_samples("node"), None], ids=lambda path: path.parent.name if path else "this"
)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param is not None:
        return Path(request.param)
    write_node_sample(tmp_path / "node")
    return tmp_path / "node"


def test_checkpoint_of_a_release_loads_and_the_expert_goes_on(folder: Path) -> None:
    manifest = Manifest.from_json((folder / "manifest.json").read_bytes())
    checkpoint = make_store(folder, swarm_id=SWARM).load_newest(AN_UID)
    assert checkpoint is not None
    assert checkpoint.update_count == 3
    expert = Expert(AN_UID, manifest)
    expert.import_state(checkpoint.state, checkpoint.update_count)
    assert_same(expert.export_state(), checkpoint.state)
    assert step(expert).update_count == 4
