"""The bounds of the store, apart from it: settings, which need them, are light to import."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StoreBounds:
    """What others may leave at this peer, and ask of it. Sizes in bytes."""

    total_bytes: int = 64 * 2**20
    key_bytes: int = 96 * 2**10
    """All entries of one key; so many of them must fit into an answer."""
    find_keys: int = 256
    """Keys of one question."""
    message_bytes: int = 2**20
    """One message with entries to store."""
    answer_bytes: int = 3 * 2**20
    """The values in one answer; the keys that come after have none. p2pd takes 4 MiB."""
    handed_bytes_per_s: float = 256 * 2**10
    """What newcomers are handed, counting all that is stored for each: that is looked through for it."""
