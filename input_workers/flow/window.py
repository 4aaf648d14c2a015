"""The batches between fetchers and enqueuer: laid out, being filled, or full and not yet taken. No threads, no locks."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from input_workers.contracts import FetchRequest
from input_workers.flow.batches import EpochEnd, OpenBatch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from input_workers.flow.device import Device, Target

__all__ = ["ChunkWindow", "Piece", "Window"]

# Empty batches that are kept laid out behind the one being filled, where each has memory. While the enqueuer sends one batch,
# the fetchers can fill these; with two of them they wait only if they are twice as fast as the feed, which then is the
# bottleneck anyway. Batches that get their memory later are laid out as far as the bounds allow.
LAID_OUT_AHEAD = 2

# Fetchers that have filled the window are let in again when it is a quarter full, or after this long: waking one costs a
# hand-over of some 20 us, which at high rates is a tenth of the time of a batch.
REFILL_SECONDS = 0.004

# Rows of an open batch, reserved for a chunk: (batch, begin, stop).
Piece: TypeAlias = tuple[OpenBatch, int, int]


class Window:
    """Batches in order, from the oldest. Not thread-safe.

    Args:
        max_rows: bound on rows of batches that are laid out or filled. One batch that is larger passes alone.
        max_nbytes: bound on their bytes, or None.

    Attributes:
        max_rows: may be changed at any time.
        current: the batch that has room; None: there is none. All before it are full or closed, all behind it are empty.
        epoch_ends: how many epochs have ended. Batches that are laid out after each begin a new rotation of the devices.
        discarded: empty batches that were taken back, until the enqueuer asks for them.
        latest: rows and target of the batch that was laid out last.
        is_limited: the bounds allowed no further batch to be laid out when that was last asked for.
    """

    def __init__(self, max_rows: int, max_nbytes: int | None) -> None:
        self.max_rows = max_rows
        self.max_nbytes: float = math.inf if max_nbytes is None else max_nbytes
        self.current: OpenBatch | None = None
        self.epoch_ends = 0
        self.is_limited = False
        self._limited_at = 0.0
        self.latest: tuple[int, Target | None] = (0, None)
        self.discarded: list[OpenBatch] = []
        self._items: collections.deque[OpenBatch | EpochEnd] = collections.deque()

    def __bool__(self) -> bool:
        """Whether there is a batch, or the end of an epoch, in it."""
        return bool(self._items)

    def batches(self) -> list[OpenBatch]:
        """Return the batches, the oldest first."""
        # Listed first, in one step: a signal handler that stops the source may empty it between two others.
        return [item for item in list(self._items) if isinstance(item, OpenBatch)]

    # ---- fetchers

    def weight_of(self, rows: int) -> int:
        """Return how much a chunk counts towards the bounds."""
        return rows

    def has_room(self, nbytes: int) -> bool:
        """Whether rows can be reserved."""
        return self.current is not None

    def reserve(
        self, arrays: Sequence[NDArray[Any]], rows: int, done: int, nbytes: int, request: FetchRequest | None
    ) -> list[Piece]:
        """Reserve what there is room for, from the chunk's row `done` on."""
        pieces: list[Piece] = []
        while done < rows and self.current is not None:
            batch = self.current
            count = min(rows - done, batch.rows - batch.filled)
            if count < batch.rows:
                batch.take_memory()  # else the chunk may become the batch itself
            begin = batch.reserve(count, request, done)
            done += count
            pieces.append((batch, begin, begin + count))
            if batch.filled == batch.rows:
                self.go_on()
        return pieces

    def go_on(self) -> None:
        """The current batch is full: go on with the next one that is laid out."""
        self.current = None
        for item in reversed(self._items):
            if isinstance(item, EpochEnd) or item.filled:
                break
            self.current = item

    def is_beyond(self, rows: int, nbytes: int) -> bool:
        """Whether the full batches and this many rows and bytes more exceed the bounds."""
        full = [item for item in self.batches() if item.filled and item is not self.current]
        return (
            sum(item.filled for item in full) + rows > self.max_rows
            or sum(item.filled_nbytes for item in full) + nbytes > self.max_nbytes
        )

    @property
    def has_full(self) -> bool:
        """Whether a batch, besides the current one, has rows."""
        return any(item.filled for item in self.batches() if item is not self.current)

    @property
    def charged(self) -> tuple[int, int]:
        """Rows and bytes that were reserved."""
        batches = self.batches()
        return sum(item.filled for item in batches), sum(item.filled_nbytes for item in batches)

    # ---- the enqueuer

    @property
    def lacks_batches(self) -> bool:
        """Whether more batches should be laid out, as far as the bounds allow."""
        return not self.is_limited and (self.current is None or self.current is self._items[-1])

    def wants_batch(self, rows: int, nbytes: int, has_memory: bool) -> bool:
        """Whether an empty batch of this size, with or without memory, should be laid out now."""
        batches = self.batches()
        if self.is_limited:
            rows_full = sum(item.filled for item in batches)
            if rows_full * 4 > self.max_rows and time.monotonic() - self._limited_at < REFILL_SECONDS:
                return False
        if has_memory:
            is_filling = self.current is not None and self.current.filled > 0
            if sum(not item.filled for item in batches) > LAID_OUT_AHEAD - is_filling:
                return False
        fits = sum(item.rows for item in batches) + rows <= self.max_rows
        fits = fits and sum(item.nbytes for item in batches) + nbytes <= self.max_nbytes
        self.is_limited = not fits and bool(batches)
        if self.is_limited:
            self._limited_at = time.monotonic()
        return not self.is_limited

    def lay_out(self, batch: OpenBatch) -> None:
        """Add an empty batch behind the others."""
        self.latest = batch.rows, batch.target
        self._items.append(batch)
        if self.current is None:
            self.current = batch

    def discard_empty(self) -> int:
        """Take back the batches that have no rows yet; return how many there were."""
        count = 0
        while self._items and isinstance(last := self._items[-1], OpenBatch) and not last.filled:
            self.discarded.append(last)
            self._items.pop()
            count += 1
            if last is self.current:
                self.current = None
        return count

    def shrink(self, target: Target, device: Device) -> bool:
        """Give the batch that is being filled the size of another target of its device, if that is smaller and has room."""
        batch, rows = self.current, target.batch_size
        if batch is None or batch.device is not device or not batch.filled <= rows < batch.rows:
            return False
        batch.arrays = [array[:rows] for array in batch.arrays]
        batch.rows, batch.target = rows, target
        if batch.filled == rows:
            self.current = None
        return True

    @property
    def is_ready(self) -> bool:
        """Whether the oldest batch is complete, or will never be."""
        first = self._items[0] if self._items else None
        return first is not None and (isinstance(first, EpochEnd) or first.is_complete or first.is_broken)

    @property
    def is_stuck(self) -> bool:
        """Whether nothing will be complete any more."""
        return not self._items or (isinstance(first := self._items[0], OpenBatch) and first.is_broken)

    def take(self) -> OpenBatch | EpochEnd:
        """Take out the oldest batch, which is complete, or the end of an epoch."""
        return self._items.popleft()

    # ---- ends

    def close_current(self) -> None:
        """The batch that is being filled takes no more rows."""
        self.discard_empty()
        if self.current is not None:
            self.current.is_closed = True
            self.current = None

    def end_epoch(self, epoch: int) -> None:
        """Close the batch that is being filled; the next row begins another, in the next epoch."""
        self.close_current()
        self._items.append(EpochEnd(epoch))
        self.epoch_ends += 1

    def forget(self) -> int:
        """Forget every batch; return the rows that were reserved in them."""
        rows = sum(item.filled for item in self.batches())
        self._items.clear()
        self.discarded, self.latest, self.current = [], (0, None), None
        return rows


