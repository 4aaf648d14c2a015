"""Calls of a function that returns few rows at a time, whose small chunks are sent as one. Runs in a worker process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.fetchers.call_account import CallAccount, CallReport
from input_workers.fetchers.frames import INLINE, Link
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
        link: to the parent, for rows that are sent late.
        account: of the calls' times.
    """

    # Invariant under _lock: `_rows` holds rows of calls that have returned and were not sent; `_owed` says that an answer is
    # owed, until one of the two threads sends it.

    def __init__(self, fetch: Callable[[int, int], Any], worker_id: int, link: Link, account: CallAccount) -> None:
        self._fetch = fetch
        self._worker_id = worker_id
        self._link = link
        self._account = account
        self._lock = threading.Lock()
        self._rows = PackedRows()
        self._layout: list[tuple[np.dtype[Any], tuple[int, ...]]] = []
        self._owed = False
        self._seconds = 0.0
        self._kept: tuple[Any, BaseException | None, float] | None = None  # result or error of a call, and its seconds
        self._packing = threading.Event()
        self._late: threading.Thread | None = None

    def next(self, batch_size: int) -> Any:
        """Return the next answer, or SENT. Raises what the function raises."""
        if self._kept is not None:
            self._account.took(self._kept[2])
        else:
            packed = self._pack(batch_size)
            if packed is not None:
                return packed
        assert self._kept is not None  # noqa: S101  no rows come before this call's
        (result, error, _), self._kept = self._kept, None
        if error is not None:
            raise error
        return result

    def _pack(self, batch_size: int) -> Any:
        """Make calls, and return their rows, or SENT; None: there are none. Keeps any other result."""
        started = before = time.monotonic()
        with self._lock:
            self._owed = True
        while True:
            result: Any = None
            error: BaseException | None = None
            try:
                result = self._fetch(self._worker_id, batch_size)
            except BaseException as raised:
                error = raised
            now = time.monotonic()
            layout = _layout_of(result)
            with self._lock:
                if layout and self._owed and (not self._rows.rows or layout == self._layout):
                    self._layout = layout
                    self._rows.add(result, len(result[0]))
                    self._seconds = now - started
                    if self._rows.rows >= BLOCK_ROWS or self._seconds >= PACK_SECONDS:
                        return self._take()
                    self._watch()
                    before = now
                    continue
                self._kept = result, error, now - before  # of the last call; those before it have returned rows
                if not self._owed:
                    return SENT  # those rows, in this one's place
                if self._rows.rows:
                    self._account.took(before - started)
                    return self._take()
                self._owed = False
                return None

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
        if not self._packing.is_set():
            self._packing.set()

    def _send_late(self) -> None:
        while self._packing.wait():
            time.sleep(LATE_SECONDS)
            with self._lock:
                if not self._owed or not self._rows.rows or not self._packing.is_set():
                    continue
                # What the function's thread counts is told with its next answer.
                report: CallReport = self._seconds, 0.0, 0.0, 0.0, (), ()
                try:
                    self._link.send((INLINE, self._take(), report))
                except OSError:  # the parent is gone, as the other thread will see
                    return


def _layout_of(result: Any) -> list[tuple[np.dtype[Any], tuple[int, ...]]]:
    """Return what a row of a small chunk looks like; empty if it is none."""
    if type(result) not in (list, tuple) or not result:
        return []
    if not all(type(array) is np.ndarray and array.ndim and not array.dtype.hasobject for array in result):
        return []
    rows = {len(array) for array in result}
    if len(rows) > 1 or not rows.pop() or sum(array.nbytes for array in result) >= PACK_BELOW_NBYTES:
        return []
    return [(array.dtype, array.shape[1:]) for array in result]
