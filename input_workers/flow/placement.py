"""Where fetchers put rows together to batches: they reserve rows, copy their chunks there, and mark them as done.

The enqueuer lays out empty batches and takes the oldest one when its last row is in place. A fetcher reserves the next rows
under the lock and copies outside it. So each row is copied once, by the thread that fetched it, and several threads copy at
the same time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from input_workers.contracts import FetchRequest
from input_workers.flow.batches import BatchRules, KeepAside, OpenBatch, Unplaced, adoptable
from input_workers.flow.line import Line, Waiter
from input_workers.flow.turns import Parked, Turns
from input_workers.flow.window import Piece, Window
from input_workers.lifecycle import WakeUp
from input_workers.metrics.fetcher_recorder import FetcherRecorder
from input_workers.packed_rows import BLOCK_ROWS, PACK_BELOW_NBYTES, PackedRows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from input_workers.errors import Failure

__all__ = ["Placement"]


class Placement:
    """The fetchers' half of the assembly. Thread-safe.

    Args:
        rules: how rows become batches.
        window: the batches.
        turns: in which order rows are reserved; None: first come, first served.
        keep_aside: copies a chunk that is kept until its turn, or is a batch of its own.
        wake: gets a token when the enqueuer, having found nothing to do, should look again.

    Attributes:
        closed: no more rows are reserved.
        pack_below_nbytes: smaller chunks may be given to `pack`.
    """

    # Invariant under _lock: those in `_line` are served in their order, or by turn; a newcomer never overtakes one of them.
    # Every reserved row is in a batch of the window or in one that was taken; parked rows are in `_turns`. When closed,
    # nothing is reserved, nothing is parked and nobody stays in line.
    # The lock is re-entrant, because a signal handler may stop the source while the same thread is in here.

    def __init__(self, rules: BatchRules, window: Window, turns: Turns | None, keep_aside: KeepAside, wake: WakeUp) -> None:
        self.closed = False
        is_flat = not any(rules.batch_axes)
        self.pack_below_nbytes = PACK_BELOW_NBYTES if rules.rebatch and is_flat and turns is None else 0
        self._axes = None if is_flat else rules.batch_axes
        self._rebatch = rules.rebatch
        self._window = window
        self._turns = turns
        self._keep_aside = keep_aside
        self._wake = wake
        self._lock = threading.RLock()
        self._line = Line(window, turns)
        self._waiters = self._line.waiters
        self._packed: tuple[PackedRows, OpenBatch, int] | None = None  # rows, their batch, where they begin
        self._is_watched = False  # a token is put when the enqueuer has something to do
        self._is_idle = False  # the enqueuer found nothing to send
        self._gates: list[threading.Lock] = []  # of those in `await_sent`
        for epoch in turns.ended_epochs() if turns is not None else ():
            window.end_epoch(epoch)

    # ---- fetchers

    def may_keep(self, rows: int, request: FetchRequest | None) -> bool:
        """Whether a chunk may be kept as it is instead of being copied. A hint: looked at without the lock."""
        if not self._rebatch:
            return True
        batch = self._window.current
        if batch is None or not batch.filled:
            # It may become the next batch, which is empty, or is laid out while the fetcher waits.
            batch_rows, target = self._window.latest if batch is None else (batch.rows, batch.target)
            if target is None:  # none was laid out yet
                return True
            if rows == batch_rows:
                return target.chunk_alignment is not None
        return self._turns is not None and self._turns.ordered and not self._turns.is_next(request)

    def pack(self, arrays: Sequence[NDArray[Any]], rows: int) -> bool:
        """Reserve rows for a small chunk and note its bytes, if there is room at once; False: `place` it.

        Copying many small chunks into a batch at once takes a third of the time of copying each of them. Their rows are
        reserved like any others, so nothing is held back: who completes a batch copies the noted rows into it.
        """
        with self._lock:
            batch, packed = self._window.current, self._packed
            if batch is None or self._waiters or self.closed:
                return False
            end = batch.filled + rows
            if end > batch.rows:
                return False
            if packed is None:
                batch.take_memory()
                packed = self._packed = PackedRows(), batch, batch.filled
            small = packed[0]
            if not small.rows:
                small.add(arrays, rows)
            else:  # the same without a call, which is a tenth of the time of a small chunk
                append = small.pieces.append
                for array in arrays:
                    append(array.tobytes())
                small.rows += rows
            batch.filled = end
            wake = False
            if end == batch.rows:
                self._window.go_on()
                wake = self._should_wake()
            elif small.rows < BLOCK_ROWS:
                return True
            self._packed = None
        if wake:
            self._wake.put(None)
        error = self._unpack(packed)
        if error is not None:  # the rows are reserved, and so accounted for with the batch that is broken
            raise error
        return True

    def place(
        self,
        arrays: Sequence[NDArray[Any]],
        rows: int,
        nbytes: int,
        request: FetchRequest | None,
        ours: Sequence[bool] | None,
        recorder: FetcherRecorder,
    ) -> Unplaced | None:
        """Copy a chunk's rows into the next rows of the batches, waiting for room and for its turn.

        Args:
            arrays: one for each input.
            rows: how many rows they have.
            nbytes: their bytes.
            request: of a Stream.
            ours: for each array, whether nothing else refers to its memory, so that it may be kept. Only looked at where
                `may_keep` said so.
            recorder: of the fetcher: what it waits for is noted there.

        Returns:
            None when all rows are in place; else what is not: the assembly was closed, or copying failed.
        """
        if self._turns is not None or not self._rebatch:
            return self._place_slowly(Parked(arrays, rows, nbytes, request), ours, recorder)
        wake = False
        with self._lock:  # the common case: room for all of it, in one batch, at once
            batch = self._window.current
            if batch is None or batch.filled + rows > batch.rows or self._waiters or self.closed:
                batch = None
            else:
                packed, self._packed = self._packed, None
                if rows < batch.rows:
                    batch.take_memory()  # else the chunk may become the batch itself
                begin = batch.reserve(rows, request, 0)
                if batch.filled == batch.rows:
                    self._window.go_on()
                    wake = self._should_wake()
        if batch is None:
            return self._place_slowly(Parked(arrays, rows, nbytes, request), ours, recorder)
        if wake:
            self._wake.put(None)
        error = self._unpack(packed) or self._fill((batch, begin, begin + rows), arrays, 0, rows, ours)
        return None if error is None else Unplaced(0, error)

    def _place_slowly(self, chunk: Parked, ours: Sequence[bool] | None, recorder: FetcherRecorder) -> Unplaced | None:
        """Place a chunk that does not fit at once, or where order matters. Also places parked chunks that follow it."""
        waiter: Waiter | None = None
        following: Parked | None = None
        done = 0  # rows of the chunk that are reserved
        if not self._rebatch and chunk.rows:
            try:  # the chunk becomes a batch, so all of it must be in memory of our own
                chunk, ours = chunk._replace(arrays=self._owned(chunk, ours)), None
            except BaseException as raised:
                return Unplaced(chunk.rows, raised)
        while True:
            pieces: list[Piece] = []
            packed, is_parked = None, False
            with self._lock:
                is_refused = self.closed or (self._turns is not None and self._turns.is_barred(chunk.request))
                if self._turns is None and waiter is not None:  # rows were reserved for it while it waited
                    pieces, waiter.pieces, done = waiter.pieces, [], waiter.done
                    may_enter = True
                else:
                    may_enter = not is_refused and self._line.may_enter(waiter, chunk, done)
                    if may_enter:
                        packed, self._packed = self._packed, None
                        pieces = self._window.reserve(chunk.arrays, chunk.rows, done, chunk.nbytes, chunk.request)
                        done += sum(stop - begin for _, begin, stop in pieces)
                    is_parked = not may_enter and not is_refused and self._line.fits_aside(chunk)
                if is_refused or is_parked:
                    self._line.leave(waiter, self.closed)
                elif not may_enter or done < chunk.rows:
                    waiter = self._line.join(waiter, chunk, done)
                else:
                    self._line.leave(waiter, self.closed)
                    waiter = None
                    following = self._pass_turn()
                wake = self._should_wake()
            if wake:
                self._wake.put(None)
            error = self._unpack(packed)
            if is_parked and error is None:
                return self._park(chunk, ours, recorder)
            first = done - sum(stop - begin for _, begin, stop in pieces)
            for piece in pieces if self._rebatch else ():
                error = error or self._fill(piece, chunk.arrays, first, chunk.rows, ours)
                first += piece[2] - piece[1]
            if error is not None:
                return Unplaced(self._give_up(waiter, chunk, done, following), error)
            if is_refused:  # of a parked chunk, too: its rows are counted here, once
                return Unplaced(chunk.rows - done) if done < chunk.rows or not chunk.rows else None
            if waiter is not None:
                waiter.wait(recorder)
            elif following is None:
                return None
            else:  # the turn is that of a chunk that came early: it is copied by this thread, which holds the turn
                chunk, done, ours = following, 0, (True,) * len(following.arrays)

    def _give_up(self, waiter: Waiter | None, chunk: Parked, done: int, following: Parked | None) -> int:
        """A copy has failed: return the rows that are not reserved, of the chunk and of the parked one that was to follow."""
        with self._lock:
            if waiter is not None:
                done = max(done, waiter.done)  # what was reserved meanwhile is accounted for with its batch
            self._line.leave(waiter, self.closed)
        return chunk.rows - done + (following.rows if following is not None else 0)

    def skip(self, request: FetchRequest, recorder: FetcherRecorder) -> None:
        """All rows of a request were skipped: it has had its turn."""
        if self._turns is not None:
            self._place_slowly(Parked((), 0, 0, request), None, recorder)

    def fail_in_turn(self, request: FetchRequest, failure: Failure) -> None:
        """Place nothing from this request on. When all before it have been placed, the assembly is closed."""
        with self._lock:
            assert self._turns is not None  # noqa: S101  only an ordered source has failures in turn
            self._turns.fail(request, failure)
            self._close_at_failure()
            self._line.call(self.closed)

    def take_failures(self) -> list[Failure]:
        """Return the failures of requests, the earliest request's first, once: none before the assembly is closed."""
        with self._lock:
            return self._turns.take_failures() if self._turns is not None and self.closed else []

    # ---- under the lock

    def _pass_turn(self) -> Parked | None:
        """All rows of a chunk are reserved; return the parked chunk whose turn is next."""
        following = self._line.pass_turn()
        self._close_at_failure()
        self._line.call(self.closed)
        return following

    def _close_at_failure(self) -> None:
        """In ordered delivery: close when it is the turn of a request that failed."""
        if self._turns is not None and self._turns.next_has_failed:
            self._close()
            self._wake.put(None)

    def _close(self) -> None:
        if not self.closed:
            self.closed = True
            self._window.close_current()
            self._line.call(self.closed)
            self._open_gates()

    def _should_wake(self) -> bool:
        """Whether the enqueuer sleeps and has something to do; it is then woken by the caller, outside the lock."""
        if not self._is_watched:
            return False
        lacks_batches = self._window.lacks_batches and bool(self._window or self._waiters)
        if self._window.is_ready or lacks_batches or self.closed:
            self._is_watched = False
            return True
        return False

    def _open_gates(self) -> None:
        gates, self._gates = self._gates, []
        for gate in gates:
            gate.release()

    # ---- outside the lock

    def _fill(
        self, piece: Piece, arrays: Sequence[NDArray[Any]], first: int, rows: int, ours: Sequence[bool] | None
    ) -> BaseException | None:
        """Copy a chunk's rows from `first` on to their place, or adopt the chunk; return what failed."""
        batch, begin, stop = piece
        try:
            is_whole = rows == batch.rows == stop - begin
            kept = adoptable(arrays, ours, batch.target) if ours is not None and is_whole else None
            if kept is not None:
                batch.adopt(arrays, kept)
            else:
                batch.take_memory()  # all its rows are this chunk's, if it has none yet
                batch.copy_in(begin, stop, arrays, first, self._axes)
        except BaseException as error:
            with self._lock:
                batch.is_broken = True
            self._wake.put(None)
            return error
        with self._lock:
            batch.copied += stop - begin
            if batch.copied < batch.filled or not self._should_wake():
                return None
        self._wake.put(None)
        return None

    def _unpack(self, packed: tuple[PackedRows, OpenBatch, int] | None) -> BaseException | None:
        """Copy packed rows, if there are any, to their place; return what failed."""
        if packed is None:
            return None
        small, batch, begin = packed
        rows = small.rows
        chunk = small.take()
        assert chunk is not None  # noqa: S101  it has rows
        return self._fill((batch, begin, begin + rows), chunk[0], 0, rows, None)

    def _owned(self, chunk: Parked, ours: Sequence[bool] | None) -> Sequence[NDArray[Any]]:
        """Return the chunk's arrays, in memory that nothing else refers to."""
        ours = ours or (False,) * len(chunk.arrays)
        if all(ours):
            return chunk.arrays
        kept = self._keep_aside(chunk.arrays, chunk.rows)
        return [array if is_ours else copy for array, is_ours, copy in zip(chunk.arrays, ours, kept, strict=True)]

    def _park(self, chunk: Parked, ours: Sequence[bool] | None, recorder: FetcherRecorder) -> Unplaced | None:
        """Keep a chunk until its turn; its room was taken. If its turn has come meanwhile, place it."""
        assert self._turns is not None  # noqa: S101  chunks are parked in order only
        error: BaseException | None = None
        try:
            if chunk.rows and self._rebatch:
                chunk = chunk._replace(arrays=self._owned(chunk, ours))
        except BaseException as caught:
            error = caught
        with self._lock:
            self._turns.withdraw(chunk.request)
            if error is None and not self.closed and not self._turns.is_next(chunk.request):
                self._turns.park(chunk, self._window.weight_of(chunk.rows))
                return None
            self._line.call(self.closed)
        if error is not None:
            return Unplaced(chunk.rows, error)
        return self._place_slowly(chunk, (True,) * len(chunk.arrays), recorder)
