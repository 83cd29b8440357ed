"""Large pages of memory for a process that remembers gigabytes.

What thousands of nodes remember is far larger than the processor's tables of small pages. On Linux, a process can ask
for large ones. `glibc.malloc.hugetlb` would only do it for `malloc`, which is slower than Python's own allocator and
takes more memory.
"""

import ctypes
import sys
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_LARGE_PAGE = 2 << 20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25


def use_large_pages() -> None:
    """Moves the memory that the process has now to large pages. Does nothing on other systems; on Linux before 6.1, the
    kernel does it in its own time, if at all.
    """
    if sys.platform != "linux":
        return
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for mapping in _MAPS.read_text().splitlines():
        addresses, rights, _, _, inode, *name = mapping.split()
        first, end = (int(address, 16) for address in addresses.split("-"))
        is_data = rights == "rw-p" and inode == "0" and name in ([], ["[heap]"])
        if is_data and end - first >= _LARGE_PAGE:
            advise(first, end - first, _MADV_HUGEPAGE)
            advise(first, end - first, _MADV_COLLAPSE)
