"""Fetchers in line for room in the batches, or for their turn, and who of them may go on. Belongs to the assembly's lock."""

from __future__ import annotations

import math
import threading
import time

from input_workers.flow.turns import Parked, Turns
from input_workers.flow.window import Piece, Window
from input_workers.metrics.fetcher_recorder import FetcherRecorder

__all__ = ["Line", "Waiter", "closed_gate"]


def closed_gate() -> threading.Lock:
    """Return a lock that is taken: whoever waits for it is let through once, by a release."""
    gate = threading.Lock()
    gate.acquire()
    return gate


class Waiter:
    """A fetcher in line with a chunk. Its gate is opened once for each time that it is called.

    Attributes:
        chunk: what it places.
        done: rows of the chunk that are reserved.
        pieces: what was reserved in its name while it waited, and is to be copied by it.
    """

    __slots__ = ("chunk", "done", "gate", "is_called", "pieces")

    def __init__(self, chunk: Parked, done: int) -> None:
        self.chunk = chunk
        self.done = done
        self.pieces: list[Piece] = []
        self.is_called = False
        self.gate = closed_gate()

    def wait(self, recorder: FetcherRecorder) -> None:
        """Wait until it is called, and note how long that took. Not under the lock."""
        so_far, started = recorder.blocked[0], time.monotonic()
        recorder.blocked = so_far, started
        self.gate.acquire()
        now = time.monotonic()
        recorder.blocked = so_far + now - started, math.inf
        if (trace := recorder.trace) is not None:
            trace.add("waiting for room", started, now)


class Line:
    """Those who wait, in the order in which they came. Not thread-safe.

    Args:
        window: where there is room, or not.
        turns: in which order rows are reserved; None: first come, first served.

    Attributes:
        waiters: those in line; the same list for good, so that a look at it costs nothing.
    """

    def __init__(self, window: Window, turns: Turns | None) -> None:
        self._window = window
        self._turns = turns
        self.waiters: list[Waiter] = []

    def join(self, waiter: Waiter | None, chunk: Parked, done: int) -> Waiter:
        """Return the caller's place in line, ready to be waited for."""
        if waiter is None:
            waiter = Waiter(chunk, done)
            self.waiters.append(waiter)
        waiter.is_called = bool(waiter.pieces)
        if waiter.is_called:
            waiter.gate.release()
        return waiter

    def leave(self, waiter: Waiter | None, closed: bool) -> None:
        """The caller waits no longer; call who can go on now."""
        if waiter in self.waiters:
            self.waiters.remove(waiter)
        self.call(closed)

    def call(self, closed: bool) -> None:
        """Call those who can go on; all of them, when closed."""
        if self._turns is None and not closed:
            self._serve()
            return
        for waiter in self.waiters:
            if closed or self._can_go_on(waiter):
                self._call(waiter)

    def _serve(self) -> None:
        """Reserve rows for those in line, first come, first served, so that the line is as short as there is room.

        One that gets room for some of its rows goes to the end of the line: several fetchers with chunks of many batches then
        copy at the same time, each into the batches that it was given.
        """
        while self.waiters:
            waiter = self.waiters[0]
            arrays, rows, nbytes, request = waiter.chunk
            pieces = self._window.reserve(arrays, rows, waiter.done, nbytes, request)
            if not pieces:
                return
            waiter.pieces += pieces
            waiter.done += sum(stop - begin for _, begin, stop in pieces)
            del self.waiters[0]
            if waiter.done < rows:
                self.waiters.append(waiter)
            self._call(waiter)

    def _call(self, waiter: Waiter) -> None:
        if not waiter.is_called:
            waiter.is_called = True
            waiter.gate.release()

    def may_enter(self, waiter: Waiter | None, chunk: Parked, done: int) -> bool:
        """Whether rows may be reserved for this chunk: it is its turn, and no one is before it."""
        if self._turns is None:
            return not self.waiters
        if not self._turns.is_next(chunk.request) or self._must_wait_in_turn(chunk.rows - done, chunk.nbytes):
            return False
        before = self.waiters if waiter is None else self.waiters[: self.waiters.index(waiter)]
        return not any(self._turns.is_next(other.chunk.request) for other in before)

    def fits_aside(self, chunk: Parked) -> bool:
        """Whether a chunk that comes before its turn may be parked, within the bounds. Its room is taken then."""
        if self._turns is None or not self._turns.ordered or self._turns.is_next(chunk.request):
            return False
        if self._exceeds_bounds(chunk.rows, chunk.nbytes):
            return False
        self._turns.announce(chunk.request, self._window.weight_of(chunk.rows), chunk.nbytes)
        return True

    def pass_turn(self) -> Parked | None:
        """A chunk has had its turn: end the epochs that end with it, and return the parked chunk whose turn is next."""
        if self._turns is None:
            return None
        for epoch in self._turns.pass_turn():
            self._window.end_epoch(epoch)
        return self._turns.next_parked()

    def _can_go_on(self, waiter: Waiter) -> bool:
        _, rows, nbytes, request = waiter.chunk
        if self._turns is not None and not self._turns.is_next(request):
            return self._turns.ordered  # it may fit aside now, or come after a request that failed
        return self._window.has_room(nbytes) and not self._must_wait_in_turn(rows, nbytes)

    def _must_wait_in_turn(self, rows: int, nbytes: int) -> bool:
        """Whether a chunk whose turn it is must wait, because it and the parked ones together exceed the bounds.

        Parked chunks alone never hold it up: they wait for it.
        """
        if self._turns is None or not self._turns.ordered or not self._window.has_full:
            return False
        return self._exceeds_bounds(rows, nbytes)

    def _exceeds_bounds(self, rows: int, nbytes: int) -> bool:
        """Whether a chunk, with full batches and parked chunks, exceeds the bounds, which leave out the batch being filled."""
        parked, parked_nbytes = self._turns.parked if self._turns is not None else (0, 0)
        weight = self._window.weight_of(rows) if rows else 0
        return self._window.is_beyond(parked + weight, parked_nbytes + nbytes)
