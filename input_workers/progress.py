"""What of a Stream was delivered, to the row: parts of batches go in as they are delivered, positions come out.

An epoch's rows are counted by their offset in the order of the epoch. What was delivered of it is a list of spans: one,
from 0, where delivery is in order; else with gaps where requests are unfinished.
"""

from __future__ import annotations

import bisect
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from input_workers.contracts import Part

__all__ = ["KEPT", "MARKS", "DeliveryLog", "Progress", "Spans", "add_span", "gaps", "rows_of", "slice_of"]

# Sorted, disjoint, never touching: [(begin, stop), ...].
Spans: TypeAlias = list[tuple[int, int]]

# Beyond every offset: the end mark of an epoch, delivered to device number d, is the span MARKS + d to MARKS + d + 1.
MARKS = sys.maxsize

# For how many deliveries back `state_dict(delivered=n)` works; more are remembered, so that the answer holds still while
# others go on reading.
KEPT = 64
_REMEMBERED = 2 * KEPT


def add_span(spans: Spans, begin: int, stop: int) -> None:
    """Add begin to stop to the spans."""
    if begin >= stop:
        return
    if spans and spans[-1][1] == begin:  # the common case: in order
        spans[-1] = spans[-1][0], stop
        return
    first = bisect.bisect_left(spans, begin, key=lambda span: span[1])
    last = bisect.bisect_right(spans, stop, key=lambda span: span[0])
    if first < last:
        begin, stop = min(begin, spans[first][0]), max(stop, spans[last - 1][1])
    spans[first:last] = [(begin, stop)]


def gaps(spans: Sequence[tuple[int, int]], begin: int, stop: int) -> Spans:
    """Return what of begin to stop is in none of the spans."""
    found: Spans = []
    for span_begin, span_stop in spans:
        if span_begin >= stop:
            break
        if span_begin > begin:
            found.append((begin, span_begin))
        begin = max(begin, span_stop)
    if begin < stop:
        found.append((begin, stop))
    return found


def rows_of(spans: Iterable[tuple[int, int]]) -> int:
    """Return how many rows the spans have."""
    return sum(stop - begin for begin, stop in spans)


def slice_of(layout: Spans, begin: int, stop: int) -> Spans:
    """Return the positions at the offsets begin to stop of these spans, one after the other."""
    found: Spans = []
    for first, last in layout:
        rows = last - first
        if begin < rows and stop > 0 and begin < stop:
            found.append((first + max(begin, 0), first + min(stop, rows)))
        begin, stop = begin - rows, stop - rows
    return found


class DeliveryLog:
    """The last deliveries to one device. Written under its queue's lock; `Device` may take back the latest."""

    __slots__ = ("batches", "count", "entries", "taken_back")

    def __init__(self) -> None:
        self.count = 0
        self.batches = 0
        # (time, parts, whether it is a batch); the end mark of an epoch is none.
        self.entries: list[tuple[float, Sequence[Part], bool]] = [(0.0, (), False)] * _REMEMBERED
        self.taken_back = 0  # deliveries, the latest ones, which the trainer did not get, because Ctrl-C came between

    def oldest(self) -> Sequence[Part]:
        """Return the parts of the entry that the next one replaces."""
        return self.entries[self.count % len(self.entries)][1]

    def latest(self) -> list[tuple[float, Sequence[Part], bool]]:
        """Return what is remembered, the oldest first."""
        count = self.count
        kept = [self.entries[index % _REMEMBERED] for index in range(max(0, count - _REMEMBERED), count)]
        return kept[: len(kept) - self.taken_back] if self.taken_back else kept