class ChunkWindow(Window):
    """With `rebatch=False`: each chunk is a batch of its own, and bounds count chunks."""

    def weight_of(self, rows: int) -> int:
        """Return how much a chunk counts towards the bounds."""
        return 1

    def has_room(self, nbytes: int) -> bool:
        """Whether a chunk of this size can be put in."""
        return not self.batches() or not self.is_beyond(1, nbytes)

    def reserve(
        self, arrays: Sequence[NDArray[Any]], rows: int, done: int, nbytes: int, request: FetchRequest | None
    ) -> list[Piece]:
        """Put the chunk in, whole, if there is room. Its arrays are the batch."""
        if not rows or not self.has_room(nbytes):
            return []
        batch = OpenBatch(arrays, rows)
        batch.reserve(rows, request, 0)
        batch.copied = rows
        self._items.append(batch)
        return [(batch, 0, rows)]

    def is_beyond(self, rows: int, nbytes: int) -> bool:
        """Whether the chunks and this many chunks and bytes more exceed the bounds."""
        chunks, held = self.charged
        return chunks + rows > self.max_rows or held + nbytes > self.max_nbytes

    @property
    def charged(self) -> tuple[int, int]:
        """Chunks and bytes."""
        batches = self.batches()
        return len(batches), sum(item.nbytes for item in batches)

    @property
    def lacks_batches(self) -> bool:
        """Never: chunks bring their own memory."""
        return False

    def wants_batch(self, rows: int, nbytes: int, has_memory: bool) -> bool:
        """Never."""
        return False
