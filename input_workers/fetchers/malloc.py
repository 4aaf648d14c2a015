"""glibc's malloc, told to keep the memory that is freed instead of giving it back to the system."""

from __future__ import annotations

import ctypes

from input_workers.errors import ConfigError

__all__ = ["keep_freed_memory"]

# Parameters of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4

# What has to be set, in this order:
SETTINGS = (
    # Large arrays come from the heap, not from mappings of their own.
    (M_MMAP_MAX, 0),
    # The main thread's heap never shrinks; -1 is the largest size.
    (M_TRIM_THRESHOLD, -1),
    # Other threads have heaps of up to 64 MB, which are unmapped when they are empty, whatever the trim threshold is, unless
    # as much is to be kept in reserve. The reserve of a heap costs address space and no memory until it is used.
    (M_TOP_PAD, 64 << 20),
)


def keep_freed_memory() -> None:
    """Have malloc keep freed memory in this process. May be called again.

    By default glibc gives a large array's pages back to the system as soon as the array is freed, and the next array of
    that size is filled page fault by page fault. See the measurements in docs/benchmarks.md.

    It concerns the whole process: every thread and every library that uses malloc. It cannot be undone safely, because glibc
    does not tell what the settings were before. The price is that memory is not given back to the system: the process stays
    as large as it ever was, and because free memory is fragmented it may become somewhat larger. Arrays of more than 64 MB
    that are made in other threads than the main one are not kept: they do not fit into such a thread's heap.

    Raises:
        ConfigError: the C library is not glibc, or has refused.
    """
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  other C libraries may have a mallopt that does nothing
        mallopt = library.mallopt
    except (AttributeError, OSError, TypeError) as error:
        raise ConfigError(
            "Threads: keep_freed_memory needs the mallopt of glibc, which this system does not have; leave it out"
        ) from error
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    for parameter, value in SETTINGS:
        if not mallopt(parameter, value):
            raise ConfigError(f"Threads: keep_freed_memory was refused by mallopt({parameter}, {value}); leave it out")
