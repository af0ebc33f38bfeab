"""glibc's malloc, told to keep what is freed."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Reuse the memory of freed tensors instead of giving it back to the system at once.

    glibc maps a large tensor anew at each allocation, and the kernel then clears every page at its first touch: on
    virtual machines that can cost several times what is computed in it. Does nothing with another C library.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, _LARGEST)
