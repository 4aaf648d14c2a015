"""Counters of one device: its batches, its trainer's waits, and their rates."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable

from input_workers.metrics.histogram import Histogram
from input_workers.metrics.trace import SourceTrace

__all__ = ["DeviceRecorder"]

# The rate is of this many seconds, from marks this far apart.
RATE_WINDOW_SECONDS = 10.0
RATE_MARK_SECONDS = 0.5


class DeviceRecorder:
    """What was delivered to one device. Written under the device queue's lock, but for `send`, `sent` and `feed`, the
    enqueuer's, and `waits`.

    Attributes:
        batches_not_ready: counted by who receives them; 0 where a feed's copies are always done.
        send: duration of sending, for each batch.
        sent: how many batches were queued, and the sum of the moments when they were, in seconds since `created`; replaced as
            one.
        taken: of those that were delivered.
        feed: seconds inside the feed's send, in the form of a fetcher's `blocked`.
        waits: seconds that trainers waited, and since when each waits that does now, by thread; replaced as one.
        trace: where to note what is sent, and who waits; None: no trace runs.
        on_mark: told the time now and then, when a batch was delivered.
    """

    __slots__ = (
        "batches_delivered", "batches_not_ready", "created", "feed", "marks", "on_mark", "rows_delivered", "rows_padded",
        "send", "sent", "taken", "trace", "waits",
    )  # fmt: skip

    def __init__(self) -> None:
        self.rows_delivered = 0
        self.batches_delivered = 0
        self.batches_not_ready = 0
        self.rows_padded = 0
        self.send = Histogram()
        self.created = time.monotonic()
        self.sent = self.taken = (0, 0.0)
        self.feed = (0.0, math.inf)
        self.waits: tuple[float, dict[int, float]] = (0.0, {})
        self.trace: SourceTrace | None = None
        self.on_mark: Callable[[float], object] = float
        self.marks: collections.deque[tuple[float, int]] = collections.deque(
            maxlen=int(RATE_WINDOW_SECONDS / RATE_MARK_SECONDS) + 1
        )

    def begin_wait(self, thread: int, now: float) -> None:
        """A trainer begins to wait. The queue's lock is held, or there is one trainer only."""
        ended, waiting = self.waits
        self.waits = ended, {**waiting, thread: now} if waiting else {thread: now}

    def end_wait(self, thread: int, now: float) -> None:
        """It has ended, if it waited. As above."""
        ended, waiting = self.waits
        if thread in waiting:
            rest = dict(waiting)
            self.waits = ended + now - rest.pop(thread), rest

    def waited_seconds(self, now: float) -> float:
        """Return the seconds that trainers waited, with waits that go on."""
        ended, waiting = self.waits
        return ended + sum(max(0.0, now - since) for since in waiting.values())

    def count_sent(self, now: float) -> None:
        """A batch is queued."""
        count, moments = self.sent
        self.sent = count + 1, moments + now - self.created

    def count_taken(self, now: float) -> None:
        """A batch is delivered."""
        count, moments = self.taken
        self.taken = count + 1, moments + now - self.created

    def depth_seconds(self, now: float) -> float:
        """Return for how long batches were queued, all together: how it rises is how many there are."""
        (taken, until), (sent, since) = self.taken, self.sent
        return until - since + (sent - taken) * (now - self.created)

    def mark(self, now: float) -> None:
        """Note how many rows were delivered by now, if the last note is old enough."""
        if not self.marks or now - self.marks[-1][0] >= RATE_MARK_SECONDS:
            self.marks.append((now, self.rows_delivered))
            self.on_mark(now)

    def rows_per_second(self, now: float) -> float:
        """Return the rate of the last ten seconds; it falls while nothing is delivered."""
        rows = self.rows_delivered
        for since, before in list(self.marks):
            if now - since <= RATE_WINDOW_SECONDS and now > since:
                return (rows - before) / (now - since)
        return 0.0
