"""Rows of any dtype and size that say which row they are, and the fetch functions that return them.

The first 8 bytes of a row's first input are its id: a tag of the run, then worker, process, call and row (plain function)
or stream, epoch and row number (Stream). All other bytes follow from the id and their place, so a batch proves itself.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import input_workers as iw

# Bits of an id, from the lowest. The tag has the upper 11 bits below the sign.
TAG_SHIFT = 52
ROW_BITS, CALL_BITS, PROCESS_BITS = 18, 14, 12
CALL_SHIFT, PROCESS_SHIFT, WORKER_SHIFT = ROW_BITS, ROW_BITS + CALL_BITS, ROW_BITS + CALL_BITS + PROCESS_BITS
EPOCH_SHIFT, STREAM_SHIFT = 40, 48
PROCESS_MASK = ((1 << PROCESS_BITS) - 1) << PROCESS_SHIFT
PLACE_STEP, INPUT_STEP = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03
HANG_SECONDS = 20.0


def chance(*key: object) -> float:
    """Return a number from 0 to 1 that depends on the key alone, in every process."""
    return zlib.crc32(repr(key).encode()) / 2**32


@dataclass(frozen=True)
class InputFormat:
    """Dtype, row shape and batch axis of one input."""

    number: int
    dtype: str
    shape: tuple[int, ...]
    axis: int

    @property
    def row_nbytes(self) -> int:
        return np.dtype(self.dtype).itemsize * int(np.prod(self.shape))

    def expected_bytes(self, ids: np.ndarray) -> np.ndarray:
        """Return the bytes of the rows with these ids, shape (rows, row_nbytes)."""
        words = -(-self.row_nbytes // 8)
        with np.errstate(over="ignore"):
            places = np.arange(words, dtype=np.uint64) * np.uint64(PLACE_STEP)
            places += np.uint64(self.number * INPUT_STEP % 2**64)
            data = (ids.astype(np.uint64)[:, None] + places[None, :]).view(np.uint8)[:, : self.row_nbytes]
        return data & 1 if self.dtype == "?" else data  # another byte is no bool

    def make(self, ids: np.ndarray) -> np.ndarray:
        """Return the array of the rows with these ids, C-contiguous."""
        data = np.ascontiguousarray(self.expected_bytes(ids))
        rows = data.view(self.dtype).reshape(len(ids), *self.shape)
        return np.array(np.moveaxis(rows, 0, self.axis), order="C")

    def bytes_of(self, array: np.ndarray) -> np.ndarray:
        """Return the bytes of an array's rows, shape (rows, row_nbytes)."""
        rows = np.ascontiguousarray(np.moveaxis(array, self.axis, 0))
        return rows.reshape(len(rows), int(np.prod(self.shape))).view(np.uint8)


def decode(batch: Sequence[np.ndarray], formats: Sequence[InputFormat], tag: int) -> np.ndarray:
    """Return the ids of a batch's rows after checking that every bit is what they say."""
    ids = formats[0].bytes_of(batch[0])[:, :8].copy().view(np.int64).ravel()
    assert (ids >> TAG_SHIFT == tag).all(), f"rows of another run: tags {set((ids >> TAG_SHIFT).tolist())}, not {tag}"
    for array, form in zip(batch, formats, strict=True):
        assert array.dtype == np.dtype(form.dtype), f"input {form.number}: {array.dtype} instead of {form.dtype}"
        assert np.delete(array.shape, form.axis).tolist() == list(form.shape), f"input {form.number}: {array.shape}"
        found = form.bytes_of(array)
        assert len(found) == len(ids), f"input {form.number} has {len(found)} rows, input 0 has {len(ids)}"
        wrong = np.flatnonzero((found != form.expected_bytes(ids)).any(axis=1))
        assert not len(wrong), f"input {form.number}: rows {wrong[:5]} of {len(ids)} differ, ids {ids[wrong[:5]].tolist()}"
    return ids


