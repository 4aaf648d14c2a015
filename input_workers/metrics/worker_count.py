"""The number of workers that an input source should have, by readings of its counters. Pure: the only clock is theirs.

More workers while the trainer waits for fetching: as many as would do, at most four times as many at once. Where they turn
out to fetch no more than the fewer did, those are enough. Fewer while they are blocked: a quarter more than needed stay.
"""

from __future__ import annotations

import collections
import itertools
import math
from typing import NamedTuple

from input_workers.metrics.snapshot import WindowStats
from input_workers.metrics.verdict import COMPUTES_SHARE, TRAINER_BOUND_SHARE, Setting, judge, workers_wanted
from input_workers.metrics.windows import Counters, window_of

__all__ = ["DECISION_SECONDS", "WorkerCount"]

# How often to ask.
DECISION_SECONDS = 0.5
# New workers do their first calls, and the queues fill or empty; what happens meanwhile says nothing. One that does not come
# back from its first call is not waited for longer than this.
SETTLE_SECONDS = 0.5
LONGEST_SETTLE_SECONDS = 60.0

# A trainer that waits for much of its time shows soon; one that waits a little needs a longer look, or noise would count.
SHORT_SECONDS, MUCH_WAIT = 1.0, 0.25
LONG_SECONDS, SOME_WAIT = 10.0, 0.02
# Workers that are blocked less than this have no time to spare.
BLOCKED_SHARE = 0.05
GROW_TIMES, SHRINK_TIMES = 4, 2

# So many times what was needed stay. Growing goes for what is needed, so that the two have a gap between them.
SPARE_TIMES = 1.25
LESS_SHARE = 0.9  # a smaller step is not worth another look
# Fewer workers after so long a look; doubled when that turned out to be too few, halved when it did not.
ENOUGH_BATCHES = 8
FIRST_PATIENCE_SECONDS, LAST_PATIENCE_SECONDS = 10.0, 600.0

# More workers are worth keeping if they fetch more: at least this part of what as many more would fetch alone.
WORTH_TIMES, WORTH_SHARE, PLAIN_TIMES = 1.25, 0.35, 2
# If they do not, that is tried again after so long, doubled each time, or when the rate has become another by this much.
FIRST_HOLD_SECONDS, LAST_HOLD_SECONDS = 60.0, 3600.0
OTHER_RATE_SHARE = 0.3


class _Look(NamedTuple):
    """What happened in a window that ends now."""

    at: float
    window: WindowStats
    rate: float  # rows/s that were fetched


