"""The bounded queue between fetchers and enqueuer: chunks of any size go in, all that wait come out at once.

A chunk is charged to the bounds from `put` until the enqueuer says that it was copied (`release`). A fetcher whose chunk
does not fit leaves it at the door; whoever makes room lets it in and wakes that fetcher alone, in the order of arrival.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from input_workers.contracts import Chunk
from input_workers.flow.turns import Turns, is_end_mark
from input_workers.lifecycle import WakeUp
from input_workers.packed_rows import PackedRows

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ChunkQueue"]

# Waking a fetcher costs a hand-over of some 20 us. At high rates, doing so for each batch would take a tenth of the time;
# at low ones, a fetcher that waits while there is room is lost. So: not more often than this, unless the queue runs low.
ADMIT_INTERVAL_SECONDS = 0.004


class _Waiter:
    """A chunk at the door. `gate` is opened once, when `accepted` is decided."""

    __slots__ = ("accepted", "chunk", "gate", "spent")

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.accepted = False
        self.spent: list[Any] = []
        self.gate = threading.Lock()
        self.gate.acquire()


class ChunkQueue:
    """Closable, weighed, first in first out, or in the order of the requests. Any number of putters, one taker.

    In order: a chunk that comes before its turn is parked, charged to the bounds; the one whose turn it is never waits for
    those, so that a slow request holds back what the bounds allow, and no more.

    Args:
        max_weight: bound on waiting rows (chunks where `by_rows` is False). One chunk larger than that passes alone.
        max_nbytes: bound on waiting bytes, or None.
        wake: gets a token when the taker, having found too little, should look again.
        by_rows: whether a chunk weighs its rows or 1.
        ordered: chunks leave in the order of their requests' ordinals.
        requests_in: keep epochs apart: chunks of the next epoch wait until so many of the current one entered; then an
            end mark, a chunk of 0 rows, follows them.
        first_epoch: the epoch of the first request.
        pack_below_nbytes: smaller chunks may be given to `pack`.

    Attributes:
        closed: nothing more enters.
    """

    # Invariant under _lock: `_weight` and `_nbytes` are those of the waiting chunks and of the taken ones (`_taken`) that
    # are not yet released; a chunk enters only within the bounds, or when it is its turn and nothing but parked chunks is
    # charged; `_door` holds nothing that
    # could enter, but shortly after a release; when closed, nothing enters and the door is empty.
    # Packed rows are the newest ones and are made a chunk before anything follows them. `_open` is false as soon as an
    # offer needs a closer look: closed, somebody at the door, or epochs to keep apart.

    def __init__(
        self,
        max_weight: int,
        max_nbytes: int | None,
        wake: WakeUp,
        *,
        by_rows: bool = True,
        ordered: bool = False,
        requests_in: Callable[[int], int] | None = None,
        first_epoch: int = 0,
        pack_below_nbytes: int = 0,
    ) -> None:
        self.max_weight = max_weight
        self.pack_below_nbytes = pack_below_nbytes
        self._max_nbytes = math.inf if max_nbytes is None else max_nbytes
        self._wake = wake
        self._by_rows = by_rows
        self._turns = Turns(ordered, requests_in, first_epoch)
        self._lock = threading.Lock()
        self._chunks: list[Chunk] = []
        self._packed = PackedRows()
        self._door: list[_Waiter] = []
        self._admitted = 0.0  # when a release last let somebody in
        self._spent: list[Any] = []  # chunks that were copied and not yet freed
        self._spent_weight = 0
        self._spent_nbytes = 0
        self._weight = 0
        self._nbytes = 0
        self._taken = 0  # weight of the chunks taken and not yet released
        self._wake_at: float = math.inf  # the taker sleeps until this much weight is charged
        self.closed = False
        self._aborted = False
        self._open = not self._turns.matter
        self._parked_weight = 0
        self._at_barrier = False  # somebody calls what the barrier is for
        self._chunks += self._turns.end_marks()
        self._epoch_ended = bool(self._chunks)  # an end mark waits

    def offer(self, chunk: Chunk) -> bool:
        """Put the chunk if there is room at once and nobody waits; the cheap half of putting."""
        with self._lock:
            spent = self._reclaim() if self._spent else None
            weight = self._weight + (chunk[1] if self._by_rows else 1)
            nbytes = self._nbytes + chunk[2]
            if weight > self.max_weight or nbytes > self._max_nbytes or not self._open:
                return False
            if self._packed.rows:
                self._seal()
            self._chunks.append(chunk)
            self._weight = weight
            self._nbytes = nbytes
            wake = weight >= self._wake_at
            if wake:
                self._wake_at = math.inf
        if wake:
            self._wake.put(None)
        del spent  # freed here, in the fetcher's thread and outside the lock
        return True

    def pack(self, arrays: Sequence[NDArray[Any]], rows: int, nbytes: int) -> bool:
        """Copy a small chunk's rows behind those of the one before, if there is room at once and nobody waits.

        Handing over a chunk costs as much as copying some kilobytes; a block of many is handed over once. Only where
        rows are weighed and lie along axis 0.
        """
        with self._lock:
            spent = self._reclaim() if self._spent else None
            weight = self._weight + rows
            if weight > self.max_weight or self._nbytes + nbytes > self._max_nbytes or not self._open:
                return False
            if self._packed.is_full():
                self._seal()
            self._packed.add(arrays, rows)
            self._weight = weight
            self._nbytes += nbytes
            wake = weight >= self._wake_at
            if wake:
                self._wake_at = math.inf
        if wake:
            self._wake.put(None)
        del spent
        return True

    def put(self, chunk: Chunk) -> bool:
        """Put the chunk, waiting for room; False: the queue was closed and did not take it.

        Where requests have their turn, one that has no rows at all is put too, as a chunk of 0 rows.
        """
        waiter = _Waiter(chunk)
        with self._lock:
            if self.closed or self._turns.is_barred(chunk):
                return False
            waiter.spent = self._reclaim()
            self._door.append(waiter)
            self._admit()
            # One who waits at the door wakes the taker, even if no batch is complete: what it took may be copied.
            wake = self._wake_at != math.inf and (bool(self._door) or self._is_enough())
            if wake:
                self._wake_at = math.inf
        if wake:
            self._wake.put(None)
        waiter.spent.clear()
        self._break_at_barrier()
        waiter.gate.acquire()
        return waiter.accepted

    def put_barrier(self, ordinal: int, reached: Callable[[], object]) -> None:
        """Take nothing from this request on; call `reached`, once, when all before it have entered, or nothing will any more.

        Of several, the earliest request's is called first.
        """
        with self._lock:
            self._turns.set_bar(ordinal, reached)
            for waiter in [each for each in self._door if self._turns.is_barred(each.chunk)]:
                self._door.remove(waiter)
                waiter.gate.release()
        self._break_at_barrier()

    def _break_at_barrier(self, ended: bool = False) -> None:
        """Call what the barriers are for, outside the lock, if they are reached."""
        while self._turns.has_bars:
            with self._lock:
                if self._at_barrier:  # whoever is at it calls these too, after the earlier ones
                    return
                due = self._turns.reached_bars(ended or self.closed)
                self._at_barrier = bool(due)
            if not due:
                return
            for reached in due:
                reached()
            with self._lock:
                self._at_barrier = False

    def take(self, wanted: int) -> list[Chunk]:
        """Return all waiting chunks; nothing if they weigh less than `wanted`, and then a token follows when they do.

        Less than `wanted` is returned when somebody waits at the door, at the end of an epoch, or when closed.
        """
        with self._lock:
            left = self._reclaim()
            if self._door and not self._chunks:
                self._admit()
            self._wake_at = self._taken + wanted
            if (self._chunks or self._packed.rows) and (self._door or self.closed or self._is_enough()):
                self._wake_at = math.inf
                self._seal()
                chunks, self._chunks = self._chunks, []
                self._taken = self._weight - self._parked_weight
                self._epoch_ended = False
            else:
                chunks = []
        del left
        self._break_at_barrier()
        return chunks

    def release(self, chunks: list[Any], rows: int, nbytes: int) -> None:
        """The taker has copied these chunks, and keeps no reference to them. Lets in those at the door, now or soon.

        Giving a large chunk's memory back takes as long as copying it. So the next fetcher that comes does that, in its
        own thread; what none has come for until the next release is freed here. Until then it stays charged.
        """
        with self._lock:
            left = self._reclaim()
            if self._aborted:  # nobody will come for them
                return
            self._spent = chunks
            self._spent_weight = rows if self._by_rows else len(chunks)
            self._spent_nbytes = nbytes
            if self._door:
                now = time.monotonic()
                runs_low = (self._weight - self._parked_weight) * 4 <= self.max_weight
                if runs_low or now - self._admitted >= ADMIT_INTERVAL_SECONDS:
                    self._admitted = now
                    self._door[0].spent = self._reclaim()
                    self._admit()
        del left
        self._break_at_barrier()

    def close(self) -> None:
        """Take no more chunks; those that wait can still be taken. Those at the door are refused."""
        self._break_at_barrier(ended=True)
        with self._lock:
            self._refuse()
        self._wake.put(None)

    def abort(self) -> int:
        """Close, and forget the waiting chunks; return their rows."""
        self._break_at_barrier(ended=True)
        with self._lock:
            self._refuse()
            self._seal()
            rows = sum(chunk[1] for chunk in (*self._chunks, *self._turns.give_up()))
            spent = self._reclaim()
            self._chunks = []
            self._aborted = True
        del spent
        self._wake.put(None)
        return rows

    @property
    def drained(self) -> bool:
        """Whether it is closed and every chunk was taken."""
        with self._lock:
            return self.closed and not self._chunks and not self._packed.rows

    @property
    def charged(self) -> tuple[int, int]:
        """Weight and bytes that wait, or were taken and are not yet copied; nothing after an abort."""
        with self._lock:
            return (0, 0) if self._aborted else (self._weight, self._nbytes)

    def _reclaim(self) -> list[Any]:
        """Uncharge the spent chunks and return them to whoever frees them, outside the lock."""
        spent = self._spent
        if spent:
            self._spent = []
            self._weight -= self._spent_weight
            self._taken -= self._spent_weight
            self._wake_at -= self._spent_weight
            self._nbytes -= self._spent_nbytes
        return spent

    def _is_enough(self) -> bool:
        return self._weight - self._parked_weight >= self._wake_at or self._epoch_ended

    def _seal(self) -> None:
        """Make the packed rows a chunk."""
        block = self._packed.take()
        if block is not None:
            self._chunks.append(block)

    def _refuse(self) -> None:
        self.closed = True
        self._open = False
        for waiter in self._door:
            waiter.gate.release()
        self._door = []

    def _admit(self) -> None:
        """Let in whoever may enter: in the order of arrival until one does not fit, or of the requests."""
        turns = self._turns
        index = 0
        while index < len(self._door):
            waiter = self._door[index]
            chunk = waiter.chunk
            is_next = turns.is_next(chunk)
            weight = self._weight_of(chunk)
            fits = self._weight + weight <= self.max_weight and self._nbytes + chunk[2] <= self._max_nbytes
            if turns.ordered:  # what is parked holds up nobody whose turn it is
                enters = fits or (is_next and self._weight == self._parked_weight)
            elif is_next and self._weight and not fits:
                break
            else:
                enters = is_next
            if not enters:
                index += 1  # one whose turn it is may stand behind it
                continue
            self._seal()
            del self._door[index]
            self._weight += weight
            self._nbytes += chunk[2]
            waiter.accepted = True
            waiter.gate.release()
            if is_next:
                entered = turns.enter(chunk)
                self._chunks += entered
                self._parked_weight -= sum(map(self._weight_of, entered)) - weight
                self._epoch_ended = self._epoch_ended or any(map(is_end_mark, entered))
                if turns.matter:
                    index = 0  # those that were passed over may be next now
            else:
                turns.park(chunk)
                self._parked_weight += weight
        self._open = not self._door and not self.closed and not turns.matter

    def _weight_of(self, chunk: Chunk) -> int:
        return chunk[1] if self._by_rows else min(chunk[1], 1)
