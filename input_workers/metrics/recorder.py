"""Counters with one writer each, merged when somebody reads: what happens goes in, sums come out.

A counter that only one thread writes needs no lock; a reader sees the last value or the one before. Rows are counted as
fetched before they are put, and as dropped or delivered afterwards: reading in the reverse order never shows fewer
fetched than accounted for.
"""

from __future__ import annotations

import collections
import math
import threading
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from input_workers.contracts import FetchRequest

__all__ = [
    "BUCKETS_SECONDS",
    "DROP_REASONS",
    "Abandoned",
    "DeviceRecorder",
    "FetcherRecorder",
    "Histogram",
    "SourceRecorder",
    "waited",
]

# Upper bounds, in seconds: from a call that only slices an array to one that waits for a far disk.
BUCKETS_SECONDS = (
    0.0001,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)

SAMPLES_BEFORE_FOLDING = 1024

DROP_REASONS = ("final_partial", "stopped", "skipped_error", "device_error")

# The rate is of this many seconds, from marks this far apart.
RATE_WINDOW_SECONDS = 10.0
RATE_MARK_SECONDS = 0.5


class Histogram:
    """Durations in seconds. One thread adds, any thread reads.

    Adding is an append to `samples`; `fold` sorts what has gathered into buckets. `_folded` and the list that goes with it
    are replaced as one, so a reader sees no sample twice.
    """

    __slots__ = ("_folded", "samples")

    def __init__(self) -> None:
        self.samples: list[float] = []
        self._folded: tuple[tuple[int, ...], float, list[float]] = ((0,) * (len(BUCKETS_SECONDS) + 1), 0.0, self.samples)

    def observe(self, seconds: float) -> None:
        """Add one duration. (The fetch loop does these lines itself.)"""
        self.samples.append(seconds)
        if len(self.samples) >= SAMPLES_BEFORE_FOLDING:
            self.fold()

    def fold(self) -> None:
        """Sort the samples into the buckets. The adding thread's."""
        counts, seconds = self.read()
        fresh: list[float] = []
        self._folded = (counts, seconds, fresh)
        self.samples = fresh

    def read(self) -> tuple[tuple[int, ...], float]:
        """Return (count of each bucket, the last one above all bounds; sum of the seconds)."""
        counts, total, samples = self._folded
        seconds = np.array(samples, np.float64)
        fresh = np.bincount(np.searchsorted(BUCKETS_SECONDS, seconds), minlength=len(counts))
        return tuple(int(count) for count in fresh + np.array(counts)), total + float(seconds.sum())

    @classmethod
    def merged(cls, histograms: Iterable[Histogram]) -> Histogram:
        """Return a histogram of all that these have observed so far."""
        merged = cls()
        counts, seconds, samples = merged._folded
        for histogram in histograms:
            more, more_seconds = histogram.read()
            counts = tuple(a + b for a, b in zip(counts, more, strict=True))
            seconds += more_seconds
        merged._folded = (counts, seconds, samples)
        return merged


def waited(wait: tuple[float, float], now: float) -> float:
    """Return the seconds of (those that ended, since when one goes on or `inf`), up to now."""
    ended, since = wait
    return ended if since == math.inf else ended + max(0.0, now - since)


class Abandoned(BaseException):
    """Ends a fetcher whose call took too long and was given to another. No Exception: nobody recovers from it."""


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
        alive: the fetcher has begun and not ended.
        attempt: what is fetched in place of a call that failed.
        abandoned: its call took too long, and what it returns is discarded.
    """

    # Invariant under _claim: a call that `abandon` has taken away never ends; one that has ended is not taken away.

    __slots__ = (
        "_claim", "abandoned", "alive", "attempt", "blocked", "call_started", "calls", "errors", "request", "rows",
        "stopped_rows", "worker_id",
    )  # fmt: skip

    def __init__(self, worker_id: int) -> None:
        self._claim = threading.Lock()
        self.abandoned = False
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
        for recorder in recorders:
            for name, count in recorder.errors.items():
                total.errors[name] = total.errors.get(name, 0) + count
        return total


class DeviceRecorder:
    """What was delivered to one device. Written under the device queue's lock, but for `send`, the enqueuer's."""

    __slots__ = ("batches_delivered", "marks", "rows_delivered", "rows_padded", "send", "wait_seconds")

    def __init__(self) -> None:
        self.rows_delivered = 0
        self.batches_delivered = 0
        self.rows_padded = 0
        self.wait_seconds = 0.0
        self.send = Histogram()  # filling a slot and sending it, per batch
        self.marks: collections.deque[tuple[float, int]] = collections.deque(
            maxlen=int(RATE_WINDOW_SECONDS / RATE_MARK_SECONDS) + 1
        )

    def mark(self, now: float) -> None:
        """Note how many rows were delivered by now, if the last note is old enough."""
        if not self.marks or now - self.marks[-1][0] >= RATE_MARK_SECONDS:
            self.marks.append((now, self.rows_delivered))

    def rows_per_second(self, now: float) -> float:
        """Return the rate of the last ten seconds; it falls while nothing is delivered."""
        rows = self.rows_delivered
        for since, before in list(self.marks):
            if now - since <= RATE_WINDOW_SECONDS and now > since:
                return (rows - before) / (now - since)
        return 0.0


class SourceRecorder:
    """All counters of a source over all its runs: they never fall."""

    # Invariant under _lock: what a fetcher counted is in its recorder in `_fetchers` or in `_retired`; no sum ever falls.

    def __init__(self, devices: dict[str, DeviceRecorder]) -> None:
        self.devices = devices
        self.enqueuer_blocked = (0.0, math.inf)  # like a fetcher's: waiting for room on a device
        self.created = time.monotonic()
        self._lock = threading.Lock()
        self._fetchers: list[FetcherRecorder] = []
        self._retired = FetcherRecorder.merged([])
        self._dropped = dict.fromkeys(DROP_REASONS, 0)
        self.restarts = 0  # fetchers that took another's place
        self._put_metrics: dict[str, tuple[float, int]] = {}

    def fetcher(self, worker_id: int) -> FetcherRecorder:
        """Return the recorder of a new fetcher."""
        recorder = FetcherRecorder(worker_id)
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
