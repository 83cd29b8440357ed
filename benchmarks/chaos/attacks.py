"""What hostile peers of a chaos run do. The program is such a peer: a real node or trainer with a small patch.

    python attacks.py ATTACK SEED FILE COMMAND...

This runs the `talkoot` command. The peer joins and works like any other, and attacks as soon as the file exists. From
then on it claims `CLAIMED` more updates than it took. If names of `RULES` are given in place of an attack, the peer is
honest, but does without these rules while the file exists. This file is run as a script, so it imports nothing from
its folder.
"""

import asyncio
import hashlib
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from unittest.mock import patch

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from dht.experts import ExpertRegistry
    from expert_server.serving.answers import AnswerAssembler
    from expert_server.state.servicer import StateServicer
    from expert_server.state.transfer import Block, Snapshot, SnapshotTaker, StateClient
    from peer.codec import Floats
    from trainer_client.averaging.dense_part import DenseForm, DensePart
    from trainer_client.averaging.exchange import DenseExchange
    from trainer_client.dispatch.batches import CallReply, NodeCall
    from trainer_client.dispatch.grpc_caller import GrpcCaller

Role: TypeAlias = Literal["node", "trainer"]

LIES = ("random", "sign-flipped", "scaled", "drifting", "1e30", "nan")
"""The ways in which a liar alters the tensors that it gives to others."""
CLAIMED = 10_000
"""Updates that a liar claims beyond those it took."""
_SCALE = 1.5
_DRIFT = 0.02
"""How much a tensor drifts each time that it is given, as a share of its norm. Others see it move slowly, always in the
same direction.
"""
_WRONG: Mapping[str, tuple[float, float]] = {"answers-1%": (0.01, 0.01), "answers-30%": (1.0, 0.3)}
"""For each attack: the share of the rows that are altered, and the size of the change as a share of a row's norm."""
_TINY_CALLS = 8
"""How many backward calls of one row a hostile trainer sends with each of its own backward calls."""
_TINY_SCALE = np.float32(100.0)
"""The factor for the gradients of the tiny calls: for an optimizer like Adam their size makes no difference."""
_REMEMBERED = 64

ATTACKS: Mapping[str, Role] = {
    "gradients-flipped": "trainer",
    **{f"replicas-{lie}": "node" for lie in LIES},
    **{f"dense-{lie}": "trainer" for lie in LIES},
    **dict.fromkeys(_WRONG, "node"),
}
"""Whether a node or a trainer does each kind of attack."""
RULES = ("checks", "averages", "steps")
"""The rules that keep liars from doing harm: spot checks, clipped averages, and limits on each caller's share of the
steps and on the size of its gradients. `overhead.py` measures what they cost where nobody lies.
"""
SPENT = "spent"
"""How the name of a file begins in which one process notes the processor seconds that each of `RULES` has cost."""


@dataclass(frozen=True)
class Start:
    """When an attack begins and ends."""

    file: Path

    @property
    def is_on(self) -> bool:
        """Whether the attack has begun, and has not ended."""
        return self.file.exists() and not self._end.exists()

    @property
    def _end(self) -> Path:
        return self.file.with_suffix(".end")

    def end(self) -> None:
        self._end.touch()

    def note_deed(self) -> None:
        """Counts a lie: the file has a byte for each one that was told."""
        with self.file.open("ab") as file:
            file.write(b".")


def altered(lie: str, tensor: "Tensor", name: str, seed: int, times: int) -> "Tensor":
    """The tensor that a liar gives in place of this one, with the same shape and dtype. `times`: how often it has given
    the tensor so far, this time included.
    """
    import torch

    if lie == "sign-flipped":
        return -tensor
    if lie == "scaled":
        return tensor * _SCALE
    if lie in ("1e30", "nan"):
        return torch.full_like(tensor, float(lie))
    drawn = f"{seed} {name} {times if lie == 'random' else ''}"
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(drawn.encode()).digest()[:7]))
    noise = torch.randn(tensor.shape, generator=generator)
    noise *= tensor.float().norm() / noise.norm().clamp(min=1e-12)
    result = noise if lie == "random" else tensor + _DRIFT * times * noise
    return result.to(tensor.dtype)


