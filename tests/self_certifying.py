"""Rows that certify themselves, and the witness that reads them. It shares no code with the product.

Every row of every array carries (source, worker, call, row, rows of its chunk, array index, checksum), so that loss,
repeats, tears, mix-ups and reordering show in the delivered data alone.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

FIELDS = 7
SOURCE, WORKER, CALL, ROW, OF, ARRAY, CHECKSUM = range(FIELDS)
_PRIMES = np.array([1_000_003, 998_244_353, 754_974_721, 167_772_161, 469_762_049, 104_857_601], np.int64)


def _checksums(rows: np.ndarray) -> np.ndarray:
    return np.bitwise_xor.reduce((rows[:, :CHECKSUM] + 1) * _PRIMES, axis=1) & 0x7FFF_FFFF_FFFF


def make_array(source: int, worker: int, call: int, rows: int, index: int) -> np.ndarray:
    """Return `rows` rows of one input, shape (rows, FIELDS)."""
    array = np.empty((rows, FIELDS), np.int64)
    array[:, SOURCE], array[:, WORKER], array[:, CALL], array[:, ARRAY] = source, worker, call, index
    array[:, ROW], array[:, OF] = np.arange(rows), rows
    array[:, CHECKSUM] = _checksums(array)
    return array


def make_chunk(
    worker: int, call: int, rows: int, source: int = 0, inputs: int = 2, axes: Sequence[int] = ()
) -> list[np.ndarray]:
    """Return a chunk: one array per input, its rows along that input's batch axis."""
    arrays = [make_array(source, worker, call, rows, index) for index in range(inputs)]
    for index, axis in enumerate(axes):
        if axis:
            arrays[index] = np.ascontiguousarray(arrays[index].T)
    return arrays


def check_batch(batch: Sequence[Any], rows: int | None = None, axes: Sequence[int] = ()) -> np.ndarray:
    """Return (source, worker, call, row, of) of each row after checking size, checksums and that no row is torn."""
    arrays = [np.asarray(array) for array in batch]
    for index, axis in enumerate(axes):
        if axis:
            arrays[index] = arrays[index].T
    for index, array in enumerate(arrays):
        assert array.dtype == np.int64, f"array {index}: {array.dtype}"
        assert array.ndim == 2, f"array {index}: {array.shape}"
        assert array.shape[1] == FIELDS, f"array {index}: {array.shape}"
        assert rows is None or len(array) == rows, f"array {index} has {len(array)} rows, wanted {rows}"
        assert (array[:, ARRAY] == index).all(), f"array {index} holds rows of arrays {set(array[:, ARRAY].tolist())}"
        assert (array[:, CHECKSUM] == _checksums(array)).all(), f"array {index}: a row was changed"
        assert len(array) == len(arrays[0]), f"unequal rows: {[len(each) for each in arrays]}"
        assert (array[:, :ARRAY] == arrays[0][:, :ARRAY]).all(), f"torn: array {index} differs from array 0"
    return arrays[0][:, :ARRAY]


class Witness:
    """Sees the batches of a source one after the other and objects to the first row that is out of place.

    Args:
        source: whose rows these must be.
        axes: the batch axis of each input.
    """

    def __init__(self, source: int = 0, axes: Sequence[int] = ()) -> None:
        self.source = source
        self.rows = 0
        self._axes = tuple(axes)
        self._last: dict[int, tuple[int, int, int]] = {}
        self._may_jump: set[int] = set()

    def see(self, batch: Any, rows: int | None = None) -> np.ndarray:
        """Check a batch against all that came before; return its certificates."""
        seen = check_batch(batch, rows, self._axes)
        for source, worker, call, row, of in seen.tolist():
            assert source == self.source, f"a row of source {source} in {self.source}"
            last_call, last_row, last_of = self._last.get(worker, (-1, 0, 1))
            after = (last_call, last_row + 1) if last_row + 1 < last_of else (last_call + 1, 0)
            if worker in self._may_jump:
                assert (call, row) >= after, f"worker {worker}: {(call, row)} after {(last_call, last_row)}"
                self._may_jump.discard(worker)
            else:
                assert (call, row) == after, f"worker {worker}: {(call, row)} where {after} was next"
            self._last[worker] = (call, row, of)
        self.rows += len(seen)
        return seen

    def gap(self, workers: Sequence[int]) -> None:
        """A stop, or a declared drop, may lie before the next row of each of these workers."""
        self._may_jump |= set(workers)

    def assert_complete(self) -> None:
        """Every chunk that was begun was seen to its end."""
        cut = {worker: last for worker, last in self._last.items() if last[1] + 1 != last[2]}
        assert not cut, f"chunks cut short: {cut}"


class CertifiedFetch:
    """A fetch function: each worker returns chunks of these lengths, then `end()`.

    `made` counts the rows returned, per worker.
    """

    def __init__(
        self,
        lengths: Callable[[int, int], int | None],
        end: Callable[[], Any],
        source: int = 0,
        inputs: int = 2,
        axes: Sequence[int] = (),
    ) -> None:
        self._lengths, self._end = lengths, end
        self._source, self._inputs, self._axes = source, inputs, tuple(axes)
        self._calls: collections.Counter[int] = collections.Counter()
        self._lock = threading.Lock()
        self.made: collections.Counter[int] = collections.Counter()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}  # for another process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._lock = threading.Lock()

    def __call__(self, worker_id: int, batch_size: int) -> Any:
        with self._lock:
            call = self._calls[worker_id]
            rows = self._lengths(worker_id, call)
            if rows is None:
                return self._end()
            self._calls[worker_id] += 1
            self.made[worker_id] += rows
        return make_chunk(worker_id, call, rows, self._source, self._inputs, self._axes)
