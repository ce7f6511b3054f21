"""The C library's allocator, so that a step finds the memory that the step before has freed."""

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's numbers for them, malloc.h
_PIECE, _FREE = 2**25, 2**31 - 1  # bytes, the largest that glibc takes


def keep_freed_memory() -> bool:
    """Let glibc keep freed tensors of up to 32 MB for the next allocation, in this process from now on.

    By itself it often hands them back to the system, which clears and maps them anew in every step. What it keeps stays
    the process's own until it ends. Nothing is done where the environment says how to allocate (``MALLOC_..._``,
    ``GLIBC_TUNABLES``), or without glibc; of another allocator that is preloaded glibc knows nothing.

    Returns:
        Whether glibc was told so.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(what, size) == 1 for what, size in ((_MMAP_THRESHOLD, _PIECE), (_TRIM_THRESHOLD, _FREE)))
