"""The memory of the C library: pages that are freed and taken again in every step."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_BLOCK = 1 << 30


def keep_freed_pages() -> None:
    """Have glibc keep large blocks that are freed, for the next of their size.

    It gives back each to the kernel otherwise, which clears every page anew: for layers that are gathered one after the
    other, that takes longer than to copy them.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
