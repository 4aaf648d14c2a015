"""Counters of one fetcher, written by its thread alone, and readings of them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

from input_workers.metrics.histogram import Durations, Histogram, PartNames
from input_workers.metrics.snapshot import WorkerStats
from input_workers.metrics.trace import FetcherTrack, Span, Track

__all__ = ["FetcherRecorder", "Told", "waited"]

# What a worker process tells with the answer to a call: how long the function took; when the call began and ended (0: it is
# told with the next answer); and since the answer before, its processor seconds, the parts by name, and spans for a trace.
Told: TypeAlias = tuple[float, float, float, float, Sequence[tuple[str, Durations]], Sequence[Span]]


def waited(wait: tuple[float, float], now: float) -> float:
    """Return the seconds of (those that ended, since when one goes on or `inf`), up to now."""
    ended, since = wait
    return ended if since == math.inf else ended + max(0.0, now - since)


class FetcherRecorder:
    """What one fetcher did. Written by that fetcher alone.

    Attributes:
        rows: rows of valid chunks, counted before they are copied.
        stopped_rows: of those, rows that the closed assembly did not take.
        blocked: seconds spent waiting for room in the batches, and `time.monotonic()` since it waits now, or `inf`;
            replaced as one, so that a reader never sees the sum fall.
        copying: seconds spent copying rows into batches, without waits for room.
        call_started: `time.monotonic()` of the running call; `inf` between calls.
        request: the number of the request that is being fetched, or None.
        calls: durations of the calls that returned, whatever it was.
        failed: how many calls raised, and their seconds: no duration, but time that was worked; replaced as one.
        parts: durations of parts of the calls, by name.
        worked: seconds that it was there, in the form of `blocked`.
        cpu: processor seconds of earlier threads and of worker processes, and of the present thread its clock (None: there
            is none) and what that showed at first.
        alive: the fetcher has begun and not ended.
        trace: where to note what it does; None: no trace runs. Another thread may set it at any moment: look once.
    """

    __slots__ = (
        "_part_names", "alive", "blocked", "call_started", "calls", "copying", "cpu", "errors", "failed", "parts", "request",
        "rows", "stopped_rows", "trace", "worked", "worker_id",
    )  # fmt: skip

    def __init__(self, worker_id: int, part_names: PartNames | None = None) -> None:
        self.worker_id = worker_id
        self.rows = 0
        self.stopped_rows = 0
        self.blocked = (0.0, math.inf)
        self.copying = 0.0
        self.call_started = math.inf
        self.request: int | None = None
        self.calls = Histogram()
        self.failed = (0, 0.0)
        self.errors: dict[str, int] = {}
        self.alive = False
        self.parts: dict[str, Histogram] = {}
        self.worked = (0.0, math.inf)
        self.cpu: tuple[float, int | None, float] = (0.0, None, 0.0)
        self.trace: Track | None = None
        self._part_names = PartNames() if part_names is None else part_names

    def part(self, name: str) -> Histogram:
        """Return the histogram of a part that has none here by this name."""
        return self.parts.setdefault(self._part_names.take(str(name)), Histogram())

    def add_told(self, told: Told, pid: int, call: str, request: int | None) -> None:
        """Add what a worker process has told with an answer; `call` is what the call is called in a trace, or ""."""
        _, began, ended, cpu, parts, spans = told
        self.cpu = self.cpu[0] + cpu, *self.cpu[1:]
        for name, durations in parts:
            (self.parts.get(name) or self.part(name)).add(durations)
        trace = self.trace
        if isinstance(trace, FetcherTrack):
            trace.add_from(pid, [*spans, (call, began, ended, request)] if began and call else spans)

    def begin_work(self) -> None:
        """The fetcher's thread begins; to be called in it."""
        self.worked = self.worked[0], time.monotonic()
        if hasattr(time, "pthread_getcpuclockid"):
            clock = time.pthread_getcpuclockid(threading.get_ident())
            self.cpu = self.cpu[0], clock, time.clock_gettime(clock)

    def end_work(self) -> None:
        """The fetcher's thread ends; to be called in it."""
        self.cpu = self.cpu_seconds(), None, 0.0
        self.worked = waited(self.worked, time.monotonic()), math.inf

    def busy_seconds(self, now: float) -> float:
        """Return the seconds inside calls, those that raised and the one that runs among them, and of copying rows."""
        call_started = self.call_started
        running = 0.0 if call_started == math.inf else max(0.0, now - call_started)
        return self.calls.seconds() + self.failed[1] + self.copying + running

    def call_count(self) -> int:
        """Return how many calls have come back, with a result or an exception."""
        return self.calls.count() + self.failed[0]

    def cpu_seconds(self) -> float:
        """Return the processor time of its threads."""
        ended, clock, first = self.cpu
        if clock is None:
            return ended
        try:
            return ended + time.clock_gettime(clock) - first
        except OSError:  # the thread has ended just now
            return ended

    def end_call(self, failed: bool = False) -> None:
        """A call has returned or, if it has `failed`, raised."""
        if failed and self.call_started != math.inf:
            calls, seconds = self.failed
            self.failed = calls + 1, seconds + max(0.0, time.monotonic() - self.call_started)
        self.call_started = math.inf

    def count_error(self, name: str) -> None:
        """Count a failed call by the name of its error."""
        self.errors = {**self.errors, name: self.errors.get(name, 0) + 1}  # replaced, so a reader may iterate

    def stats(self, now: float, before: WorkerStats | None) -> WorkerStats:
        """Return what it does, with the sums of those whose place it took."""
        request, call_started, blocked_since = self.request, self.call_started, self.blocked[1]
        rows, errors = (before.rows, before.errors) if before is not None else (0, 0)
        state: Literal["fetching", "blocked", "idle", "ended"] = "idle"
        since = math.inf
        if not self.alive:
            state, request = "ended", None
        elif call_started != math.inf:
            state, since = "fetching", call_started
        elif blocked_since != math.inf:
            state, since = "blocked", blocked_since
        return WorkerStats(
            state,
            max(0.0, now - since) if since != math.inf else 0.0,
            request,
            rows + self.rows,
            errors + sum(self.errors.values()),
        )

    @classmethod
    def merged(cls, recorders: Iterable[FetcherRecorder]) -> FetcherRecorder:
        """Return a recorder of an ended fetcher with the sums of these."""
        recorders = list(recorders)
        total = cls(-1)
        total.rows = sum(recorder.rows for recorder in recorders)
        total.stopped_rows = sum(recorder.stopped_rows for recorder in recorders)
        total.blocked = (sum(recorder.blocked[0] for recorder in recorders), math.inf)
        total.copying = sum(recorder.copying for recorder in recorders)
        total.calls = Histogram.merged(recorder.calls for recorder in recorders)
        total.failed = sum(recorder.failed[0] for recorder in recorders), sum(recorder.failed[1] for recorder in recorders)
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
