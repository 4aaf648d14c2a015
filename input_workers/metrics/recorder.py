"""Counters with one writer each, merged when somebody reads: what happens goes in, sums come out.

A counter that only one thread writes needs no lock; a reader sees the last value or the one before. Rows are counted as
fetched before they are put, and as dropped or delivered afterwards: reading in the reverse order never shows fewer
fetched than accounted for.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable
from typing import Any

from input_workers.contracts import FetchRequest
from input_workers.metrics.device_recorder import DeviceRecorder
from input_workers.metrics.histogram import BUCKETS_SECONDS, SAMPLES_BEFORE_FOLDING, Histogram, PartNames
from input_workers.metrics.windows import Counters, Marks

__all__ = [
    "BUCKETS_SECONDS",
    "DROP_REASONS",
    "SAMPLES_BEFORE_FOLDING",
    "Abandoned",
    "DeviceRecorder",
    "FetcherRecorder",
    "Histogram",
    "Released",
    "SourceRecorder",
    "waited",
]

DROP_REASONS = ("final_partial", "stopped", "skipped_error", "device_error")


def waited(wait: tuple[float, float], now: float) -> float:
    """Return the seconds of (those that ended, since when one goes on or `inf`), up to now."""
    ended, since = wait
    return ended if since == math.inf else ended + max(0.0, now - since)


class Abandoned(BaseException):
    """Ends a fetcher whose call took too long and was given to another. No Exception: nobody recovers from it."""


class Released(BaseException):
    """Ends a fetcher that was asked to rest, when all that it was dealt has been delivered."""


class FetcherRecorder:
    """What one fetcher did. Written by that fetcher alone.

    Attributes:
        rows: rows of valid chunks, counted before they are put.
        stopped_rows: of those, rows that the closed queue did not take.
        blocked: seconds spent waiting for room in the chunk queue, and `time.monotonic()` since it waits now, or `inf`;
            replaced as one, so that a reader never sees the sum fall.
        call_started: `time.monotonic()` of the running call; `inf` between calls.
        request: what is being fetched, or None.
        calls: durations of the calls.
        parts: durations of parts of the calls, by name.
        worked: seconds that it was there, in the form of `blocked`.
        cpu: processor seconds of earlier threads, and of the present one its clock (None: there is none) and what that
            showed at first.
        alive: the fetcher has begun and not ended.
        attempt: what is fetched in place of a call that failed.
        abandoned: its call took too long, and what it returns is discarded.
        released: it is to rest when its call has ended. Written by its backend.
    """

    # Invariant under _claim: a call that `abandon` has taken away never ends; one that has ended is not taken away.

    __slots__ = (
        "_claim", "_part_names", "abandoned", "alive", "attempt", "blocked", "call_started", "calls", "cpu", "errors",
        "parts", "released", "request", "rows", "stopped_rows", "worked", "worker_id",
    )  # fmt: skip

    def __init__(self, worker_id: int, part_names: PartNames | None = None) -> None:
        self._claim = threading.Lock()
        self.abandoned = False
        self.released = False
        self.attempt: Any = None
        self.worker_id = worker_id
        self.rows = 0
        self.stopped_rows = 0
        self.blocked = (0.0, math.inf)
        self.call_started = math.inf
        self.request: FetchRequest | None = None
        self.calls = Histogram()
        self.errors: dict[str, int] = {}
        self.alive = False
        self.parts: dict[str, Histogram] = {}
        self.worked = (0.0, math.inf)
        self.cpu: tuple[float, int | None, float] = (0.0, None, 0.0)
        self._part_names = PartNames() if part_names is None else part_names

    def part(self, name: str) -> Histogram:
        """Return the histogram of a part that has none here by this name."""
        return self.parts.setdefault(self._part_names.take(str(name)), Histogram())

    def begin_work(self) -> None:
        """The fetcher's thread begins; to be called in it."""
        self.worked = self.worked[0], time.monotonic()
        if hasattr(time, "pthread_getcpuclockid"):
            clock = time.pthread_getcpuclockid(threading.get_ident())
            self.cpu = self.cpu[0], clock, time.clock_gettime(clock)

    def watch_cpu(self, clock: int) -> None:
        """From now on it is this clock that shows its processor time."""
        self.cpu = self.cpu_seconds(), clock, time.clock_gettime(clock)

    def end_work(self) -> None:
        """The fetcher's thread ends; to be called in it."""
        self.cpu = self.cpu_seconds(), None, 0.0
        self.worked = waited(self.worked, time.monotonic()), math.inf

    def busy_seconds(self, now: float) -> float:
        """Return the seconds inside calls, with the one that runs."""
        call_started = math.inf if self.abandoned else self.call_started
        return self.calls.seconds() + (0.0 if call_started == math.inf else max(0.0, now - call_started))

    def cpu_seconds(self) -> float:
        """Return the processor time of its threads."""
        ended, clock, first = self.cpu
        if clock is None:
            return ended
        try:
            return ended + time.clock_gettime(clock) - first
        except OSError:  # the thread has ended just now
            return ended

    def end_call(self) -> None:
        """A call has returned or raised. Raises Abandoned if nobody waits for it any more."""
        with self._claim:
            if self.abandoned:
                raise Abandoned
            self.call_started = math.inf

    def abandon(self, overdue_since: float) -> bool:
        """Take the running call away from the fetcher if it was begun before; False: it has ended, or was begun later."""
        with self._claim:
            if self.abandoned or self.call_started > overdue_since:
                return False
            self.abandoned = True
            self.worked = waited(self.worked, self.call_started), math.inf  # this call is nobody's time
            return True

    def count_error(self, name: str) -> None:
        """Count a failed call by the name of its error."""
        self.errors = {**self.errors, name: self.errors.get(name, 0) + 1}  # replaced, so a reader may iterate

    @classmethod
    def merged(cls, recorders: Iterable[FetcherRecorder]) -> FetcherRecorder:
        """Return a recorder of an ended fetcher with the sums of these."""
        recorders = list(recorders)
        total = cls(-1)
        total.rows = sum(recorder.rows for recorder in recorders)
        total.stopped_rows = sum(recorder.stopped_rows for recorder in recorders)
        total.blocked = (sum(recorder.blocked[0] for recorder in recorders), math.inf)
        total.calls = Histogram.merged(recorder.calls for recorder in recorders)
        total.worked = (sum(recorder.worked[0] for recorder in recorders), math.inf)
        total.cpu = (sum(recorder.cpu_seconds() for recorder in recorders), None, 0.0)
        parts = [dict(recorder.parts) for recorder in recorders]
        total.parts = {
            name: Histogram.merged(each[name] for each in parts if name in each) for name in sorted(set().union(*parts))
        }
        for recorder in recorders:
            for name, count in recorder.errors.items():
                total.errors[name] = total.errors.get(name, 0) + count
        return total


