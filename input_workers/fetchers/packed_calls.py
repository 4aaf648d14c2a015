"""Calls of a function that returns few rows at a time: many small chunks go in, one comes out. Runs in a worker process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.packed_rows import BLOCK_ROWS, PACK_BELOW_NBYTES, PackedRows

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SENT", "PackedCalls"]

# Calls are made for one answer for so long, and rows wait for a slow call to return for so long.
PACK_SECONDS = 0.001
LATE_SECONDS = 0.005

SENT = object()  # the answer was sent already


class PackedCalls:
    """Makes calls until there is enough to send. `next` belongs to one thread.

    Rows never wait for a call that takes long: a thread sends them, and what that call returns is the next answer.

    Args:
        fetch: the function.
        worker_id: its first argument.
        send: sends packed rows, and how long their calls took.
        took: told how long those calls took of which `next` returns what came, or raises it.
    """

    # Invariant under _lock: `_rows` holds rows of calls that have returned and were not sent; `_owed` says that an answer is
    # owed, which whoever sends it takes.

    def __init__(
        self,
        fetch: Callable[[int, int], Any],
        worker_id: int,
        send: Callable[[Sequence[NDArray[Any]], float], None],
        took: Callable[[float], object],
    ) -> None:
        self._fetch = fetch
        self._worker_id = worker_id
        self._send = send
        self._took = took
        self._lock = threading.Lock()
        self._rows = PackedRows()
        self._layout: list[tuple[np.dtype[Any], tuple[int, ...]]] = []
        self._owed = False
        self._seconds = 0.0
        self._kept: list[tuple[Callable[[], Any], float]] = []  # what is to be the next answer, and how long its call took
        self._packing = threading.Event()
        self._late: threading.Thread | None = None

    def next(self, batch_size: int) -> Any:
        """Return the next answer, or SENT. Raises what the function raises."""
        if self._kept:
            answer, seconds = self._kept.pop()
            self._took(seconds)
            return answer()
        started = before = time.monotonic()
        with self._lock:
            self._owed = True
        while True:
            try:
                result = self._fetch(self._worker_id, batch_size)
            except BaseException as error:
                answer = self._raising(error)
                break
            now = time.monotonic()
            rows = self._rows_of(result)
            with self._lock:
                if rows and self._owed and (not self._rows.rows or self._layout_of(result) == self._layout):
                    if not self._rows.rows:
                        self._layout = self._layout_of(result)
                    self._rows.add(result, rows)
                    self._seconds = now - started
                    if self._rows.rows < BLOCK_ROWS and now - started < PACK_SECONDS:
                        if self._late is None or not self._packing.is_set():
                            self._watch()
                        before = now
                        continue
                    return self._take()
            answer = _returning(result)
            break
        seconds = time.monotonic() - before  # of the last call; those before it have returned rows
        with self._lock:
            if self._owed and self._rows.rows:
                self._kept.append((answer, seconds))
                self._took(before - started)
                return self._take()
            owed, self._owed = self._owed, False
        if owed:
            return answer()
        self._kept.append((answer, seconds))  # the rows before it were sent late, in this one's place
        return SENT

    def _take(self) -> Sequence[NDArray[Any]]:
        """Return the packed rows as the answer. The lock is held."""
        chunk = self._rows.take()
        assert chunk is not None  # noqa: S101  there are rows
        self._owed = False
        self._packing.clear()
        return chunk[0]

    def _watch(self) -> None:
        """Have the other thread look after the rows. The lock is held."""
        if self._late is None:
            self._late = threading.Thread(target=self._send_late, name="late-rows", daemon=True)
            self._late.start()
        self._packing.set()

    def _send_late(self) -> None:
        while self._packing.wait():
            time.sleep(LATE_SECONDS)
            with self._lock:
                if not self._owed or not self._rows.rows or not self._packing.is_set():
                    continue
                arrays, seconds = self._take(), self._seconds
                try:
                    self._send(arrays, seconds)
                except OSError:  # the parent is gone, as the other thread will see
                    return

    def _raising(self, error: BaseException) -> Callable[[], Any]:
        def answer() -> Any:
            raise error

        return answer

    def _rows_of(self, result: Any) -> int:
        """Return the rows of a small chunk; 0 if it is none."""
        if type(result) not in (list, tuple) or not result:
            return 0
        if not all(type(array) is np.ndarray and array.ndim and not array.dtype.hasobject for array in result):
            return 0
        if sum(array.nbytes for array in result) >= PACK_BELOW_NBYTES:
            return 0
        rows = {len(array) for array in result}
        return rows.pop() if len(rows) == 1 else 0

    def _layout_of(self, result: Sequence[NDArray[Any]]) -> list[tuple[np.dtype[Any], tuple[int, ...]]]:
        return [(array.dtype, array.shape[1:]) for array in result]


def _returning(result: Any) -> Callable[[], Any]:
    return lambda: result
