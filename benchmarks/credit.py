"""What signed credit costs a node, a trainer and a dashboard, and what colluders can inflate.

    python -m benchmarks.credit

Takes some seconds on one core.
"""

import random
import time
import tracemalloc

from benchmarks.scratch import scratch_folder
from dht.receipts import Work, check_receipt, sign_receipt
from expert_server.credit import ReceiptBook
from peer.identity import Identity, PeerID
from peer.wire import credit_pb2
from talkoot.credit import CreditLedger, _Counted
from trainer_client.credit import EVERY_S

SWARM = "sauna-QmFounder"
TRAINERS = 8
NODES = 10_000
TOKENS = 100
ROUNDS = 500


def node_of(number: int) -> PeerID:
    return PeerID(b"\x12\x20" + number.to_bytes(32, "big"))


def main() -> None:
    with scratch_folder() as folder:
        trainer = Identity.load_or_create(folder / "trainer.key")
    cost_of_receipts(trainer)
    cost_of_counting(trainer)
    inflation()


def cost_of_receipts(trainer: Identity) -> None:
    """Prints what a receipt costs the trainer that signs it and the node that takes it, without the call that carries
    it.
    """
    book = ReceiptBook(SWARM, node_of(0))
    began = time.process_time()
    receipts = [sign_receipt(trainer, SWARM, node_of(0), Work(n, n), 2 * n) for n in range(1, ROUNDS + 1)]
    sign_s = (time.process_time() - began) / ROUNDS
    began = time.process_time()
    for signed in receipts:
        data = signed.SerializeToString()
        book.note_served(trainer.peer_id, Work(pairs=1))
        book.take(check_receipt(credit_pb2.SignedReceipt.FromString(data), SWARM, node_of(0)))
    take_s = (time.process_time() - began) / ROUNDS
    size = len(receipts[-1].SerializeToString())
    print(f"a receipt: {size} bytes; {1e3 * sign_s:.2f} ms to sign, {1e3 * take_s:.2f} ms to take")
    share, rate = TRAINERS * take_s / EVERY_S, TRAINERS * size / EVERY_S
    print(f"a node under {TRAINERS} trainers: {share:.4%} of one core, {rate:.0f} bytes/s, without calls")


def cost_of_counting(trainer: Identity) -> None:
    """Prints what counting the receipts of 10,000 nodes costs, with 8 trainers each. One key signs all of them:
    checking costs the same for any key.
    """
    signed = [sign_receipt(trainer, SWARM, node_of(0), Work(n + 1), n + 1) for n in range(TRAINERS)]
    began = time.process_time()
    for each in signed:
        check_receipt(each, SWARM, node_of(0))
    check_s = (time.process_time() - began) / TRAINERS
    tracemalloc.start()
    ledger = filled(NODES)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    began = time.process_time()
    ledger.count()
    count_s = time.process_time() - began
    print(f"a dashboard: {1e3 * TRAINERS * check_s:.1f} ms to verify the receipts of a node")
    print(f"{NODES:,} nodes, {len(ledger):,} receipts: {size / 2**20:.0f} MiB, counted in {count_s:.2f} s")


def filled(nodes: int, colluding: int = 0, claimed: int = 10**9) -> CreditLedger:
    """A ledger of `nodes` nodes, each with honest trainers that each have a token. The trainers of the last `colluding`
    tokens all sign for the last node.
    """
    rng = random.Random(0)
    ledger = CreditLedger(SWARM, lambda receipt: 0)
    for node in range(nodes):
        kept = ledger._nodes.setdefault(node_of(node), {})
        for _ in range(TRAINERS):
            token = rng.randrange(TOKENS - colluding)
            keep(ledger, kept, token, Work(rng.randrange(1, 10**6)))
    for token in range(TOKENS - colluding, TOKENS):
        keep(ledger, ledger._nodes[node_of(nodes - 1)], token, Work(claimed))
    return ledger


def keep(ledger: CreditLedger, kept: dict[PeerID, _Counted], token: int, work: Work) -> None:
    """Adds a receipt to the ledger as if it had been verified."""
    ledger._keep(kept, node_of(10**6 + token), _Counted(work, work.pairs, token, token.to_bytes(16, "big")))


def inflation() -> None:
    """Prints what one node gains when a tenth of the tokens sign for it."""
    for claimed in (10**6, 10**9, 10**15):
        counted = filled(1000, TOKENS // 10, claimed).count()
        credit = counted[node_of(999)]
        pairs = sum(each.work.pairs for each in counted.values())
        print(
            f"{TOKENS // 10} of {TOKENS} tokens sign {claimed:.0e} pairs each for one node: it has "
            f"{credit.work.pairs / pairs:.1%} of all pairs, and {credit.share:.1%} of all votes"
        )


if __name__ == "__main__":
    main()
