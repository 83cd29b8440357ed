"""What becomes of memory that a node frees, where the C library is glibc. Elsewhere nothing is changed."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MOST_ARENAS = -1, -3, -8
"""Parameters of mallopt, as malloc.h numbers them."""
_KEPT_BYTES = 256 * 2**20
_LARGE_BYTES = 32 * 2**20
"""The most that glibc takes for this parameter. What is larger goes back to the system as soon as it is freed."""


def keep_freed_memory() -> None:
    """Lets the process keep up to 256 MiB that it freed. For the start: threads that run have arenas of their own.

    Each batch frees its gradients and activations, and the next one needs as much again: to return it to the system and
    to have it zeroed anew took a tenth of a node's processor time.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MOST_ARENAS, 1)  # what one thread freed is good for the others
        libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)


def return_freed_memory() -> None:
    """Gives back to the system now what was freed."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
