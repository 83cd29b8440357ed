"""Storing and reading without the registry, and a peer that accepts anything."""

import contextlib
from typing import Any

from peer.errors import WireError
from peer.host import Host
from peer.kademlia.lookups import Item, Lookups
from peer.kademlia.routing import key_id_of
from peer.kademlia.validation import Entries, Record


class Gullible:
    def validate(self, record: Record) -> bool:
        return True


async def store_raw(host: Host, key: str, subkey: Any, value: Any, expires_at: float) -> bool:
    """Stores an entry at other peers, and at the host if it belongs there. Returns whether any peer accepted it."""
    with contextlib.suppress(WireError):
        return bool(await Lookups(host.dht).store([Item(key, subkey, value, expires_at)]))
    return False


async def read_raw(host: Host, key: str) -> Entries:
    """The entries that any holder has."""
    key_id = key_id_of(key)
    return (await Lookups(host.dht).find([key_id]))[key_id].entries
