"""Shared memory of one worker process: a large sparse mapping, from which each chunk gets an extent.

The parent decides which extent a chunk is written to, and gives memory that it does not need back to the system. The worker
allocates the memory of an extent before it writes to it. One mapping costs one descriptor, however many chunks there are.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import mmap
import os
import resource
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from input_workers.leases import Lease, open_shared_memory

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Arena", "Extent", "map_arena"]

# Address space is free, but a process has only 128 TiB of it, and a source may have hundreds of workers.
MAX_ARENA_BYTES = 256 << 30
# Address space of extents of one size is not used for other sizes. If chunks grow, extents of all sizes up to the largest
# take 5.4 times what those of the largest do.
SPACE_PER_MEMORY = 8
# An address space that is limited (`ulimit -v`) is mostly left to the user's own program and to the other workers.
SHARE_OF_LIMIT = 64

# Memory that is not lent to the trainer is kept for this many extents: one that is being filled, one of the call that was
# sent ahead, and one that is being copied. Pages that were written before cost no fault.
MAX_SPARE_EXTENTS = 3

# Extents are made for the largest of this many chunks, so that one huge chunk does not make all extents huge for ever.
RECENT_CHUNKS = 16


# All leases, by their ids: an arena in whose memory the trainer holds chunks must outlive the run that it belongs to, or the
# memory of each would stay until the last of them dies.
_leases: dict[int, Lease] = {}


@dataclass(slots=True, eq=False)
class Extent:
    """A page-aligned part of an arena.

    Attributes:
        offset: where it begins.
        nbytes: its size.
        is_cold: its memory may not be allocated yet.
    """

    offset: int
    nbytes: int
    is_cold: bool = True


class Arena:
    """The parent's side of a worker's shared memory.

    `take` and `lease` belong to the thread that serves the worker. An extent comes back when the last view of its array
    dies, which may happen inside any allocation, in a thread that holds any lock. So `give_back` takes no lock: it makes
    single calls of dicts and deques, which no other thread can interrupt. What it decides by counting may be off by one for
    each thread that gives back at the same moment, which is harmless.

    Attributes:
        descriptor: to be sent to the worker; -1 after `close_descriptor`.
        size: of the mapping, in bytes.
        expected_nbytes: what the next chunk is likely to need; 0 before the first.

    Raises:
        OSError: no descriptor or no address space is left.
    """

    def __init__(self) -> None:
        self._maker = os.getpid()
        self.descriptor, _ = open_shared_memory("arena")
        self._mapping: mmap.mmap | None
        try:
            self.size, self._mapping = _map_largest(self.descriptor)
        except BaseException:
            self.close_descriptor()
            raise
        self.expected_nbytes = 0
        self._recent: collections.deque[int] = collections.deque(maxlen=RECENT_CHUNKS)
        self._end = 0  # address space beyond was never used
        self._unused: dict[int, collections.deque[int]] = {}  # offsets of extents without memory, by their space
        self._free: collections.deque[Extent] = collections.deque()  # with memory, the one used last at the end
        self._held: dict[int, int] = {}  # by offset, the bytes of every extent that has memory, or is given to a call
        self._lent: dict[int, Extent] = {}  # by the id of its lease
        self._in_hand = 0  # the lease of the last chunk, while its thread copies it or waits for room; 0: of none
        self._is_closed = False

    def close_descriptor(self) -> None:
        """Close the descriptor, once the worker was sent it; the mapping has one of its own. Idempotent."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def take(self, nbytes: int = 0) -> Extent | None:
        """Return an extent for a call, of at least `nbytes` and of what is expected; None: no address space is left."""
        self._in_hand = 0  # a thread that makes another call has copied its last chunk, or put it into the queue
        needed = _round_up(max(nbytes, self.expected_nbytes, 1), mmap.PAGESIZE)
        while self._free:
            try:
                extent = self._free.pop()
            except IndexError:  # another thread was faster
                break
            if needed <= extent.nbytes <= 2 * needed:
                return extent
            self._discard(extent)
        space = _space_for(needed)
        unused = self._unused.setdefault(space, collections.deque())
        if not unused:
            if self._end + space > self.size:
                return None
            unused.append(self._end)
            self._end += space
        extent = Extent(unused.pop(), needed)
        self._held[extent.offset] = needed
        return extent

    def lease(self, extent: Extent, used_nbytes: int) -> NDArray[np.uint8]:
        """Return the bytes of a chunk that the worker has written; the extent comes back when their last view dies."""
        assert self._mapping is not None  # noqa: S101  it is there as long as an extent is in use
        self._recent.append(used_nbytes)
        self.expected_nbytes = max(self._recent)
        extent.is_cold = False
        # Not a view of one array of the whole mapping: NumPy would make every view refer to that array, past this one,
        # which would die at once. It cannot look through a memoryview.
        base = np.frombuffer(memoryview(self._mapping)[extent.offset : extent.offset + extent.nbytes], np.uint8)
        lease = Lease(base, self._lease_ended)
        self._in_hand = id(lease)
        self._lent[id(lease)] = extent
        _leases[id(lease)] = lease
        return base

    def give_back(self, extent: Extent) -> None:
        """Take back an extent that its call did not use, or whose chunk has died. Safe in any thread."""
        spare = len(self._held) - len(self._lent) + (self._in_hand in self._lent)  # this one included
        if self._is_closed or spare > MAX_SPARE_EXTENTS or extent.nbytes < self.expected_nbytes:
            self._discard(extent)
            return
        self._free.append(extent)
        self._discard_if_closed()  # looked at last: another thread may have closed it just now

    @property
    def held_nbytes(self) -> int:
        """The bytes of all extents that have memory: spare ones, and those of chunks that wait or the trainer holds."""
        return sum(list(self._held.values()))

    def close(self) -> None:
        """Give the memory of free extents back to the system; that of others goes when they come back. Idempotent.

        The worker must have ended: it could write to memory that is not there any more.
        """
        self.close_descriptor()
        self._is_closed = True
        self._discard_if_closed()

    def _lease_ended(self, lease: Lease) -> None:
        del _leases[id(lease)]
        self.give_back(self._lent.pop(id(lease)))

    def _discard(self, extent: Extent) -> None:
        """Give the memory of an extent back to the system, and keep its address space."""
        mapping = self._mapping
        # A fork of this process has the same memory. What it lets go of, this process may be using.
        if mapping is not None and hasattr(mmap, "MADV_REMOVE") and os.getpid() == self._maker:
            with contextlib.suppress(OSError):  # memory that was locked (mlockall) stays
                mapping.madvise(mmap.MADV_REMOVE, extent.offset, extent.nbytes)
        del self._held[extent.offset]
        self._unused[_space_for(extent.nbytes)].append(extent.offset)  # last: from now on `take` may enter it in `_held` again
        self._discard_if_closed()

    def _discard_if_closed(self) -> None:
        while self._is_closed and self._free:
            try:
                extent = self._free.pop()
            except IndexError:  # another thread was faster
                break
            self._discard(extent)
        if self._is_closed and not self._held:
            self._mapping = None  # unmapped with the last view, which may be the one that is just dying


