"""Windows of the last 10 s, the last 60 s and the whole run, made of cumulative counters noted about once a second.

Nothing is counted for a window: it is the difference of two readings. Where no reading was made at its beginning, the
counters are taken to have risen evenly between the one before and the one after.
"""

from __future__ import annotations

import collections
import math
from bisect import bisect_left, bisect_right
from typing import NamedTuple

from input_workers.metrics.snapshot import Reading, StageShares, WindowStats

__all__ = ["WINDOWS", "Counters", "Marks", "window_of"]

# The last seconds that a window shows; "run" is what remains.
WINDOWS = {"10s": 10.0, "60s": 60.0}

# Enough for the longest window, with a reading at most every so often.
MARK_SECONDS = 1.0
MARKS_KEPT = 64

# What is drawn of a run: its last five minutes.
HISTORY_SECONDS = 5.0
HISTORY_KEPT = 61


class Counters(NamedTuple):
    """A reading. All but `at` are sums since the source was made; seconds that go on are in them."""

    at: float  # time.monotonic()
    trainer_wait: float = 0.0  # seconds, all trainers together
    fetchers: float = 0.0  # seconds that fetchers were there, all together
    fetch_busy: float = 0.0
    fetch_blocked: float = 0.0
    fetch_cpu: float = 0.0
    enqueue_busy: float = 0.0
    enqueue_starved: float = 0.0
    enqueue_blocked: float = 0.0
    feed: float = 0.0  # seconds inside `send`
    rows_fetched: float = 0.0
    rows_delivered: float = 0.0
    batches: float = 0.0
    not_ready: float = 0.0
    depth_seconds: float = 0.0  # that batches were on the devices, all together: it rises by their number a second
    calls: float = 0.0  # of the fetch function, that have returned or raised
    copying: float = 0.0  # seconds that fetchers copied rows into batches; part of `fetch_busy`


class Marks:
    """Readings of a run, from its beginning. Thread-safe without a lock: what is read together is replaced together."""

    def __init__(self, first: Counters) -> None:
        self.first = first
        self.last: Counters | None = None  # the run has ended: nothing moves any more
        self._next = first.at + MARK_SECONDS
        self._has_begun = False
        self._recent: collections.deque[Counters] = collections.deque(maxlen=MARKS_KEPT)
        self._drawn = first  # the last of the history
        self._history: collections.deque[Reading] = collections.deque([_reading(first, first)], HISTORY_KEPT)

    def is_due(self, now: float) -> bool:
        """Whether the last reading is old enough, or none was made after the first batch."""
        return now >= self._next or not self._has_begun

    def add(self, counters: Counters) -> None:
        """Note a reading. The first one after the first batch is where the run begins: until then everybody waits."""
        if self.last is not None:
            return
        if not self._has_begun and counters.batches > self.first.batches:
            self._has_begun = True
            self.first = counters
            self._recent = collections.deque(maxlen=MARKS_KEPT)
            self._next = counters.at + MARK_SECONDS
        elif counters.at >= self._next:
            self._next = counters.at + MARK_SECONDS
            self._recent.append(counters)
        if counters.at - self._drawn.at >= HISTORY_SECONDS:
            self._history.append(_reading(self._drawn, counters))
            self._drawn = counters

    @property
    def has_begun(self) -> bool:
        """Whether a batch was delivered in this run."""
        return self._has_begun

    def history(self, now: Counters) -> tuple[Reading, ...]:
        """Return readings of the run, oldest first. Where none was made for long, the last is of some seconds ago at most."""
        end, last, known = self.last if self.last is not None else now, self._drawn, tuple(self._history)
        steps = (end.at - last.at) // HISTORY_SECONDS
        return (*known, _reading(last, _at([last, end], last.at + steps * HISTORY_SECONDS))) if steps >= 1 else known

    def windows(self, now: Counters) -> dict[str, tuple[Counters, Counters]]:
        """Return the beginning and the end of each window, given a reading of this moment."""
        end = self.last if self.last is not None else now
        first = self.first
        known = sorted((first, *self._recent.copy(), end))
        known = known[bisect_left(known, min(first, end)) : bisect_right(known, max(first, end))]
        moments = {**{name: end.at - seconds for name, seconds in WINDOWS.items()}, "run": first.at}
        return {name: (_at(known, moment), known[-1]) for name, moment in moments.items()}


def _reading(before: Counters, end: Counters) -> Reading:
    """Return the sums at the end, and the mean depth since the reading before."""
    seconds = end.at - before.at
    depth = max(0.0, end.depth_seconds - before.depth_seconds) / seconds if seconds > 0.0 else 0.0
    return Reading(end.at, end.rows_delivered, end.trainer_wait, depth)


def _at(known: list[Counters], moment: float) -> Counters:
    """Return the counters of a moment, by those known before and after it; the first ones for any earlier moment."""
    index = bisect_right(known, (moment, math.inf))
    if index == 0:
        return known[0]
    if index == len(known):
        return known[-1]
    before, after = known[index - 1], known[index]
    part = (moment - before.at) / (after.at - before.at)
    return Counters(*(a + (b - a) * part for a, b in zip(before, after, strict=True)))


def window_of(begin: Counters, end: Counters, trainers: int = 1) -> WindowStats:
    """Return what happened between two readings; `trainers` is how many may wait at once: one for each device."""
    seconds = max(0.0, end.at - begin.at)

    def share(a: float, b: float, whole: float) -> float:
        return min(1.0, max(0.0, b - a) / whole) if whole > 0.0 else 0.0

    fetching = max(0.0, end.fetchers - begin.fetchers)
    fetch_busy = share(begin.fetch_busy, end.fetch_busy, fetching)
    fetch_blocked = min(share(begin.fetch_blocked, end.fetch_blocked, fetching), 1.0 - fetch_busy)
    batches, rows = max(0.0, end.batches - begin.batches), max(0.0, end.rows_delivered - begin.rows_delivered)
    calls, fetched = end.calls - begin.calls, max(0.0, end.rows_fetched - begin.rows_fetched)
    return WindowStats(
        seconds=seconds,
        trainer_wait=share(begin.trainer_wait, end.trainer_wait, seconds * trainers),
        fetchers=StageShares(fetch_busy, 1.0 - fetch_busy - fetch_blocked if fetching else 0.0, fetch_blocked),
        fetchers_alive=fetching / seconds if seconds else 0.0,
        fetcher_cores=max(0.0, end.fetch_cpu - begin.fetch_cpu) / seconds if seconds else 0.0,
        enqueuer=StageShares(
            share(begin.enqueue_busy, end.enqueue_busy, seconds),
            share(begin.enqueue_starved, end.enqueue_starved, seconds),
            share(begin.enqueue_blocked, end.enqueue_blocked, seconds),
        ),
        copying=min(share(begin.copying, end.copying, fetching), fetch_busy),
        feed=share(begin.feed, end.feed, seconds),
        device_queue_depth=max(0.0, end.depth_seconds - begin.depth_seconds) / seconds if seconds else 0.0,
        rows_per_second=rows / seconds if seconds else 0.0,
        batches=round(batches),
        batches_per_call=fetched / calls * batches / rows if calls > 0.0 and rows else 0.0,
        batches_not_ready=round(max(0.0, end.not_ready - begin.not_ready)),
    )
