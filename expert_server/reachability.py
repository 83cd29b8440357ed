"""Whether others reach this node, by what they tell of dialling it back. Pure: what they said is passed in."""

import ipaddress
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dht.announcements import Reachability
from expert_server.probing import DialledBack


@dataclass(frozen=True)
class DialledPorts:
    """What one other node said of its attempts to connect to this one."""

    service: DialledBack
    """To the expert service."""
    dht: DialledBack


@dataclass(frozen=True)
class Judgement:
    """Whether most of those who tried reached the ports."""

    asked: int
    service: bool
    dht: bool
    reached_at: tuple[str, ...]
    """IP addresses at which anybody reached the expert service, those that most saw first."""


def judge(dials: Sequence[DialledPorts]) -> Judgement:
    """By at least half of those asked, so that of several one that lies changes little."""
    service = sum(dial.service.connected for dial in dials)
    dht = sum(dial.dht.connected for dial in dials)
    seen = Counter(dial.service.address for dial in dials if dial.service.connected)
    return Judgement(
        asked=len(dials),
        service=2 * service >= len(dials) > 0,
        dht=2 * dht >= len(dials) > 0,
        reached_at=tuple(address for address, _ in seen.most_common()),
    )


@dataclass(frozen=True)
class Reach:
    """How others reach this node now."""

    kind: Reachability = Reachability.UNKNOWN
    relays: int = 0
    """Relays by which they do."""
    looking: bool = False
    """It looks for a relay: nobody reaches it until it has one."""
    asked: int = 0
    """Nodes that were asked to dial back."""

    @property
    def in_words(self) -> str:
        """Such as `direct` or `relayed by 3 relays`."""
        if self.looking:
            return "looking for a relay"
        if self.kind is Reachability.UNKNOWN:
            return "not known: no other node to ask yet"
        if self.kind is Reachability.RELAYED and self.relays:
            return f"relayed by {self.relays} relay{'' if self.relays == 1 else 's'}"
        return self.kind.name.lower()


def advice(reach: Reach, host: str, dht_port: int, grpc_port: int) -> str:
    """What would let others connect directly; empty when they do. A port is 0 when each run has another."""
    if reach.kind in {Reachability.UNKNOWN, Reachability.DIRECT}:
        return ""
    if not (dht_port and grpc_port):
        return f"pass --dht-port and --grpc-port, and forward both TCP ports on your router to {host}"
    ports = " and ".join(str(port) for port in sorted({dht_port, grpc_port}))
    if _is_public(host):
        return f"let TCP ports {ports} in through the firewall"
    return f"forward TCP ports {ports} on your router to {host}"


def _is_public(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return False
