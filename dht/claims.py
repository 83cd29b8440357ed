"""How long experts have been claimed: who claims one for ever, and never serves it, keeps nobody from serving it."""

from __future__ import annotations  # hivemind is slow to import, and settings need the number alone

from typing import TYPE_CHECKING

from dht.uid import UID

if TYPE_CHECKING:
    from hivemind.p2p import PeerID

MAX_CLAIM_S = 1800.0
"""A claim that lasts longer is ignored, unless told otherwise. Building many large experts from their checkpoints
takes minutes.
"""
_MAX_CLAIMS = 65536
"""Claims remembered; beyond that those are forgotten that were seen longest ago."""


class ClaimAges:
    """Since when this peer has seen each claim. The claims themselves say it too, and may lie."""

    def __init__(self, longest_s: float = MAX_CLAIM_S) -> None:
        self.longest_s = longest_s
        self._seen: dict[tuple[UID, PeerID], tuple[float, float]] = {}
        """First and last time that a claim was seen, the one seen last at the end."""

    def is_stale(self, uid: UID, peer_id: PeerID, claimed_at: float, now: float) -> bool:
        """Notes the claim. A pause in it shorter than the longest claim does not make it a new one."""
        first, last = self._seen.pop((uid, peer_id), (now, now))
        if now > last + self.longest_s:
            first = now
        self._seen[uid, peer_id] = first, now
        while len(self._seen) > _MAX_CLAIMS:
            del self._seen[next(iter(self._seen))]
        since = claimed_at if 0 < claimed_at < first else first  # 0: it does not say; also right for NaN
        return now > since + self.longest_s

    def forget(self, uid: UID, peer_id: PeerID) -> None:
        """The claim was made good: the peer serves the expert."""
        self._seen.pop((uid, peer_id), None)
