"""Batches that are being filled, and the rules by which rows become batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from input_workers.contracts import FetchRequest, Slot

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from input_workers.flow.device import Device, Target

__all__ = ["BatchRules", "EpochEnd", "KeepAside", "LastBatch", "OpenBatch", "Unplaced", "adoptable", "is_usable"]

LastBatch = Literal["drop", "keep", "pad"]

# An adopted chunk may have this part of its bytes copied, for inputs that the function still holds (often the labels).
MAX_COPIED_PART = 0.5


@dataclass(frozen=True, slots=True)
class BatchRules:
    """How the rows of an input source become batches.

    Attributes:
        source: the name, for errors.
        batch_axes: the batch axis of each input.
        last_batch: what becomes of rows that fill no batch at the end.
        rebatch: False delivers chunks as they came.
    """

    source: str
    batch_axes: tuple[int, ...]
    last_batch: LastBatch = "drop"
    rebatch: bool = True


# Copies a chunk's arrays, which have this many rows, to memory that only the caller holds.
KeepAside: TypeAlias = "Callable[[Sequence[NDArray[Any]], int], Sequence[NDArray[Any]]]"


class Unplaced(NamedTuple):
    """What `Placement.place` could not place: the assembly was closed, or copying failed."""

    rows: int
    error: BaseException | None = None


class EpochEnd(NamedTuple):
    """Stands behind the last batch of an epoch, where epochs are kept apart."""

    epoch: int


class OpenBatch(Slot):
    """A slot that is being filled. `filled` counts reserved rows, `copied` those whose values are in place.

    It has no memory until its first row is reserved: then it gets what was used last, which may still be in a cache; and a
    chunk that becomes the batch itself needs none.

    Its counters belong to whoever holds the assembly's lock; the values of reserved rows belong to who reserved them.

    Attributes:
        device, target: where it will be sent; None with `rebatch=False`, where that is decided when it is sent.
        copied: rows that are in place.
        is_closed: takes no more rows, although it is not full: an epoch, or the data, ended.
        is_broken: a copy into it failed, so it will never be complete.
        nbytes: of a full batch.
        error: why it has no memory.
    """

    __slots__ = ("copied", "device", "error", "is_broken", "is_closed", "nbytes", "target")

    def __init__(
        self,
        arrays: Sequence[NDArray[Any]],
        rows: int,
        device: Device | None = None,
        target: Target | None = None,
        nbytes: int = 0,
    ) -> None:
        super().__init__(arrays, rows)
        self.device = device
        self.target = target
        self.error: BaseException | None = None
        self.copied = 0
        self.is_closed = False
        self.is_broken = False
        self.nbytes = nbytes or sum(array.nbytes for array in arrays)

    @property
    def is_complete(self) -> bool:
        """Whether every row that it will have is in place."""
        return self.copied == self.rows or (self.is_closed and self.copied == self.filled)

    @property
    def filled_nbytes(self) -> int:
        """Bytes of the reserved rows."""
        return self.nbytes * self.filled // self.rows if self.rows else 0

    def take_memory(self) -> None:
        """Get memory from the target's pool, if it has none yet. Never raises: `error` says why there is none."""
        if self.arrays or self.target is None:
            return
        try:
            self.arrays = self.target.lease(self.rows).arrays
        except Exception as error:
            what = f"there is no memory for a slot of {self.rows} rows, {self.nbytes:,} bytes"
            self.error = MemoryError(f"{what}: {error}")

    def reserve(self, rows: int, request: FetchRequest | None, first: int) -> int:
        """Reserve the next rows for a chunk's rows from `first` on; return where they begin."""
        begin = self.filled
        if request is not None:
            if not begin:
                self.epoch = request.epoch
            epoch, start, stop = request.epoch, request.offset(first), request.offset(first + rows)
            parts = self.parts
            if parts and parts[-1][2] == start and parts[-1][0] == epoch:
                parts[-1] = epoch, parts[-1][1], stop
            else:
                parts.append((epoch, start, stop))
        self.filled = begin + rows
        return begin

    def copy_in(self, begin: int, stop: int, arrays: Sequence[NDArray[Any]], first: int, axes: Sequence[int] | None) -> None:
        """Copy a chunk's rows from `first` on to the rows begin to stop. `axes`: None if all rows lie along axis 0.

        Plain assignment is a tenth of a microsecond cheaper than np.copyto; dtypes and row shapes were checked, so it
        casts and broadcasts nothing.
        """
        if self.error is not None:
            raise self.error
        last = first + stop - begin
        if axes is None:
            for target, array in zip(self.arrays, arrays, strict=True):
                target[begin:stop] = array if len(array) == stop - begin else array[first:last]
            return
        for target, array, axis in zip(self.arrays, arrays, axes, strict=True):
            target[_rows(axis, begin, stop)] = array[_rows(axis, first, last)]

    def adopt(self, arrays: Sequence[NDArray[Any]], kept: Sequence[bool]) -> None:
        """Take the arrays of a chunk that is this batch, those of `kept` as they are; the others are copied."""
        if all(kept):
            self.arrays = list(arrays)
            return
        self.take_memory()
        if self.error is not None:
            raise self.error
        adopted = list(self.arrays)
        for index, (array, keeps) in enumerate(zip(arrays, kept, strict=True)):
            if keeps:
                adopted[index] = array
            else:
                adopted[index][...] = array
        self.arrays = adopted

    def cut_short(self, axes: Sequence[int]) -> Slot:
        """Return a slot of the rows that it has."""
        arrays = [array[_rows(axis, 0, self.filled)] for array, axis in zip(self.arrays, axes, strict=True)]
        if any(axes):  # then a part of the rows is not contiguous
            arrays = [array.copy() for array in arrays]
        short = Slot(arrays, self.filled, self.filled, self.epoch)
        short.parts = self.parts
        return short

    def pad(self, axes: Sequence[int]) -> Slot:
        """Repeat the last row until it is full; `filled` still counts the real rows."""
        for array, axis in zip(self.arrays, axes, strict=True):
            array[_rows(axis, self.filled, self.rows)] = array[_rows(axis, self.filled - 1, self.filled)]
        return self


def _rows(axis: int, start: int, stop: int) -> tuple[slice, ...]:
    """Return the index of rows start to stop along a batch axis."""
    return (*(slice(None),) * axis, slice(start, stop))


def adoptable(arrays: Sequence[NDArray[Any]], ours: Sequence[bool], target: Target | None) -> Sequence[bool] | None:
    """Return which arrays of a chunk that is a whole batch may be kept as they are; None: it is better copied whole.

    Args:
        arrays: one for each input.
        ours: whether nothing else refers to the memory of each.
        target: where the batch will be sent.
    """
    alignment = target.chunk_alignment if target is not None else None
    if alignment is None:
        return None
    kept = [is_ours and is_usable(array, alignment) for array, is_ours in zip(arrays, ours, strict=True)]
    if all(kept):
        return kept
    copied = sum(array.nbytes for array, keeps in zip(arrays, kept, strict=True) if not keeps)
    return kept if copied <= MAX_COPIED_PART * sum(array.nbytes for array in arrays) and any(kept) else None


def is_usable(array: NDArray[Any], alignment: int) -> bool:
    """Whether a feed that asks for this alignment can send an array as it is."""
    return array.flags.carray and (alignment <= 1 or not array.ctypes.data % alignment)
