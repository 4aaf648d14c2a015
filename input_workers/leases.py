"""Memory that is lent out as arrays and knows by itself when it comes back: when the last view of it has died.

A finalizer may run inside any allocation, in a thread that holds any lock. So giving back only calls
`queue.SimpleQueue.put`, which is reentrant.
"""

from __future__ import annotations

import queue
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.contracts import ArraySpec, Slot

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ALIGNMENT_BYTES", "SlabPool", "SlotPool"]

# TensorFlow aborts on DLPack memory that is aligned to less; a cache line, too.
ALIGNMENT_BYTES = 64


class SlabPool:
    """Lends out slabs of one size. Thread-safe.

    A slab that comes back is used again; beyond `keep` free ones it is let go. There is always another: a caller never
    waits for whoever still holds one.
    """

    __slots__ = ("_free", "keep", "nbytes")

    def __init__(self, nbytes: int, keep: int) -> None:
        self.nbytes = nbytes
        self.keep = keep
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()

    def lease(self) -> NDArray[np.uint8]:
        """Return `nbytes` bytes, 64-byte aligned, with whatever was in them."""
        try:
            slab = self._free.get_nowait()
        except queue.Empty:
            raw = np.empty(self.nbytes + ALIGNMENT_BYTES, np.uint8)
            offset = -raw.ctypes.data % ALIGNMENT_BYTES
            slab = memoryview(raw)[offset : offset + self.nbytes]  # type: ignore[arg-type]
        # Not a view of the slab's array: NumPy would make every view of it refer to that array, past this one, and the
        # finalizer would fire at once. It cannot look through a memoryview.
        base = np.frombuffer(slab, np.uint8)
        weakref.finalize(base, self._give_back, slab).atexit = False
        return base

    def _give_back(self, slab: memoryview) -> None:
        if self._free.qsize() < self.keep:
            self._free.put(slab)


class SlotPool:
    """Lends out slots for batches of `rows` rows; each array is a lease of its own, so one can be held without the rest."""

    __slots__ = ("_layout", "rows")

    def __init__(self, specs: Sequence[ArraySpec], batch_axes: Sequence[int], rows: int, keep: int) -> None:
        self.rows = rows
        self._layout: list[tuple[SlabPool, tuple[int, ...], np.dtype[Any]]] = []
        for spec, axis in zip(specs, batch_axes, strict=True):
            pool = SlabPool(spec.row_nbytes * rows, keep)
            self._layout.append((pool, spec.batch_shape(rows, axis), spec.dtype))

    def lease(self) -> Slot:
        """Return an empty slot."""
        arrays = [
            pool.lease().view(dtype).reshape(shape) if pool.nbytes else np.empty(shape, dtype)
            for pool, shape, dtype in self._layout
        ]
        return Slot(arrays, self.rows)
