"""Memory that is lent out as arrays and knows by itself when it comes back: when the last view of it has died.

A weak reference's callback may run inside any allocation, in a thread that holds any lock. So giving back takes none: it
makes single calls of a dict and a deque, which nothing can interrupt. (Weak references by hand cost a third of
`weakref.finalize`.)
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.contracts import ArraySpec, Slot

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ALIGNMENT_BYTES", "Block", "BlockPool", "CopyPool", "SlabPool", "SlotPool", "map_block"]

# TensorFlow aborts on DLPack memory that is aligned to less; a cache line, too.
ALIGNMENT_BYTES = 64

# Copies of less than this come from the heap.
COPY_SLAB_BYTES = 64 * 1024


class _Lease(weakref.ref["NDArray[np.uint8]"]):
    """Knows when the array that it refers to dies, and which slab, or block, comes back then."""

    __slots__ = ("slab",)
    slab: Any


class SlabPool:
    """Lends out slabs of one size. Thread-safe.

    A slab that comes back is used again, the one that came last first, because it may still be in a cache; beyond `keep`
    free ones it is let go. There is always another: a caller never waits for whoever still holds one.

    Args:
        nbytes: of a slab.
        keep: how many free ones are kept.
        make: returns so many writable bytes, 64-byte aligned, which live as long as the array; by default from the heap.
    """

    __slots__ = ("_free", "_lent", "_make", "keep", "nbytes")

    def __init__(self, nbytes: int, keep: int, make: Callable[[int], NDArray[np.uint8]] | None = None) -> None:
        self.nbytes = nbytes
        self.keep = keep
        self._make = make or _from_the_heap
        self._free: collections.deque[memoryview] = collections.deque()
        self._lent: dict[int, _Lease] = {}

    def lease(self) -> NDArray[np.uint8]:
        """Return `nbytes` bytes, 64-byte aligned, with whatever was in them."""
        try:
            slab = self._free.pop()
        except IndexError:
            slab = memoryview(self._make(self.nbytes))  # type: ignore[arg-type]
        # Not a view of the slab's array: NumPy would make every view of it refer to that array, past this one, which
        # would die at once. It cannot look through a memoryview.
        base = np.frombuffer(slab, np.uint8)
        lease = _Lease(base, self._give_back)
        lease.slab = slab
        self._lent[id(lease)] = lease
        return base

    @property
    def lent(self) -> int:
        """How many slabs are lent out."""
        return len(self._lent)

    @property
    def free(self) -> int:
        """How many slabs are kept for the next leases."""
        return len(self._free)

    def let_go(self) -> bool:
        """Let go of a free slab; False: there is none."""
        try:
            self._free.popleft()
        except IndexError:
            return False
        return True

    def _give_back(self, lease: _Lease) -> None:
        del self._lent[id(lease)]
        if len(self._free) < self.keep:
            self._free.append(lease.slab)


def _from_the_heap(nbytes: int) -> NDArray[np.uint8]:
    raw = np.empty(nbytes + ALIGNMENT_BYTES, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[offset : offset + nbytes]


class CopyPool:
    """Lends out memory for copies of arrays of any size, from slabs of few sizes. Thread-safe.

    A fresh mapping costs a page fault for every 4 KB that is written, several times the copy itself; a slab that was used
    before costs none. `keep` free slabs are kept of each size, and all slabs together, free ones and those that are lent,
    take no more memory than were ever lent at a time.
    """

    __slots__ = ("_keep", "_most_lent", "_pools")

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._most_lent = 0  # bytes
        self._pools: dict[int, SlabPool] = {}

    def copy(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return a C-contiguous copy, bit for bit, of the plain array class."""
        nbytes = array.nbytes
        if nbytes < COPY_SLAB_BYTES:  # small ones come from the heap, which uses its memory again by itself
            return np.array(array, copy=True, order="C", subok=False)
        step = 1 << (nbytes.bit_length() - 3)  # four sizes for each power of two: at most a quarter is unused
        size = -(-nbytes // step) * step
        pool = self._pools.get(size) or self._pools.setdefault(size, SlabPool(size, self._keep))
        if not pool.free:
            self._make_room(size)
        target = pool.lease()[:nbytes].view(array.dtype).reshape(array.shape)
        np.copyto(target, array, casting="no")
        return target

    def _make_room(self, nbytes: int) -> None:
        """Another slab is needed: let go of free ones of other sizes for it."""
        pools = list(self._pools.values())
        lent = sum(pool.lent * pool.nbytes for pool in pools) + nbytes
        self._most_lent = max(self._most_lent, lent)
        excess = lent + sum(pool.free * pool.nbytes for pool in pools) - self._most_lent
        for pool in pools:
            while excess > 0 and pool.let_go():
                excess -= pool.nbytes


class SlotPool:
    """Lends out slots for batches of `rows` rows; each array is a lease of its own, so one can be held without the rest.

    `make`: as of a SlabPool.
    """

    __slots__ = ("_layout", "rows")

    def __init__(
        self,
        specs: Sequence[ArraySpec],
        batch_axes: Sequence[int],
        rows: int,
        keep: int,
        make: Callable[[int], NDArray[np.uint8]] | None = None,
    ) -> None:
        self.rows = rows
        self._layout: list[tuple[SlabPool, tuple[int, ...], np.dtype[Any]]] = []
        for spec, axis in zip(specs, batch_axes, strict=True):
            pool = SlabPool(spec.row_nbytes * rows, keep, make)
            self._layout.append((pool, spec.batch_shape(rows, axis), spec.dtype))

    def keep(self, slots: int) -> None:
        """Keep so many free slots from now on; those beyond are let go when they come back."""
        for pool, _, _ in self._layout:
            pool.keep = slots

    def lease(self) -> Slot:
        """Return an empty slot."""
        arrays = [
            pool.lease().view(dtype).reshape(shape) if pool.nbytes else np.empty(shape, dtype)
            for pool, shape, dtype in self._layout
        ]
        return Slot(arrays, self.rows)


# Where blocks lie if the system has no anonymous shared memory: in a file without a name, here or in the usual folder.
BLOCK_FOLDER = "/dev/shm"  # noqa: S108


class Block:
    """Shared memory without a name: whoever is given its descriptor maps it. Nothing is left of it after a crash.

    Args:
        nbytes: its size, at least 1.
        named: where the system has no anonymous shared memory, lay it in a file with a name, which other processes can
            open, and which is removed at `close`.

    Attributes:
        number: unlike that of any other block of this process.
        descriptor: to be sent to other processes.
        nbytes: its size.
        path: the file's name; None: it has none.
        view: the memory, as this process maps it.

    Raises:
        OSError: there is not so much memory, or no descriptor left. (Memory that is not there would else be found missing
            at the first write, by a SIGBUS.)
    """

    __slots__ = ("_maker", "descriptor", "nbytes", "number", "path", "view")
    _numbers = itertools.count()

    def __init__(self, nbytes: int, *, named: bool = False) -> None:
        self.number = next(self._numbers)
        self.nbytes = nbytes
        self.path: str | None = None
        self._maker = os.getpid()
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create(f"input_workers-{self.number}", os.MFD_CLOEXEC)
        else:
            folder = BLOCK_FOLDER if os.path.isdir(BLOCK_FOLDER) else None
            if named:
                self.descriptor, self.path = tempfile.mkstemp(prefix="input_workers-", dir=folder)
            else:
                with tempfile.TemporaryFile(dir=folder) as file:
                    self.descriptor = os.dup(file.fileno())
        try:
            os.posix_fallocate(self.descriptor, 0, nbytes)
            self.view = map_block(self.descriptor, nbytes)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                error.add_note(f"shared memory: wanted {nbytes} bytes")
            raise

    def close(self) -> None:
        """Close the descriptor and remove the name; the memory goes with the last mapping of it. Idempotent."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
        path, self.path = self.path, None
        if path is not None and os.getpid() == self._maker:  # a fork of the maker has it, too
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def __del__(self) -> None:
        # A trainer may hold a chunk for longer than anybody holds the pool that would be given it back.
        if getattr(self, "descriptor", -1) >= 0:
            self.close()


def map_block(descriptor: int, nbytes: int, *, read_only: bool = False) -> memoryview:
    """Return the memory behind a descriptor. It is unmapped when the last view of it dies."""
    return memoryview(mmap.mmap(descriptor, nbytes, access=mmap.ACCESS_READ if read_only else mmap.ACCESS_WRITE))


# A pool hands out blocks for the largest of so many chunks, so that one huge chunk does not make all blocks huge for ever.
RECENT_CHUNKS = 16


class BlockPool:
    """Lends out blocks of shared memory, large enough for the largest of the latest chunks. Thread-safe.

    A block that comes back is used again: pages that were written before cost no fault. Beyond `keep` free ones it is let
    go, as are those that have become too small, or much too large.

    Attributes:
        nbytes: what a block is likely to be needed for; 0 before the first chunk.
        gone: numbers of blocks that were let go; whoever has mapped them may forget them.
    """

    __slots__ = ("_free", "_is_closed", "_lent", "_recent", "_sizes", "gone", "keep", "nbytes")

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.nbytes = 0
        self.gone: collections.deque[int] = collections.deque()
        self._recent: collections.deque[int] = collections.deque(maxlen=RECENT_CHUNKS)
        self._free: collections.deque[Block] = collections.deque()
        self._lent: dict[int, _Lease] = {}
        self._sizes: dict[int, int] = {}  # by number, of every block that was made and not let go
        self._is_closed = False

    def take(self, nbytes: int = 0) -> Block:
        """Return a block of at least so many bytes, to be leased or given back. Raises OSError."""
        wanted = -(-max(nbytes, self.nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        while True:
            try:
                block = self._free.pop()
            except IndexError:
                block = Block(wanted)
                self._sizes[block.number] = block.nbytes
                return block
            if wanted <= block.nbytes <= 2 * wanted:
                return block
            self._let_go(block)

    def used(self, nbytes: int) -> None:
        """A chunk of so many bytes has come in a block. Called by one thread at a time."""
        self._recent.append(nbytes)
        self.nbytes = max(self._recent)

    def lease(self, block: Block) -> NDArray[np.uint8]:
        """Return the block's bytes; it comes back when the last view of them has died."""
        base = np.frombuffer(block.view, np.uint8)
        lease = _Lease(base, self._lease_ended)
        lease.slab = block
        self._lent[id(lease)] = lease
        return base

    def give_back(self, block: Block) -> None:
        """Nobody uses the block any more."""
        if len(self._free) >= self.keep or block.nbytes < self.nbytes:
            self._let_go(block)
            return
        self._free.append(block)
        if self._is_closed:  # looked at last: another thread may just do it
            self.close()

    @property
    def held_nbytes(self) -> int:
        """The bytes of all its blocks: free, granted to a worker, waiting, or held by the trainer."""
        return sum(list(self._sizes.values()))

    def _let_go(self, block: Block) -> None:
        block.close()
        self._sizes.pop(block.number, None)
        self.gone.append(block.number)

    def _lease_ended(self, lease: _Lease) -> None:
        del self._lent[id(lease)]
        self.give_back(lease.slab)

    def close(self) -> None:
        """Let go of the free blocks; those that are lent go when they come back."""
        self._is_closed = True
        while self._free:
            try:
                self._let_go(self._free.pop())
            except IndexError:
                break