def altered_rows(tensor: "Floats", share: float, size: float, rng: np.random.Generator) -> "Floats":
    """A copy of [R, W] in which a `share` of the rows is moved in random directions, by `size` of their norm."""
    noise = rng.standard_normal(tensor.shape).astype(np.float32)
    noise *= (
        size * np.linalg.norm(tensor, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
    )
    chosen = rng.random((len(tensor), 1)) < share
    return np.where(chosen, tensor + noise, tensor).astype(np.float32)


def tiny_calls(call: "NodeCall", count: int, rng: np.random.Generator) -> "Iterator[NodeCall]":
    """Makes backward calls of one random row each, with the sign of the row's gradient flipped. `call`: the full call
    that the rows are taken from.
    """
    assert call.gradients is not None
    assert call.counts is not None
    rows = np.flatnonzero(call.counts.any(axis=1))
    for row in rng.choice(rows, min(count, len(rows)), replace=False):
        slots = np.zeros_like(call.counts)
        slots[row] = call.counts[row]
        batch, places = call.batch.only(slots)
        yield replace(
            call,
            batch=batch,
            inputs=call.inputs[places],
            weights=np.where(batch.asked, call.weights[places], np.float32(0)),
            gradients=-_TINY_SCALE * call.gradients[places],
            counts=slots[places],
        )


def lie_in_states(lie: str, seed: int, start: Start) -> None:
    """Alters every state that others fetch from this node. The node's own state stays good, and so do its answers."""
    from dht.announcements import ReplicaAnnouncement
    from dht.experts import ExpertRegistry
    from expert_server.experts.format import BLOCK
    from expert_server.state import transfer
    from expert_server.state.servicer import StateServicer
    from peer.bounded import BoundedDict

    encode, wanted = transfer._encode, StateServicer._wanted
    find, ask = transfer.SnapshotTaker.find, transfer.StateClient.ask
    announce = ExpertRegistry.announce
    lies = BoundedDict[bytes, tuple[int, bytes, bytes]](_REMEMBERED)
    """For the checksum of each true state: the update count, the data and the checksum of the lie told in its place."""
    truths = BoundedDict[bytes, bytes](_REMEMBERED)
    """For the checksum of each lie, the checksum of the true state."""
    times = Counter[str]()

    def encode_both(checkpoint: Any, swarm_id: str, uid: Any) -> tuple[bytes, bytes]:
        data, sha256 = encode(checkpoint, swarm_id, uid)
        # a state without moments can claim no updates
        if start.is_on and any(not name.startswith(BLOCK) for name in checkpoint.state):
            times[str(uid)] += 1
            state = {
                name: altered(lie, tensor, f"{uid} {name}", seed, times[str(uid)])
                if name.startswith(BLOCK) or name.endswith(".exp_avg")
                else tensor
                for name, tensor in checkpoint.state.items()
            }
            claimed = checkpoint.update_count + CLAIMED
            false, false_sha256 = encode(
                replace(checkpoint, state=state, update_count=claimed), swarm_id, uid
            )
            lies[sha256], truths[false_sha256] = (claimed, false, false_sha256), sha256
        return data, sha256

    async def give_lie(self: "StateServicer", request: Any, uid: Any, caller: Any) -> "Snapshot | Block":
        given = await wanted(self, request, uid, caller)
        if isinstance(given, transfer.Block) or (told := lies.get(given.sha256)) is None:
            return given
        start.note_deed()
        claimed, data, sha256 = told
        return replace(given, update_count=claimed, data=data, sha256=sha256)

    def find_truth(self: "SnapshotTaker", uid: Any, sha256: bytes) -> "Snapshot | None":
        return find(self, uid, truths.get(sha256, sha256))

    def ask_for_lie(
        self: "StateClient", node: Any, reason: Any, uids: Any, sha256: bytes = b"", base_sha256: bytes = b""
    ) -> Any:
        told = lies.get(sha256)
        return ask(self, node, reason, uids, sha256 if told is None else told[2], base_sha256)

    def announce_more(
        self: "ExpertRegistry",
        replicas: Collection[ReplicaAnnouncement],
        lifetime_s: float,
        queued_rows: int = 0,
    ) -> Any:
        if start.is_on:
            replicas = [replace(r, update_count=r.update_count + CLAIMED) for r in replicas]
        return announce(self, replicas, lifetime_s, queued_rows)

    patch.object(transfer, "_encode", encode_both).start()
    patch.object(StateServicer, "_wanted", give_lie).start()
    patch.object(transfer.SnapshotTaker, "find", find_truth).start()
    patch.object(transfer.StateClient, "ask", ask_for_lie).start()
    patch.object(ExpertRegistry, "announce", announce_more).start()


def lie_in_dense_parts(lie: str, seed: int, start: Start) -> None:
    """Alters every dense part that this trainer gives to others. Its own stays good."""
    from trainer_client.averaging.dense_part import DenseForm
    from trainer_client.averaging.exchange import DenseExchange

    to_bytes, pack = DenseForm.to_bytes, DenseExchange._pack
    times = Counter[str]()

    def encode_lie(self: "DenseForm", tensors: "Mapping[str, Tensor]", age: int) -> bytes:
        if start.is_on:
            start.note_deed()
            times.update(tensors)
            tensors = {
                name: altered(lie, tensor, name, seed, times[name]) for name, tensor in tensors.items()
            }
        return to_bytes(self, tensors, age)

    def pack_older(self: "DenseExchange") -> "tuple[DensePart, bytes, bytes]":
        if start.is_on and self.part._age < CLAIMED:
            self.part._age += CLAIMED
        return pack(self)

    patch.object(DenseForm, "to_bytes", encode_lie).start()
    patch.object(DenseExchange, "_pack", pack_older).start()


def answer_wrong(attack: str, seed: int, start: Start) -> None:
    """Alters some rows of what this node's experts compute, before anything else uses them."""
    import torch

    from expert_server.serving.answers import AnswerAssembler

    take, rng, (share, size) = AnswerAssembler.take, np.random.default_rng(seed), _WRONG[attack]

    def take_wrong(self: "AnswerAssembler", outcomes: "Sequence[tuple[int, Tensor | None]]") -> Any:
        if start.is_on:
            start.note_deed()
            outcomes = [
                (
                    expert,
                    None
                    if tensor is None
                    else torch.from_numpy(altered_rows(tensor.numpy(), share, size, rng)),
                )
                for expert, tensor in outcomes
            ]
        return take(self, outcomes)

    patch.object(AnswerAssembler, "take", take_wrong).start()


def flip_gradients(seed: int, start: Start) -> None:
    """Sends experts gradients of the wrong sign, and many tiny batches of them: each may become an optimizer step."""
    from peer.errors import ExpertError
    from trainer_client.dispatch.batches import AnsweredRows
    from trainer_client.dispatch.grpc_caller import GrpcCaller

    true_call, rng = GrpcCaller.call, np.random.default_rng(seed)

    async def send(caller: "GrpcCaller", call: "NodeCall") -> None:
        with suppress(ExpertError):
            async with aclosing(true_call(caller, call)) as replies:
                async for _ in replies:
                    pass

    async def call_flipped(self: "GrpcCaller", call: "NodeCall") -> "AsyncGenerator[CallReply, None]":
        tiny: list[asyncio.Task[None]] = []
        if start.is_on and call.gradients is not None:
            start.note_deed()
            tiny = [
                asyncio.create_task(send(self, each)) for each in tiny_calls(call.in_full(), _TINY_CALLS, rng)
            ]
            call = replace(call, gradients=-call.gradients)
        try:
            async with aclosing(true_call(self, call)) as replies:
                async for reply in replies:
                    if tiny and isinstance(reply, AnsweredRows) and reply.products is not None:
                        # its own dispatcher would take them for lies
                        reply = replace(reply, tensor=-reply.tensor, products=-reply.products)
                    yield reply
            await asyncio.gather(*tiny)
        finally:
            for task in tiny:
                task.cancel()

    patch.object(GrpcCaller, "call", call_flipped).start()


def leave_out(rules: Collection[str], start: Start) -> None:
    """Makes an honest peer do without these rules for as long as the file exists."""
    from expert_server.experts.callers import Callers
    from expert_server.experts.expert import Expert
    from expert_server.experts.format import BLOCK, Checkpoint
    from expert_server.hosting import averaging
    from expert_server.serving import compute
    from expert_server.state import transfer
    from peer.clipping import Clipped, OwnMoves
    from talkoot.train.recompute import BlockLoader
    from trainer_client.averaging import dense_part
    from trainer_client.dispatch.spot_checks import Sample, SpotChecks

    spent_s = np.memmap(start.file.with_name(f"{SPENT}-{os.getpid()}"), np.float64, "w+", shape=len(RULES))
    counting = Lock()

    def replaced(
        rule: str,
        owner: Any,
        name: str,
        plain: Callable[..., Any] | None = None,
        counts: Callable[..., bool] = lambda *_: True,
    ) -> None:
        """Replaces a rule's function by what peers would do without the rule, `plain`. None: nothing is replaced, and
        only the time that the function takes is counted.

        `counts`: whether a call with these arguments is part of the rule.
        """
        true, index = getattr(owner, name), RULES.index(rule)

        def either(*arguments: Any, **named: Any) -> Any:
            chosen, began = plain if plain is not None and start.is_on else true, time.thread_time()
            try:
                return chosen(*arguments, **named)
            finally:
                took_s = time.thread_time() - began
                if counts(*arguments):
                    with counting:
                        spent_s[index] += took_s

        patch.object(owner, name, either).start()

    def mean(current: Any, base: Any, theirs: Any, radii: Any, share: float) -> Clipped:
        return Clipped(
            {
                n: (t.double() + share * (theirs[n].double() - base[n].double())).to(t.dtype)
                for n, t in current.items()
            },
            1.0,
        )

    def has_only_parameters(checkpoint: Checkpoint, *_: Any) -> bool:
        return all(name.startswith(BLOCK) for name in checkpoint.state)

    if "checks" in rules:
        replaced("checks", SpotChecks, "note", lambda *_: None)
        for owner, name in ((Sample, "wrong_rows"), (BlockLoader, "load"), (Expert, "export_block")):
            replaced("checks", owner, name)
        replaced("checks", transfer, "_encode", counts=has_only_parameters)
    if "averages" in rules:
        for name, value in (("present", {}), ("radii", {}), ("reach", float("inf")), ("start", None)):
            replaced("averages", OwnMoves, name, lambda *_, value=value: value)
        for module in (averaging, dense_part):
            replaced("averages", module, "clip", mean)
            replaced("averages", module, "distance", lambda *_: 0.0)
            replaced("averages", module, "at_base", lambda *_: {})
    if "steps" in rules:
        replaced("steps", Callers, "note_step", lambda *_: None)
        replaced("steps", Callers, "is_held_back", lambda *_: False)
        replaced("steps", compute, "_clipped", lambda _, work: (work, 1.0))


def patches_of(attack: str, seed: int, start: Start) -> Callable[[], None]:
    """Returns the function that patches a process so that it attacks, or leaves out rules if `attack` names some of
    `RULES`, separated by commas. Raises KeyError if there is no such attack.
    """
    if set(rules := attack.split(",")) <= set(RULES):
        return lambda: leave_out(rules, start)
    if ATTACKS[attack] == "node" and attack not in _WRONG:
        return lambda: lie_in_states(attack.removeprefix("replicas-"), seed, start)
    if attack in _WRONG:
        return lambda: answer_wrong(attack, seed, start)
    if attack.startswith("dense-"):
        return lambda: lie_in_dense_parts(attack.removeprefix("dense-"), seed, start)
    return lambda: flip_gradients(seed, start)


def main() -> None:
    _, attack, seed, file, *arguments = sys.argv
    from talkoot import cli, options
    from talkoot.terminal import set_up_logging

    apply = patches_of(attack, int(seed), Start(Path(file)))

    def set_up_and_patch(*values: Any) -> None:
        set_up_logging(*values)  # first: it says how loud gRPC is, which gRPC reads when it is imported
        apply()

    patch.object(options, "set_up_logging", set_up_and_patch).start()
    sys.argv = ["talkoot", *arguments]
    cli.main()


if __name__ == "__main__":
    main()
