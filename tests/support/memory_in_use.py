"""How much memory this process uses, to see whether it grows."""

import gc

import psutil

from peer.platform.processes import return_freed_memory


def memory_in_use() -> int:
    """Resident bytes, without what is free but was not returned to the system. That varies by dozens of megabytes."""
    gc.collect()
    return_freed_memory()
    return int(psutil.Process().memory_info().rss)
