"""All contenders of the text generation benchmark generate the same text."""

from pathlib import Path

from benchmarks.decoding import Contender, Whole, manifest
from dht.manifest import Manifest
from talkoot.train.local import LocalSwarm
from trainer_client.model import LanguageModel
from trainer_client.settings import TrainerSettings


def test_both_ways_of_computing_tokens_give_the_same(tmp_path: Path) -> None:
    (tmp_path / "swarm.toml").write_text(manifest("transformer"))
    parsed = Manifest.from_toml(tmp_path / "swarm.toml")
    model = LanguageModel(parsed, LocalSwarm(parsed, TrainerSettings()).mixture).requires_grad_(False)
    contender, whole = Contender(model, 1), Whole(model)
    whole.step()
    for _ in range(3):
        contender.step()
        whole.step()
    assert contender.texts == [whole.text]