class Progress:
    """What was delivered in one run of a Stream, on top of what earlier runs did. Thread-safe.

    Args:
        first: the first epoch that is not finished.
        done: what earlier runs delivered of it and of later ones.
        epoch_rows: returns the rows of an epoch.
        logs: one for each device.
        has_marks: an epoch is finished when every device was given its end mark, not when its rows are delivered.
        ended: numbers of the devices that were given the end mark of `first` in an earlier run.
    """

    # Invariant under lock: every delivery is in `_done` or in a log (or both), or its epoch is before `_first`.

    def __init__(
        self,
        first: int,
        done: Mapping[int, Sequence[tuple[int, int]]],
        epoch_rows: Callable[[int], int],
        logs: Sequence[DeliveryLog],
        has_marks: bool,
        ended: Sequence[int] = (),
    ) -> None:
        self.lock = threading.RLock()  # re-entrant, for a signal handler that stops the source
        self._first = first
        self._done: dict[int, Spans] = {epoch: list(spans) for epoch, spans in done.items()}
        self._epoch_rows = epoch_rows
        self._logs = logs
        self._marks = set(range(len(logs))) if has_marks else set()
        self._has_marks = has_marks
        for number in ended:
            add_span(self._done.setdefault(first, []), MARKS + number, MARKS + number + 1)

    def add(self, parts: Iterable[Part]) -> None:
        """These were delivered, or will never be."""
        with self.lock:
            for epoch, begin, stop in parts:
                if epoch >= self._first:
                    add_span(self._done.setdefault(epoch, []), begin, stop)
            self._first = self._forget_finished(self._first, self._done)

    def drop_device(self, number: int) -> None:
        """This device was stopped: it will be given no end mark."""
        with self.lock:
            self._marks.discard(number)

    @property
    def batches(self) -> int:
        """How many batches were delivered in this run."""
        return sum(log.batches - log.taken_back for log in self._logs)

    def at(self, delivered: int | None = None) -> tuple[int, dict[int, Spans], tuple[int, ...]] | None:
        """Return what was delivered after this many batches of this run; by default: now.

        Returns:
            (first unfinished epoch, what was delivered of it and later ones, the devices that were given its end); None: that
            is too long ago, or has not been reached.
        """
        # Read before `_done`: an entry may move there meanwhile, and is then in both.
        entries, batches = self._latest()
        if delivered is not None:
            back = batches - delivered
            if not 0 <= back <= KEPT or delivered < 0:
                return None
            while entries and (back or not entries[-1][2]):  # an end mark comes after the batch
                back -= entries.pop()[2]
            if back:
                return None
        with self.lock:
            first = self._first
            done = {epoch: list(spans) for epoch, spans in self._done.items()}
            for _, parts, _ in entries:
                for epoch, begin, stop in parts:
                    if epoch >= first:
                        add_span(done.setdefault(epoch, []), begin, stop)
            first = self._forget_finished(first, done)
        ended = _devices_of(done.get(first, []))
        for spans in done.values():
            while spans and spans[-1][0] >= MARKS:
                spans.pop()
        return first, {epoch: spans for epoch, spans in sorted(done.items()) if spans}, tuple(sorted(ended))

    def _latest(self) -> tuple[list[tuple[float, Sequence[Part], bool]], int]:
        """Return what the logs remember, the oldest first, and how many batches were delivered then."""
        while True:
            before = [(log.count, log.taken_back) for log in self._logs]
            batches = self.batches
            entries = sorted((entry for log in self._logs for entry in log.latest()), key=lambda entry: entry[0])
            if before == [(log.count, log.taken_back) for log in self._logs]:  # nothing was delivered meanwhile
                return entries, batches

    def _forget_finished(self, first: int, done: dict[int, Spans]) -> int:
        while self._is_finished(first, done.get(first, [])):
            done.pop(first, None)
            first += 1
        return first

    def _is_finished(self, epoch: int, spans: Spans) -> bool:
        if self._has_marks:
            marks = _devices_of(spans)
            return bool(marks) and marks >= self._marks
        rows = self._epoch_rows(epoch)
        return not rows or spans[:1] == [(0, rows)]


def _devices_of(spans: Spans) -> set[int]:
    """Return the numbers of the devices whose end mark is among the spans."""
    return {number - MARKS for begin, stop in spans if begin >= MARKS for number in range(begin, stop)}
