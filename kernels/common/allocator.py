"""glibc's malloc, told to keep what is freed, or to give it back."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1
_GLIBC_DEFAULT = 128 * 1024


def keep_freed_memory() -> None:
    """Reuse the memory of freed tensors instead of giving it back to the system at once.

    glibc maps a large tensor anew at each allocation, and the kernel then clears every page at its first touch: on
    virtual machines that can cost several times what is computed in it. Does nothing with another C library.
    """
    _mallopt(mmap_threshold=_LARGEST, trim_threshold=_LARGEST)


def return_freed_memory() -> None:
    """Give the memory of freed tensors back to the system at once.

    At first glibc maps a large tensor by itself, but once one of up to 32 MB was freed it takes all of that size from
    its heap. There, tensors of many sizes that come and go leave holes, and a process grows from step to step. Does
    nothing with another C library.
    """
    _mallopt(mmap_threshold=_GLIBC_DEFAULT, trim_threshold=_GLIBC_DEFAULT)


def _mallopt(mmap_threshold: int, trim_threshold: int) -> None:
    """Set glibc's thresholds, in bytes; a value that is set is no longer adapted (mallopt(3))."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, mmap_threshold)
        libc.mallopt(_TRIM_THRESHOLD, trim_threshold)