def map_arena(descriptor: int) -> memoryview:
    """Return the worker's side: the memory of an arena, whose extents must be allocated before they are written."""
    mapping = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
    _leave_out_of_dumps(mapping)
    return memoryview(mapping)


def _map_largest(descriptor: int) -> tuple[int, mmap.mmap]:
    """Give the file the size of an arena, and map it; return (the size, the mapping). Raises OSError."""
    size = min(SPACE_PER_MEMORY * os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE, MAX_ARENA_BYTES)
    for limit, share in ((resource.RLIMIT_AS, SHARE_OF_LIMIT), (resource.RLIMIT_FSIZE, 1)):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY:
            size = min(size, most // share)
    while True:
        size = max(size // mmap.PAGESIZE, 1) * mmap.PAGESIZE
        os.ftruncate(descriptor, size)
        try:
            mapping = mmap.mmap(descriptor, size)
            break
        except OSError as error:
            # No address space for so much. (Without a descriptor for the mapping, half the size is no help.)
            if error.errno != errno.ENOMEM or size == mmap.PAGESIZE:
                raise
            size //= 2
    _leave_out_of_dumps(mapping)
    return size, mapping


def _leave_out_of_dumps(mapping: mmap.mmap) -> None:
    # A core dump reads each page of a mapping, and so would allocate all of it.
    if hasattr(mmap, "MADV_DONTDUMP"):
        mapping.madvise(mmap.MADV_DONTDUMP)


def _round_up(nbytes: int, step: int) -> int:
    return -(-nbytes // step) * step


def _space_for(nbytes: int) -> int:
    """Return the address space of an extent: four sizes for each power of two, so that space is used again."""
    return _round_up(nbytes, max(mmap.PAGESIZE, 1 << max(0, nbytes.bit_length() - 3)))