class SourceRecorder:
    """All counters of a source over all its runs: they never fall."""

    # Invariant under _lock: what a fetcher counted is in its recorder in `_fetchers` or in `_retired`; no sum ever falls.

    def __init__(self, devices: dict[str, DeviceRecorder]) -> None:
        self.devices = devices
        self.enqueuer_blocked = (0.0, math.inf)  # like a fetcher's: waiting for room on a device
        self.enqueuer_starved = (0.0, math.inf)  # waiting for chunks
        self.enqueuer_worked = (0.0, math.inf)  # its thread was there
        self.has_enqueuer = True  # as a thread
        self.created = time.monotonic()
        self.part_names = PartNames()
        self._lock = threading.Lock()
        self._fetchers: list[FetcherRecorder] = []
        self._retired = FetcherRecorder.merged([])
        self._dropped = dict.fromkeys(DROP_REASONS, 0)
        self.restarts = 0  # fetchers that took another's place
        self._put_metrics: dict[str, tuple[float, int]] = {}
        self.marks = Marks(Counters(self.created))

    def fetcher(self, worker_id: int) -> FetcherRecorder:
        """Return the recorder of a new fetcher."""
        recorder = FetcherRecorder(worker_id, self.part_names)
        with self._lock:
            self._fetchers.append(recorder)
        return recorder

    def drop(self, reason: str, rows: int) -> None:
        """Account for rows that will not be delivered."""
        with self._lock:
            self._dropped[reason] += rows

    def count_restart(self) -> None:
        """Another fetcher took the place of one that died, or whose call took too long."""
        with self._lock:
            self.restarts += 1

    def put_metric(self, key: str, value: float, count: bool) -> None:
        """Add to a sum of the user's own."""
        amount = float(value)  # the user's object: converted before the lock is taken
        with self._lock:
            total, times = self._put_metrics.get(key, (0.0, 0))
            self._put_metrics[key] = (total + amount, times + 1 if count else times)

    def put_metrics(self) -> dict[str, tuple[float, int]]:
        """Return {key: (sum, how often)} since the beginning."""
        with self._lock:
            return dict(self._put_metrics)

    def fetchers(self) -> list[FetcherRecorder]:
        """Return the recorders of all fetchers that ever were, those of ended runs as one."""
        with self._lock:
            return [self._retired, *self._fetchers]

    def retire(self) -> None:
        """Merge what ended fetchers counted into one recorder: runs come and go, memory does not grow."""
        with self._lock:
            ended = [recorder for recorder in self._fetchers if not recorder.alive]
            self._retired = FetcherRecorder.merged([self._retired, *ended])
            self._fetchers = [recorder for recorder in self._fetchers if recorder.alive]

    def rows(self) -> tuple[dict[str, int], int, int]:
        """Return (dropped by reason, delivered, fetched), read in this order."""
        with self._lock:
            dropped = dict(self._dropped)
            fetchers = [self._retired, *self._fetchers]
        dropped["stopped"] += sum(recorder.stopped_rows for recorder in fetchers)
        delivered = sum(device.rows_delivered for device in self.devices.values())
        return dropped, delivered, sum(recorder.rows for recorder in self.fetchers())

    def check(self, rows_waiting: int) -> str | None:
        """Return what is wrong if fetched is not delivered + waiting + dropped, for a source that stands still."""
        dropped, delivered, fetched = self.rows()
        if fetched == delivered + rows_waiting + sum(dropped.values()):
            return None
        return f"ledger: {fetched} rows fetched, but {delivered} delivered + {rows_waiting} waiting + dropped {dropped}"

    def begin(self, now: float) -> Marks:
        """A run begins: its windows do not reach back before it. Returns its readings."""
        for device in self.devices.values():
            device.on_mark = self.mark
            device.sent = device.batches_delivered  # what an earlier run sent and did not deliver is gone
        self.marks = Marks(self.read(now))
        return self.marks

    def mark(self, now: float) -> None:
        """Note all counters, if that is due. Takes no lock; called by who is at work anyway."""
        if self.marks.is_due(now):
            self.marks.add(self.read(now))

    def end(self, marks: Marks, now: float) -> None:
        """A run has ended: its windows end here. The first end stays."""
        if marks.last is None:
            marks.last = self.read(now)

    def read(self, now: float) -> Counters:
        """Return the sums of this moment. Takes no lock."""
        fetchers = (self._retired, *self._fetchers)
        devices = list(self.devices.values())
        starved, blocked = waited(self.enqueuer_starved, now), waited(self.enqueuer_blocked, now)
        enqueuing = waited(self.enqueuer_worked, now) - starved - blocked
        if not self.has_enqueuer:
            enqueuing = sum(device.send.seconds() for device in devices)
            starved = now - self.created - enqueuing
        return Counters(
            now,
            sum(device.waited_seconds(now) for device in devices),
            sum(waited(fetcher.worked, now) for fetcher in fetchers),
            sum(fetcher.busy_seconds(now) for fetcher in fetchers),
            sum(waited(fetcher.blocked, now) for fetcher in fetchers),
            sum(fetcher.cpu_seconds() for fetcher in fetchers),
            enqueuing,
            starved,
            blocked,
            sum(waited(device.feed, now) for device in devices),
            sum(fetcher.rows for fetcher in fetchers),
            sum(device.rows_delivered for device in devices),
            sum(device.batches_delivered for device in devices),
            sum(device.batches_not_ready for device in devices),
            sum(device.sent - device.batches_delivered for device in devices),
            sum(fetcher.calls.count() for fetcher in fetchers),
        )
