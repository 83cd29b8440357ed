"""The example package of docs/expert-kinds.md, installed as printed there."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.experts.expert import Expert, expert_bytes
from expert_server.experts.graphs import Rows

GUIDE = Path(__file__).parents[2] / "docs" / "expert-kinds.md"
LENGTHS, POSITIONS = torch.tensor([3, 2]), torch.tensor([0, 2, 3, 1, 5])
AN_UID = UID(0, (1, 0))


def files_of_the_guide() -> dict[str, str]:
    """Each code block, by the file name at the beginning of the paragraph before it."""
    found = re.findall(
        r"`(\S+)` (?:gives|contains)[^\n]*:\n\n```\w+\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL
    )
    return dict(found)


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """The manifest of a swarm with the example's kind. The metadata that pip would write is on the path."""
    files = files_of_the_guide()
    project = tomllib.loads(files.pop("pyproject.toml"))["project"]
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    metadata = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    ((group, kinds),) = project["entry-points"].items()
    ((kind, target),) = kinds.items()
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{kind} = {target}\n")
    monkeypatch.syspath_prepend(tmp_path)
    return Manifest.model_validate(
        {
            "name": "sauna",
            "model": {"hidden": 16, "heads": 2},
            "experts": {"kind": kind},
            "optimizer": {"learning_rate": 0.03},
        }
    )


def random_rows(seed: int) -> Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(seed))


def test_the_guides_package_brings_an_expert_that_learns(manifest: Manifest) -> None:
    expert = Expert(AN_UID, manifest)
    assert type(expert.block).__module__ == "talkoot_bottleneck"
    output = expert.forward(Rows(random_rows(0), LENGTHS, POSITIONS))
    losses = []
    for _ in range(40):
        error = expert.forward(Rows(random_rows(0), LENGTHS, POSITIONS)) - random_rows(1)
        losses.append(error.square().mean().item())
        expert.backward([Rows(random_rows(0), LENGTHS, POSITIONS, 2 * error / error.numel())])
    assert output.shape == (5, 16)
    assert losses[-1] < 0.8 * losses[0]
    assert expert.update_count == 40


def test_the_guides_expert_starts_equal_and_travels(manifest: Manifest) -> None:
    first, second = Expert(AN_UID, manifest), Expert(AN_UID, manifest)
    torch.testing.assert_close(first.export_state(), second.export_state(), atol=0, rtol=0)
    first.backward([Rows(random_rows(0), LENGTHS, POSITIONS, random_rows(1))])
    second.import_state(first.export_state(), first.update_count)
    torch.testing.assert_close(first.export_state(), second.export_state(), atol=0, rtol=0)
    assert expert_bytes(manifest) > sum(tensor.nbytes for tensor in first.export_state().values())


def test_the_guides_expert_keeps_to_the_guides_rules(manifest: Manifest) -> None:
    expert = Expert(AN_UID, manifest)
    together = expert.forward(Rows(random_rows(0), LENGTHS, POSITIONS))
    alone = expert.forward(Rows(random_rows(0)[3:], LENGTHS[1:], POSITIONS[3:]))
    torch.testing.assert_close(together[3:], alone)
