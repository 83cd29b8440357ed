"""Questions to a swarm of real node processes, one of which is killed half-way."""

import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from memory_samples import SampleMemory
from preloaded import Preloaded
from published_memories import publish_library, until_hosted
from real_swarm import eventually
from training_swarm import HOST, MANIFEST

from dht.announcements import ReplicaState
from dht.invites import Invite
from dht.manifest import Manifest
from dht.memory import MemoryID
from dht.swarm import Swarm, found_swarm
from peer.host import NetworkConfig
from peer.identity import Identity, PeerID
from peer.loop import LoopThread
from talkoot.train.ask import Answered, QuestionAnswerer
from trainer_client.client import SwarmClient
from trainer_client.data.tokenizer import ByteTokenizer
from trainer_client.retrieval.answering import make_rag_model
from trainer_client.settings import TrainerSettings

MEMORY = SampleMemory.with_words()
QUESTIONS = [f"what is word{number}?" for number in range(4)]
NODE = (
    *("--host", HOST, "--device", "cpu", "--threads", "1", "--p2pd", "off", "--drain-timeout", "0"),
    *("--experts", "8", "--memory-disk", "100MB", "--announce-every-s", "5"),
)


@dataclass(frozen=True)
class Founded:
    """A founder that hosts nothing, and two nodes that each host all experts and the whole memory."""

    folder: Path
    swarm: Swarm
    nodes: list["subprocess.Popen[bytes]"]
    logs: list[Path]

    def kill(self, node: PeerID) -> None:
        for number, process in enumerate(self.nodes):
            if node == Identity.load_or_create(self.folder / f"node-{number}" / "identity.key").peer_id:
                end(process)
                return
        raise AssertionError("no such node")


def end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait(60)


@contextmanager
def founded(loop: LoopThread, folder: Path, manifest: Manifest) -> Iterator[Founded]:
    identity = Identity.load_or_create(folder / "founder.key")
    memory = MemoryID.of(MEMORY.manifest.name, identity.peer_id)
    with ExitStack() as stack:
        swarm = loop.run(found_swarm(identity, manifest, NetworkConfig(HOST)), 120)
        stack.callback(lambda: loop.run(swarm.stop(), 120))
        loop.run(publish_library(swarm, MEMORY), 120)
        running = Founded(folder, swarm, [], [])
        invite = str(loop.run(swarm.invite(), 120))
        for number in range(2):
            state = folder / f"node-{number}"
            MEMORY.write(state / "memory" / str(memory))
            command = ("-m", "talkoot", "node", "--join", invite, "--state", str(state), *NODE)
            running.logs.append(folder / f"node-{number}.log")
            with running.logs[-1].open("wb") as log:
                running.nodes.append(Preloaded(*command, stdout=log, stderr=log))
            stack.callback(end, running.nodes[-1])

        async def all_serve() -> bool:
            assert all(node.poll() is None for node in running.nodes), [
                log.read_text() for log in running.logs
            ]
            found = await swarm.experts.replicas(manifest.uids())
            serving = Counter(
                replica.peer_id
                for hosts in found.values()
                for replica in hosts
                if replica.state is ReplicaState.SERVING
            )
            return list(serving.values()) == [len(manifest.uids())] * 2

        loop.run(eventually(all_serve), 300)
        loop.run(until_hosted(swarm, memory, 2, MEMORY), 300)
        yield running


def check_same(after: Answered, before: Answered) -> None:
    assert not after.result.missing
    assert [each.text for each in after.answers] == [each.text for each in before.answers]
    assert [each.probability for each in after.answers] == pytest.approx(
        [each.probability for each in before.answers], rel=1e-2
    )
    for ours, theirs in zip(after.answers, before.answers, strict=True):
        passages = [[source.hit.passage for source in each.sources] for each in (ours, theirs)]
        assert passages[0] == passages[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "causal"),
    [("rag-sequence", ()), ("rag-token", (False, True))],
    ids=["decoder", "encoder-decoder"],
)
def test_the_answers_are_the_same_with_a_node_killed_half_way(
    loop: LoopThread, tmp_path: Path, causal: tuple[bool, ...], objective: str
) -> None:
    """That node hosted half of the replicas of experts and of the memory's shards."""
    model = MANIFEST.model.model_copy(update={"context": 32 if causal else 64, "causal": causal})
    settings = TrainerSettings.load(
        objective=objective,
        memory=MEMORY.manifest.name,
        memory_length=16,
        memory_passages=3,
        call_deadline_s=60,
    )
    with founded(loop, tmp_path, MANIFEST.model_copy(update={"model": model})) as running:
        invite = Invite.parse(str(loop.run(running.swarm.invite(), 120)))
        with SwarmClient(invite, settings, tmp_path / "client", reads_only=True) as client:
            client.wait_for_experts(300, lambda text: None)
            memory = client.memory(MEMORY.manifest.name)
            rag = make_rag_model(
                client.manifest, client.mixture, ByteTokenizer(), memory.dimensions, client.settings
            )
            with torch.no_grad():
                rag.generator.head.weight *= 8  # so that some tokens are far likelier than others
            answerer = QuestionAnswerer(rag, memory, settings.marginal, client.has_experts)
            before = [answerer.answer(question) for question in QUESTIONS]
            half = len(QUESTIONS) // 2
            after = [answerer.answer(question) for question in QUESTIONS[:half]]
            running.kill(after[-1].result.hits[0].served_by)
            after += [answerer.answer(question) for question in QUESTIONS[half:]]
            for now, then in zip(after, before, strict=True):
                check_same(now, then)
