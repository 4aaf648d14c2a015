"""The bounded queue of batches that are already on the device: the enqueuer puts, trainers get, each batch once."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from input_workers.contracts import Part
from input_workers.errors import WaitTimeout
from input_workers.lifecycle import WakeUp, refuse_inside
from input_workers.metrics.device_recorder import DeviceRecorder
from input_workers.progress import DeliveryLog, Progress

if TYPE_CHECKING:
    from input_workers.flow.device import Target

__all__ = ["DeviceQueue", "QueuedBatch"]


class QueuedBatch(NamedTuple):
    """A batch on its way to the trainer. `target` is None for the mark at the end of an epoch."""

    ticket: Any
    target: Target | None
    rows: int  # real rows; padding is not counted
    slot_rows: int
    epoch: int
    parts: Sequence[Part] = ()  # of a Stream: what its rows are; of an end mark, what says that it was delivered


class DeviceQueue:
    """Closable, first in first out. One putter, any number of getters; thread-safe.

    A batch is delivered when `commit` says so. Until then an interrupted getter can put it back, and none is lost.

    Attributes:
        log: the last deliveries of this queue.
        progress: where what leaves the log goes; None: nobody asks.
        asked_in_vain_since: `time.monotonic()` when a getter first found nothing, if nothing was put since then, or `inf`.
    """

    # Invariant under lock: every batch ever put is in `_batches`, in hand, delivered (counted by the recorder) or
    # handed to the caller of `abort`. After `end`, nothing is put; after `abort`, nothing is delivered.
    # The lock is re-entrant: a signal handler may stop the source while the thread that it interrupted is in here. Each
    # step below is right if `abort` happens at any call inside it. A handler that asks for a batch is refused.

    def __init__(self, depth: int, wake: WakeUp, recorder: DeviceRecorder) -> None:
        self.depth = depth
        self.recorder = recorder
        self.log = DeliveryLog()
        self.progress: Progress | None = None
        self.asked_in_vain_since = math.inf
        self._wake = wake
        self.lock = threading.RLock()
        # With num_workers=0: makes a call of the fetch function for a getter that waits, unless it is later than the given
        # moment. Returns None after a call, else until when to wait.
        self.serve: Callable[[float], float | None] | None = None
        self._gates: list[threading.Lock] = []  # of getters that wait; one that has given up may still be among them
        self._batches: list[QueuedBatch] = []
        self._in_hand: dict[int, QueuedBatch] = {}  # by identity: taken, and neither committed nor put back
        self._wants_room = False
        self._error: Callable[[], Exception] | None = None
        self._aborted = False

    def has_room(self) -> bool:
        """Whether a batch may be put; if not, a token follows when it may."""
        with self.lock:
            if len(self._batches) < self.depth or self._error is not None:
                return True
            self._wants_room = True
            return False

    def put(self, batch: QueuedBatch) -> bool:
        """Add a batch, without waiting; False: the queue has ended and did not take it."""
        with self.lock:
            if self._error is not None:
                return False
            self._batches.append(batch)
            self.asked_in_vain_since = math.inf
            self._open_gates()
        return True

    def get(self, timeout_s: float, waiting_for: str) -> QueuedBatch:
        """Return the next batch, which is then in the caller's hand: to be committed, given up or put back.

        Raises:
            WaitTimeout: none came in time.
            QueueClosed, EndOfData, SourceFailed, FeedFailed: the queue has ended, and nothing is left in it.
        """
        refuse_inside(self.lock)
        batch: QueuedBatch | None = None
        gate: threading.Lock | None = None
        started = deadline = 0.0
        has_served = False
        try:
            while True:
                with self.lock:
                    if not self._batches and gate is None:
                        gate = threading.Lock()
                        gate.acquire()
                        self._gates.append(gate)  # before looking: an end that comes from here on opens it
                    batch = self._take()
                if batch is not None:
                    break
                if gate is None:  # another getter was faster
                    continue
                if not started:
                    started = time.monotonic()
                    deadline = started + timeout_s
                    self.recorder.begin_wait(threading.get_ident(), started)
                wait_until: float | None = deadline
                if self.serve is not None:  # one call is made even where no time is given
                    wait_until = self.serve(deadline if has_served else math.inf)
                if wait_until is None:
                    has_served = True
                    continue
                if not self._pass(gate, wait_until):
                    raise WaitTimeout(
                        f"{waiting_for}: no batch within {timeout_s:g} s; nothing is lost, ask again, or look at "
                        "stats() for who is waiting"
                    )
                gate = None
            if self._wants_room:
                self._wants_room = False
                self._wake.put(None)
            if started or gate is not None:
                self._stop_waiting(gate, started)
            return batch
        except BaseException:  # Ctrl-C may come anywhere above
            if batch is not None:
                self.put_back(batch)
            self._stop_waiting(gate, started)
            raise

    def _take(self) -> QueuedBatch | None:
        """Return the next batch, now in hand; None if there is none yet. Raises the end's error. The lock is held."""
        if not self._batches:
            if self._error is not None:
                raise self._error()
            self.asked()
            return None
        batch = self._batches[0]
        key = id(batch)
        if not self._batches:  # a signal handler has stopped the source at the call before
            return None
        # No call between these lines: a signal, such as Ctrl-C, is handled at calls and jumps only.
        self._in_hand[key] = batch
        del self._batches[0]
        return batch

    def asked(self) -> None:
        """Somebody wants a batch, and there is none."""
        self.asked_in_vain_since = min(self.asked_in_vain_since, time.monotonic())

    def _pass(self, gate: threading.Lock, deadline: float) -> bool:
        """Wait until the gate is opened; False: it was not, in time."""
        # Not a Condition: Ctrl-C while its `wait` takes the lock again would leave that lock in an unknown state.
        left = deadline - time.monotonic()
        return gate.acquire(timeout=min(left, threading.TIMEOUT_MAX)) if left > 0 else gate.acquire(blocking=False)

    def _stop_waiting(self, gate: threading.Lock | None, started: float) -> None:
        """A getter waits no longer, whatever became of it."""
        now = time.monotonic()
        with self.lock:
            self.recorder.end_wait(threading.get_ident(), now)
            if gate is not None and gate in self._gates:
                self._gates.remove(gate)
        if (trace := self.recorder.trace) is not None and started:
            trace.whole.trainer().add("waiting for a batch", started, now)

    def nudge(self) -> None:
        """Let every waiting getter look again."""
        with self.lock:
            self._open_gates()

    def _open_gates(self) -> None:
        """Let every waiting getter look again. The lock is held."""
        gates, self._gates = self._gates, []
        for gate in gates:
            gate.release()

    def commit(self, batch: QueuedBatch, ready: bool = True) -> None:
        """Count the batch in hand as delivered. Raises the end's error if the queue was aborted meanwhile.

        Args:
            batch: what `get` returned.
            ready: whether it was on the device when it was asked for.
        """
        now = time.monotonic()
        key = id(batch)
        with self.lock:
            if self._aborted and self._error is not None:
                raise self._error()
            recorder, log = self.recorder, self.log
            is_batch = batch.target is not None
            rows = batch.rows
            if self.progress is not None:  # adding twice does no harm, should Ctrl-C come between
                self.progress.add(log.oldest())
            entries, index, entry = log.entries, log.count % len(log.entries), (now, batch.parts, is_batch)
            if key not in self._in_hand and self._error is not None:  # stopped by a signal handler, at a call above
                raise self._error()
            # No call between these lines either.
            del self._in_hand[key]
            entries[index] = entry
            log.count += 1
            log.batches += is_batch
            recorder.rows_delivered += rows
            recorder.batches_delivered += is_batch
            if batch.target is not None:
                batch.target.received += 1
                recorder.count_taken(now)
            recorder.batches_not_ready += not ready
            recorder.mark(now)

    def give_up(self, batch: QueuedBatch) -> bool:
        """Drop the batch in hand, which could not be received; False: it was accounted for by an abort."""
        key = id(batch)
        with self.lock:
            if key not in self._in_hand:
                return False
            # No call between these lines: a signal handler may abort at one.
            del self._in_hand[key]
            if batch.target is not None:
                batch.target.received += 1
            return True

    def put_back(self, batch: QueuedBatch) -> bool:
        """Undo a `get` that was interrupted: the batch is the next one again. False: it is no longer in hand."""
        key = id(batch)
        with self.lock:
            if key not in self._in_hand:
                return False
            # No call between these lines, either.
            del self._in_hand[key]
            self._batches.insert(0, batch)
            self._open_gates()
            return True

    def end(self, error: Callable[[], Exception]) -> None:
        """Once the batches that wait are gone, let every `get` raise a new `error()`. The first end stays."""
        with self.lock:
            if self._error is None:
                self._error = error
            self._open_gates()

    def abort(self, error: Callable[[], Exception]) -> int:
        """End at once; return the rows that were waiting or in hand and will not be delivered."""
        with self.lock:
            rows = self._rows()
            self._error = error
            self._aborted = True
            self._batches = []
            self._in_hand = {}
            self._open_gates()
        self._wake.put(None)
        return rows

    @property
    def rows_waiting(self) -> int:
        """Rows in the queue or in a getter's hand."""
        with self.lock:
            return self._rows()

    def _rows(self) -> int:
        return sum(batch.rows for batch in (*self._batches, *self._in_hand.values()))

    @property
    def is_empty(self) -> bool:
        """Whether a `get` would have to wait."""
        return not self._batches and self._error is None

    @property
    def is_over(self) -> bool:
        """Whether nothing more can be put, and nothing is left."""
        return self._error is not None and not self._batches

    @property
    def ended(self) -> bool:
        """Whether nothing more can be put."""
        return self._error is not None

    def __len__(self) -> int:
        """How many batches wait; the mark at the end of an epoch is none."""
        with self.lock:
            return sum(batch.target is not None for batch in self._batches)