@dataclass(frozen=True)
class Faults:
    """What goes wrong in calls. Numbers are requests of a Stream, or calls of each worker of a plain function."""

    folder: str = ""  # marks what has happened once, and when hanging calls may end
    transient: float = 0.0  # share of requests or calls that fail once
    bad: frozenset[int] = frozenset()  # row numbers, or calls, that always fail
    named: bool = False  # raise BadRows, not OSError
    fatal: int | None = None  # this request or call always fails
    hang: int | None = None  # this one hangs, once
    no_data: float = 0.0  # share of calls before which there is no data
    slow: float = 0.0  # share of calls that take some milliseconds
    seed: int = 0

    def once(self, *key: object) -> bool:
        """Return whether this is the first time, in any process."""
        try:
            os.close(os.open(os.path.join(self.folder, "-".join(map(str, key))), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def before(self, number: int, who: int = 0) -> None:
        """Do what goes wrong before a request, or a call of a worker. A request fails once, whichever its stream is."""
        if self.slow and chance(self.seed, "slow", number, who) < self.slow:
            time.sleep(0.005 * chance(self.seed, "how slow", number, who))
        if number == self.fatal:
            raise ValueError("fatal")
        if number == self.hang and self.once("hang"):
            end = time.monotonic() + HANG_SECONDS
            while time.monotonic() < end and not os.path.exists(os.path.join(self.folder, "release")):
                time.sleep(0.01)
            raise OSError("hung until it was released")
        if (
            self.transient
            and number != self.hang
            and chance(self.seed, "fails", number, who) < self.transient
            and self.once("fail", number, who)
        ):
            raise OSError("transient")

    def release(self) -> None:
        """Let hanging calls end."""
        self.once("release")


@dataclass
class Memory:
    """How the arrays of a chunk are returned."""

    kind: str
    formats: tuple[InputFormat, ...]
    buffers: dict[int, list[np.ndarray]] = field(default_factory=dict)
    resident: list[tuple[np.ndarray, list[np.ndarray]]] = field(default_factory=list)

    def give(self, ids: np.ndarray, worker: int, out: list[np.ndarray] | None = None) -> list[np.ndarray]:
        """Return the rows with these ids."""
        if self.kind == "out" and out is not None:
            for array, form in zip(out, self.formats, strict=True):
                array[...] = form.make(ids)
            return out
        if self.kind == "reused":
            return self._reused(ids, worker)
        if self.kind == "resident":  # a slice out of the middle of arrays that stay, and must stay as they are
            around = np.concatenate([ids[:1] + 1, ids, ids[-1:] + 1])
            arrays = [form.make(around) for form in self.formats]
            self.resident.append((around, arrays))
            return [self._slice(array, form, slice(1, len(ids) + 1)) for array, form in zip(arrays, self.formats, strict=True)]
        if self.kind == "strided":
            arrays = [form.make(np.repeat(ids, 2)) for form in self.formats]
            return [self._slice(array, form, slice(None, None, 2)) for array, form in zip(arrays, self.formats, strict=True)]
        if self.kind == "reversed":
            arrays = [form.make(ids[::-1]) for form in self.formats]
            return [self._slice(array, form, slice(None, None, -1)) for array, form in zip(arrays, self.formats, strict=True)]
        arrays = [form.make(ids) for form in self.formats]
        if self.kind == "fortran":
            arrays = [np.asfortranarray(array) for array in arrays]
        for array in arrays:
            array.flags.writeable = self.kind != "read-only"
        return arrays

    def check_resident(self) -> None:
        """Check that the arrays that stay were not written to."""
        for ids, arrays in self.resident:
            for array, form in zip(arrays, self.formats, strict=True):
                same = np.array_equal(form.bytes_of(array), form.expected_bytes(ids))
                assert same, "an array of the fetch function was written to"

    def _reused(self, ids: np.ndarray, worker: int) -> list[np.ndarray]:
        buffers = self.buffers.get(worker)
        if buffers is None or buffers[0].shape[self.formats[0].axis] < len(ids):
            spare = np.concatenate([ids, ids])
            buffers = self.buffers[worker] = [form.make(spare) for form in self.formats]
        views = []
        for buffer, form in zip(buffers, self.formats, strict=True):
            buffer[...] = np.zeros((), buffer.dtype)  # what an earlier call returned is gone now
            views.append(self._slice(buffer, form, slice(len(ids))))
            views[-1][...] = form.make(ids)
        return views

    @staticmethod
    def _slice(array: np.ndarray, form: InputFormat, rows: slice) -> np.ndarray:
        return array[(slice(None),) * form.axis + (rows,)]


class StreamRows:
    """A data source. An id has stream number, epoch and row number."""

    def __init__(self, rows: int, tag: int, memory: Memory, faults: Faults = Faults(), stream: int = 0) -> None:
        self.rows, self.memory, self.faults, self.stream = rows, memory, faults, stream
        self._base = tag << TAG_SHIFT | stream << STREAM_SHIFT

    def __len__(self) -> int:
        return self.rows

    def fetch(self, rows: np.ndarray, request: iw.FetchRequest) -> list[np.ndarray]:
        self.faults.before(request.index)
        if self.faults.bad and (bad := self.faults.bad.intersection(rows.tolist())):
            raise iw.BadRows(sorted(bad), "bad") if self.faults.named else OSError(f"rows {sorted(bad)} are bad")
        ids = rows + (self._base | request.epoch << EPOCH_SHIFT)
        return self.memory.give(ids, request.worker_id, request.out)


class PlainRows:
    """A fetch function of which each worker has calls of its own number and lengths. An id has worker, process, call, row."""

    def __init__(self, tag: int, calls: int, lengths: Sequence[int], memory: Memory, faults: Faults) -> None:
        self.tag, self.calls, self.lengths, self.memory, self.faults = tag, calls, lengths, memory, faults
        self.next_call: dict[int, int] = {}  # by worker; each is used by one thread at a time
        self._waited: dict[int, int] = {}

    def calls_of(self, worker: int) -> int:
        """Return after how many calls a worker raises EndOfData."""
        return int(self.calls * chance(self.faults.seed, "calls", worker))

    def length(self, worker: int, call: int) -> int:
        return self.lengths[int(chance(self.faults.seed, "length", worker, call) * len(self.lengths))]

    def ids(self, worker: int, call: int, process: int = 0) -> np.ndarray:
        """Return the ids of a call's rows."""
        first = self.tag << TAG_SHIFT | worker << WORKER_SHIFT | process << PROCESS_SHIFT | call << CALL_SHIFT
        return np.arange(first, first + self.length(worker, call))

    def expected(self, worker: int) -> np.ndarray:
        """Return the ids of all rows of a worker, in order, with process 0."""
        calls = [call for call in range(self.calls_of(worker)) if call not in self.faults.bad]
        return np.concatenate([np.empty(0, np.int64), *(self.ids(worker, call) for call in calls)])

    def __call__(self, worker_id: int, batch_size: int) -> Any:
        call = self.next_call.setdefault(worker_id, 0)
        if call >= self.calls_of(worker_id):
            raise iw.EndOfData
        if self._waited.get(worker_id) != call and chance(self.faults.seed, "none", worker_id, call) < self.faults.no_data:
            self._waited[worker_id] = call
            return None
        self.faults.before(call, worker_id)
        self.next_call[worker_id] = call + 1
        if call in self.faults.bad:
            raise OSError("bad call")
        # A process that was started in place of a killed one begins anew: its rows are others.
        return self.memory.give(self.ids(worker_id, call, os.getpid() & (1 << PROCESS_BITS) - 1), worker_id)
