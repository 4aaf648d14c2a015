"""Memory that is lent out as arrays and knows by itself when it comes back: when the last view of it has died.

A weak reference's callback may run inside any allocation, in a thread that holds any lock. So giving back takes none: it
makes single calls of a dict and a deque, which nothing can interrupt. (Weak references by hand cost a third of
`weakref.finalize`.)
"""

from __future__ import annotations

import collections
import contextlib
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

__all__ = [
    "ALIGNMENT_BYTES",
    "Block",
    "Lease",
    "SlabPool",
    "SlotPool",
    "aligned_bytes",
    "map_block",
    "open_shared_memory",
]

# TensorFlow aborts on DLPack memory that is aligned to less; a cache line, too.
ALIGNMENT_BYTES = 64


class Lease(weakref.ref["NDArray[np.uint8]"]):
    """Weak reference to an array that was lent, with the memory that comes back when the array dies."""

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
        self._make = make or aligned_bytes
        self._free: collections.deque[memoryview] = collections.deque()
        self._lent: dict[int, Lease] = {}

    def lease(self) -> NDArray[np.uint8]:
        """Return `nbytes` bytes, 64-byte aligned, with whatever was in them."""
        try:
            slab = self._free.pop()
        except IndexError:
            slab = memoryview(self._make(self.nbytes))  # type: ignore[arg-type]
        # Not a view of the slab's array: NumPy would make every view of it refer to that array, past this one, which
        # would die at once. It cannot look through a memoryview.
        base = np.frombuffer(slab, np.uint8)
        lease = Lease(base, self._give_back)
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

    def _give_back(self, lease: Lease) -> None:
        # Ctrl-C may have come while it was made: before it was noted, or knew its slab.
        self._lent.pop(id(lease), None)
        slab = getattr(lease, "slab", None)
        if slab is not None and len(self._free) < self.keep:
            self._free.append(slab)


def aligned_bytes(nbytes: int) -> NDArray[np.uint8]:
    """Return bytes from the heap, 64-byte aligned, with whatever was in them."""
    raw = np.empty(nbytes + ALIGNMENT_BYTES, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[offset : offset + nbytes]


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
        """Keep this number of free slots from now on, and let go of those beyond."""
        for pool, _, _ in self._layout:
            pool.keep = slots
            while pool.free > slots and pool.let_go():
                pass

    def lease(self) -> Slot:
        """Return an empty slot."""
        arrays = [
            pool.lease().view(dtype).reshape(shape) if pool.nbytes else np.empty(shape, dtype)
            for pool, shape, dtype in self._layout
        ]
        return Slot(arrays, self.rows)


# Where shared memory lies if the system has no anonymous one: in a file without a name, here or in the usual folder.
BLOCK_FOLDER = "/dev/shm"  # noqa: S108


def open_shared_memory(name: str, *, named: bool = False) -> tuple[int, str | None]:
    """Return (a descriptor of new shared memory without any bytes, the path of its file, or None if it has no name).

    Args:
        name: shown by the system's tools, which list what a process has mapped.
        named: where the system has no anonymous shared memory, use a file with a name, which other processes can open.

    Raises:
        OSError: no descriptor is left, or the file cannot be made.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create(f"input_workers-{name}", os.MFD_CLOEXEC), None
    folder = BLOCK_FOLDER if os.path.isdir(BLOCK_FOLDER) else None
    if named:
        return tempfile.mkstemp(prefix="input_workers-", dir=folder)
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.dup(file.fileno()), None


class Block:
    """Shared memory that other processes open by a path. Nothing is left of it after a crash, if it has no name.

    Args:
        nbytes: its size, at least 1.

    Attributes:
        descriptor: of the memory.
        nbytes: its size.
        path: the file's name; None: the memory is anonymous.
        view: the memory, as this process maps it.

    Raises:
        OSError: there is not enough memory, or no descriptor left. (Missing memory would otherwise be noticed at the first
            write, by a SIGBUS.)
    """

    __slots__ = ("_maker", "descriptor", "nbytes", "path", "view")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._maker = os.getpid()
        self.descriptor, self.path = open_shared_memory("block", named=True)
        try:
            os.posix_fallocate(self.descriptor, 0, nbytes)
            self.view = map_block(self.descriptor, nbytes)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                error.add_note(f"shared memory: could not get {nbytes} bytes")
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


def map_block(descriptor: int, nbytes: int, *, read_only: bool = False) -> memoryview:
    """Return the memory behind a descriptor. It is unmapped when the last view of it dies."""
    return memoryview(mmap.mmap(descriptor, nbytes, access=mmap.ACCESS_READ if read_only else mmap.ACCESS_WRITE))
