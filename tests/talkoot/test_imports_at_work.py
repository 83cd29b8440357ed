"""Working nodes and trainers import neither torch's compiler nor scipy nor hivemind's training code."""

import subprocess
import sys

A_NODES_WORK = """
import sys
import torch
import talkoot.node.launch
from dht.manifest import ExpertSpec, Manifest, ModelSpec
from dht.uid import UID
from expert_server.experts.expert import Expert, expert_bytes
from expert_server.experts.graphs import Rows

model = ModelSpec(hidden=16, heads=2, feed_forward=32)
manifest = Manifest(name="test", model=model, experts=ExpertSpec(kind="transformer"))
assert expert_bytes(manifest) > 0
expert = Expert(UID(0, (0, 0)), manifest)
rows, positions = torch.ones(3, 16), torch.arange(3)
_, graph = expert.forward_with_graph(Rows(rows, torch.tensor([3]), positions))
expert.backward([Rows(rows, torch.tensor([3]), positions, 1e3 * rows, graph)])
expert.import_state(expert.export_state(), expert.update_count)
assert expert.update_count == 1
"""


A_TRAINERS_WORK = """
import sys
import threading
import numpy as np
import torch
import talkoot.train.session
from dht.manifest import ExpertSpec, Manifest, ModelSpec
from trainer_client.data.corpus import Dataset
from trainer_client.model import LanguageModel
from trainer_client.settings import TrainerSettings
from trainer_client.training.loop import Training

model = ModelSpec(hidden=16, heads=2, feed_forward=32, context=16)
manifest = Manifest(name="test", model=model, experts=ExpertSpec(kind="transformer"))
settings = TrainerSettings.load(steps=2, batch_size=2)
tokens = np.arange(4096) % 256
training = Training(
    LanguageModel(manifest, lambda layer: torch.nn.Identity()), Dataset(tokens, 16), settings
)
training.run(lambda progress: None, threading.Event())
training.import_state(training.export_state(), 0)
assert training.step == 2
"""


def test_what_peers_do_imports_no_more_than_it_needs() -> None:
    """One process does the work of both, since importing torch takes seconds."""
    command = [sys.executable, "-W", "ignore", "-c", A_NODES_WORK + A_TRAINERS_WORK + "print(*sys.modules)"]
    modules = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout.split()
    assert {"expert_server.node", "trainer_client.client"} <= set(modules)
    assert not {"torch._dynamo", "torch._inductor", "sympy", "scipy"} & set(modules)
    assert not {"hivemind.averaging", "hivemind.moe", "hivemind.optim"} & set(modules)
