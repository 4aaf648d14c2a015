"""Counters of an input source, with one writer each, merged when they are read.

A counter that only one thread writes needs no lock; a reader sees the last value or the one before. Rows are counted as
fetched before they are copied into a batch, and as dropped or delivered afterwards: reading in the reverse order never shows
fewer fetched than accounted for.
"""

from __future__ import annotations

import math
import threading
import time

from input_workers.errors import LifecycleError
from input_workers.metrics.device_recorder import DeviceRecorder
from input_workers.metrics.fetcher_recorder import FetcherRecorder, waited
from input_workers.metrics.histogram import PartNames
from input_workers.metrics.snapshot import WorkerStats
from input_workers.metrics.trace import SourceTrace
from input_workers.metrics.windows import Counters, Marks

__all__ = ["DROP_REASONS", "SourceRecorder"]

DROP_REASONS = ("final_partial", "stopped", "skipped_error", "device_error")


class SourceRecorder:
    """All counters of a source over all its runs: they never fall."""

    # Invariant under lock: what a fetcher counted is in its recorder in `_fetchers` or in `_retired`; no sum ever falls;
    # all note into `trace`, or none.

    def __init__(self, devices: dict[str, DeviceRecorder]) -> None:
        self.devices = devices
        self.enqueuer_blocked = (0.0, math.inf)  # like a fetcher's: waiting for room on a device
        self.enqueuer_starved = (0.0, math.inf)  # waiting for rows
        self.enqueuer_worked = (0.0, math.inf)  # its thread was there
        self.created = time.monotonic()
        self.part_names = PartNames()
        self.lock = threading.RLock()  # re-entrant, for a signal handler that stops the source
        self._fetchers: list[FetcherRecorder] = []
        self._retired = FetcherRecorder.merged([])
        self._dropped = dict.fromkeys(DROP_REASONS, 0)
        self.restarts = 0  # fetchers that took another's place
        self._put_metrics: dict[str, tuple[float, int]] = {}
        self.marks = Marks(Counters(self.created))
        self.trace: SourceTrace | None = None

    def fetcher(self, worker_id: int) -> FetcherRecorder:
        """Return the recorder of a new fetcher."""
        recorder = FetcherRecorder(worker_id, self.part_names)
        with self.lock:
            self._fetchers.append(recorder)
            if self.trace is not None:
                recorder.trace = self.trace.fetcher(recorder)
        return recorder

    def begin_trace(self, trace: SourceTrace) -> None:
        """Note there what everybody does from now on. Raises LifecycleError if a trace runs."""
        with self.lock:
            if self.trace is not None:
                raise LifecycleError(
                    f"source {trace.source!r} is being traced already, into {self.trace.whole.path} for "
                    f"{self.trace.whole.seconds:g} s; wait for the end of that one"
                )
            self.trace = trace
            for recorder in self._fetchers:
                recorder.trace = trace.fetcher(recorder)
            for device in list(self.devices.values()):
                device.trace = trace

    def end_trace(self) -> None:
        """No longer."""
        with self.lock:
            self.trace = None
            for recorder in self._fetchers:
                recorder.trace = None
            for device in list(self.devices.values()):
                device.trace = None

    def drop(self, reason: str, rows: int) -> None:
        """Account for rows that will not be delivered."""
        with self.lock:
            self._dropped[reason] += rows

    def count_restart(self) -> None:
        """Another fetcher took the place of one that died, or whose call took too long."""
        with self.lock:
            self.restarts += 1

    def put_metric(self, key: str, value: float, count: bool) -> None:
        """Add to a sum of the user's own."""
        amount = float(value)  # the user's object: converted before the lock is taken
        with self.lock:
            total, times = self._put_metrics.get(key, (0.0, 0))
            self._put_metrics[key] = (total + amount, times + 1 if count else times)

    def put_metrics(self) -> dict[str, tuple[float, int]]:
        """Return {key: (sum, how often)} since the beginning."""
        with self.lock:
            return dict(self._put_metrics)

    def fetchers(self) -> list[FetcherRecorder]:
        """Return the recorders of all fetchers that ever were, those of ended runs as one."""
        with self.lock:
            return [self._retired, *self._fetchers]

    def workers(self, now: float) -> dict[int, WorkerStats]:
        """Return what each worker of this run does, by its id."""
        found: dict[int, WorkerStats] = {}
        for recorder in self.fetchers()[1:]:
            found[recorder.worker_id] = recorder.stats(now, found.get(recorder.worker_id))
        return found

    def retire(self) -> None:
        """Merge what ended fetchers counted into one recorder: runs come and go, memory does not grow."""
        with self.lock:
            ended = [recorder for recorder in self._fetchers if not recorder.alive]
            self._retired = FetcherRecorder.merged([self._retired, *ended])
            self._fetchers = [recorder for recorder in self._fetchers if recorder.alive]

    def rows(self) -> tuple[dict[str, int], int, int]:
        """Return (dropped by reason, delivered, fetched), read in this order."""
        with self.lock:
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
            device.sent = device.taken  # what an earlier run sent and did not deliver is gone
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
            sum(device.depth_seconds(now) for device in devices),
            sum(fetcher.call_count() for fetcher in fetchers),
            sum(fetcher.copying for fetcher in fetchers),
        )
