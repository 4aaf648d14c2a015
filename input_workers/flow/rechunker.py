"""Chunks of any number of rows go in, slots of exactly as many rows as wanted come out. No threads, no locks, no waiting.

It owns the remainder: the rows beyond a batch stay here, in order, and are the first of the next. Each row is copied once.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.contracts import Chunk, FetchRequest, Part, Slot

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Rechunker", "rows_between"]

_rows_of = itemgetter(1)


def rows_between(axis: int, start: int, stop: int) -> tuple[slice, ...]:
    """Return the index of rows start to stop along the batch axis."""
    return (*(slice(None),) * axis, slice(start, stop))


class Rechunker:
    """Holds chunks and fills slots from them. Not thread-safe: it belongs to the enqueuer."""

    __slots__ = ("_axes", "_begin", "_done", "_ends", "_held")

    def __init__(self, batch_axes: Sequence[int]) -> None:
        self._axes = tuple(batch_axes)
        self._held: list[Chunk] = []
        # Rows are numbered from the first that ever came: where the first held chunk begins, where each held one ends,
        # and how many rows were copied.
        self._begin = 0
        self._ends: list[int] = []
        self._done = 0

    @property
    def rows(self) -> int:
        """Rows held and not yet copied."""
        return self._ends[-1] - self._done if self._ends else 0

    def add(self, chunks: Sequence[Chunk]) -> None:
        """Hold these chunks, none of them empty, behind the others."""
        end = self._ends[-1] if self._ends else self._begin
        ends = itertools.accumulate(map(_rows_of, chunks), initial=end)
        next(ends)
        self._ends.extend(ends)
        self._held.extend(chunks)

    def next_chunk(self) -> Chunk:
        """Return the chunk that is next; one must be held."""
        return self._held[0]

    def adopt(self, rows: int, alignment: int) -> Slot | None:
        """Return a slot made of the next chunk itself if that has `rows` rows, all of them to come, is contiguous,
        writeable and aligned; else None."""
        if not self._held or self._done > self._begin:
            return None
        arrays, chunk_rows, _, request = self._held[0]
        if chunk_rows != rows or not all(array.flags.carray for array in arrays):
            return None
        if alignment > 1 and any(array.ctypes.data % alignment for array in arrays):
            return None
        self._done += rows
        self._forget(1)
        slot = Slot(arrays, chunk_rows, chunk_rows, _epoch_of(request))
        if request is not None:
            slot.parts.append((request.epoch, request.offset(0), request.offset(rows)))
        return slot

    def fill(self, slot: Slot) -> tuple[list[Chunk], int]:
        """Copy held rows into the slot behind those it has, until it is full or none is held.

        Returns:
            The chunks that are now wholly copied and no longer held, and their rows.
        """
        wanted = min(slot.rows - slot.filled, self.rows)
        if not wanted:
            return [], 0
        held = self._held
        if not slot.filled:
            slot.epoch = _epoch_of(held[0][3])
        stop = self._done + wanted
        whole = bisect.bisect_right(self._ends, stop)  # chunks that end with these rows, or before
        parts = [chunk[0] for chunk in held[:whole]]
        last_begin = self._ends[whole - 1] if whole else self._begin
        if last_begin < stop:
            parts.append(self._cut(held[whole][0], 0, stop - last_begin))
        if self._done > self._begin:
            parts[0] = self._cut(parts[0], self._done - self._begin, held[0][1])
        begin, end = slot.filled, slot.filled + wanted
        for pieces, target, axis in zip(zip(*parts, strict=True), slot.arrays, self._axes, strict=True):
            if wanted < slot.rows:
                target = target[rows_between(axis, begin, end)]
            # One call per input and batch: a third of the cost of assigning slices one by one.
            np.concatenate(pieces, axis, out=target, casting="no")
        slot.filled = end
        if held[0][3] is not None:
            self._note_parts(slot.parts, whole, stop)
        self._done = stop
        return self._forget(whole)

    def _note_parts(self, parts: list[Part], whole: int, stop: int) -> None:
        """Add what the rows up to `stop` are: so many whole chunks, and the beginning of the next."""
        begin = self._begin
        for (_, rows, _, request), end in zip(self._held[: whole + 1], self._ends, strict=False):
            assert request is not None  # noqa: S101  all chunks of a source are of requests, or none is
            first, last = max(self._done - begin, 0), min(rows, stop - begin)
            begin = end
            if first < last:
                epoch, at, until = request.epoch, request.offset(first), request.offset(last)
                if parts and parts[-1][2] == at and parts[-1][0] == epoch:
                    parts[-1] = epoch, parts[-1][1], until
                else:
                    parts.append((epoch, at, until))

    def _forget(self, count: int) -> tuple[list[Chunk], int]:
        """Let go of the first `count` chunks, which were copied whole; return them and their rows."""
        if not count:
            return [], 0
        chunks = self._held[:count]
        rows = self._ends[count - 1] - self._begin
        self._begin += rows
        del self._held[:count]
        del self._ends[:count]
        return chunks, rows

    def _cut(self, arrays: Sequence[NDArray[Any]], start: int, stop: int) -> list[NDArray[Any]]:
        return [array[rows_between(axis, start, stop)] for array, axis in zip(arrays, self._axes, strict=True)]


def _epoch_of(request: FetchRequest | None) -> int:
    return request.epoch if request is not None else 0
