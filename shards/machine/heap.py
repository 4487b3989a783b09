"""The memory of the C library: pages that are freed and allocated again in every step."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_BLOCK = 1 << 30


def keep_freed_pages() -> None:
    """Make glibc keep large freed blocks for the next allocation of their size.

    By default it returns each to the kernel, which clears every page again: for layers that are gathered in turn, that
    takes longer than copying them.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