class WorkerCount:
    """How many workers a source should have. Not thread-safe.

    Args:
        least: never fewer.

    Attributes:
        held_by: what keeps it from more while the trainer waits: a key of `verdict.HELD`; "": nothing.
    """

    def __init__(self, least: int) -> None:
        self.held_by = ""
        self._least = least
        self._workers = 0
        self._changed = -math.inf
        self._readings: collections.deque[Counters] = collections.deque()  # since the number settled
        self._patience = FIRST_PATIENCE_SECONDS
        self._was_shrunk = False  # the last change
        self._before: tuple[int, float] | None = None  # workers, and rows/s of them, that growing began with
        self._hold = FIRST_HOLD_SECONDS
        self._ceiling: tuple[int, float, float] | None = None  # workers, until when, the rate of them

    def next(self, now: Counters, workers: int, ready: bool, most: int, most_by: str, setting: Setting) -> int:
        """Return how many workers there should be.

        Args:
            now: a reading.
            workers: how many there are, but for those that were asked to leave.
            ready: those that were added have come back with rows.
            most: never more.
            most_by: why not: a key of `verdict.HELD`.
            setting: of the source.
        """
        if workers != self._workers:
            self._workers, self._changed = workers, now.at
            self._readings.clear()
        if workers > most:
            return self._shrunk(most)
        settled = now.at - self._changed
        if self._readings or (ready and settled >= SETTLE_SECONDS) or settled >= LONGEST_SETTLE_SECONDS:
            self._readings.append(now)
        short = self._window(SHORT_SECONDS, setting)
        if short is None:
            return workers
        long = self._window(LONG_SECONDS, setting)
        if self._before is not None and workers >= WORTH_TIMES * self._before[0]:
            # Where little can be gained, or nothing was the last time, have a longer look.
            is_plain = self._hold == FIRST_HOLD_SECONDS and workers >= PLAIN_TIMES * self._before[0]
            look = short if is_plain else long
            if look is None:
                return workers
            fewer = self._worth(look)
            if fewer is not None:
                return fewer
        for look, wait in ((short, MUCH_WAIT), (long, SOME_WAIT)):
            if look is not None and look.window.trainer_wait >= wait and _fetching_holds_up(look.window, setting):
                if long is not None and self._ceiling is not None:
                    self._look_again(long)
                return self._grown(look, most, most_by, setting)
        self.held_by = ""
        if short.window.trainer_wait < SOME_WAIT:
            self._before = None
        calm = self._window(self._patience, setting, ENOUGH_BATCHES)
        if calm is not None and judge(calm.window, setting).word != "fetch":
            needed = min(self._needed(calm), workers)
            fewer = max(self._least, math.ceil(needed * SPARE_TIMES - 0.05), math.ceil(workers / SHRINK_TIMES))
            if fewer <= workers * LESS_SHARE:
                return self._shrunk(fewer)
        return workers

    def _needed(self, look: _Look) -> float:
        """Return how many workers fetch, without being blocked, what the trainer takes in the faster half of a window.

        It is seen before the queues settle. `inf` where the trainer paused: it will want no less afterwards.
        """
        first, now, seconds = self._readings[0], self._readings[-1], look.window.seconds
        thirds = [self._reading(now.at - seconds * part / 3).batches for part in (3, 2, 1, 0)]
        rows = now.rows_fetched - first.rows_fetched
        if not rows or any(a == b for a, b in itertools.pairwise(thirds)):
            return math.inf
        worked = (now.fetchers - now.fetch_blocked) - (first.fetchers - first.fetch_blocked)
        points = [self._reading(now.at - seconds * part / 2) for part in (2, 1, 0)]
        halves = [(b.rows_delivered - a.rows_delivered) / (b.at - a.at) for a, b in itertools.pairwise(points) if b.at > a.at]
        return max(halves) * worked / rows

    def _reading(self, at: float) -> Counters:
        """Return the last one that was made before or then, or the first of all."""
        return next((each for each in reversed(self._readings) if each.at <= at), self._readings[0])

    def _window(self, seconds: float, setting: Setting, batches: int = 0) -> _Look | None:
        """Return what happened in the last seconds, or while two calls, or so many batches, were made; None: not known yet."""
        readings = self._readings
        if len(readings) < 2:
            return None
        first, now = readings[0], readings[-1]
        calls = now.calls - first.calls
        if not calls:
            return None
        call_seconds = (now.fetch_busy - first.fetch_busy) / calls
        since = now.at - max(seconds, min(2.0 * call_seconds, LONGEST_SETTLE_SECONDS))
        while now.at - readings[1].at >= LAST_PATIENCE_SECONDS:  # what nobody looks at any more
            readings.popleft()
        for begin in reversed(readings):
            if begin.at <= since and now.batches - begin.batches >= batches:
                break
        else:
            return None
        rate = (now.rows_fetched - begin.rows_fetched) / (now.at - begin.at)
        return _Look(now.at, window_of(begin, now, setting.devices), rate)

    def _grown(self, look: _Look, most: int, most_by: str, setting: Setting) -> int:
        (_, window, rate), workers = look, self._workers
        wanted = workers_wanted(window, workers)
        most_at_once = workers * GROW_TIMES
        wanted = most_at_once if wanted is None else min(wanted, most_at_once)
        bounds = [(most, most_by), (_cores_allow(window, workers, setting), "cores")]
        if self._ceiling is not None:
            bounds.append((self._ceiling[0], "gain"))
        bound, by = min(bounds)
        self.held_by = by if bound <= workers else ""
        if bound <= workers:
            return workers
        if self._before is None:
            self._before = workers, rate
        if self._was_shrunk:
            self._patience = min(self._patience * 2, LAST_PATIENCE_SECONDS)
        self._was_shrunk = False
        return min(wanted, bound)

    def _look_again(self, look: _Look) -> None:
        """Lift the ceiling after its time, or where the rate is no longer the one that it was set for."""
        assert self._ceiling is not None  # noqa: S101  that is what is asked about
        _, until, rate = self._ceiling
        if look.at >= until or abs(look.rate - rate) > OTHER_RATE_SHARE * rate:
            self._ceiling = None

    def _shrunk(self, workers: int) -> int:
        if self._was_shrunk:
            self._patience = max(self._patience / 2, FIRST_PATIENCE_SECONDS)
        self._was_shrunk = True
        self._before = None
        return workers

    def _worth(self, look: _Look) -> int | None:
        """Return a number that is enough, if the workers that were added do not fetch more."""
        assert self._before is not None  # noqa: S101  that is what is asked about
        (workers, rate), self._before = self._before, None
        worth = rate * (1.0 + WORTH_SHARE * (self._workers / workers - 1.0))
        if look.window.trainer_wait < SOME_WAIT or look.rate >= worth:
            self._hold = FIRST_HOLD_SECONDS
            return None
        # As many as would fetch what is fetched now, if each did as much as those before.
        fewer = min(round(workers * max(1.0, look.rate / max(rate, 1e-9))), self._workers - 1)
        self._ceiling = fewer, look.at + self._hold, look.rate
        self._hold = min(self._hold * 2, LAST_HOLD_SECONDS)
        self.held_by = "gain"
        return fewer


def _fetching_holds_up(window: WindowStats, setting: Setting) -> bool:
    """Whether a trainer that waits does so for fetching, and more workers may help."""
    if window.fetchers.starved > window.fetchers.busy:
        return False
    if window.trainer_wait >= TRAINER_BOUND_SHARE:
        return judge(window, setting).word == "fetch"
    return window.fetchers.blocked < BLOCKED_SHARE and window.enqueuer.busy < window.fetchers.busy


def _cores_allow(window: WindowStats, workers: int, setting: Setting) -> int:
    """Return how many workers like these have processor time: any number of those that only wait."""
    used, busy = window.fetcher_cores, window.fetchers_alive * window.fetchers.busy
    if used <= 0.0 or busy <= 0.0:
        return 1 << 30
    allowed = max(1, int(workers * setting.cores / used + 0.05))
    return min(allowed, math.ceil(setting.cores)) if used > COMPUTES_SHARE * busy else allowed
