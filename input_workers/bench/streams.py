"""Streams against themselves: what order costs, how fast rows are permuted, what a policy for errors costs."""

from __future__ import annotations

import heapq
import logging
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

import input_workers as iw
from input_workers.bench.measure import Result, Stopwatch, compare, drain, median_ratio, report
from input_workers.sources.epoch_order import EpochOrder

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["main"]

ROWS_PER_REQUEST = 16


class Waiting:
    """Rows whose requests take so many seconds each: a list, by request."""

    def __init__(self, seconds: list[float], bad: frozenset[int] = frozenset(), named: bool = False) -> None:
        self._seconds = seconds
        self._bad = bad
        self._named = named

    def __len__(self) -> int:
        return len(self._seconds) * ROWS_PER_REQUEST

    def fetch(self, rows: NDArray[np.int64], request: iw.FetchRequest) -> list[NDArray[Any]]:
        """Wait, and return the rows' numbers."""
        time.sleep(self._seconds[request.index] * len(rows) / ROWS_PER_REQUEST)
        if self._bad:
            bad = [row for row in rows.tolist() if row in self._bad]
            if bad:
                error = ValueError(f"rows {bad} cannot be read")
                raise (iw.BadRows(bad) if self._named else error) from (error if self._named else None)
        return [rows.copy()]


def rate(source: Any, workers: int, **options: Any) -> float:
    """Return the rows/s of a stream read to its end."""
    stream = iw.Stream(source, rows_per_request=ROWS_PER_REQUEST)
    return drain(stream, ["row"], ROWS_PER_REQUEST, workers, last_batch="keep", **options).rate


def order_of_equal_requests() -> list[Result]:
    """Requests of 2 ms each, 8 fetchers, in order and as they come; and requests that cost nothing."""
    results = []
    arrays = iw.sources.Arrays(np.zeros((200_000, 64), np.float32))
    for name, source, workers, target in (
        ("ordered, equal requests of 2 ms, of unordered", Waiting([0.002] * 2000), 8, 0.97),
        ("ordered, requests that cost nothing, of unordered", arrays, 2, None),
    ):
        rates = compare({"ours": lambda: rate(source, workers, ordered=True), "limit": lambda: rate(source, workers)})  # noqa: B023
        results.append(Result(name, median_ratio(rates, "ours", "limit"), target, "", f"{workers} fetchers"))
    return results


def order_of_unequal_requests() -> list[Result]:
    """5 % of requests take 20 times as long: how much a window of some requests a fetcher keeps of unordered's rate.

    The limit is an ideal scheduler that does nothing but wait, with the same requests and as many finished ones parked.
    """
    results = []
    for workers, window, target in ((2, 4, 0.9), (8, 4, None), (8, 8, None), (8, 16, None)):
        slow = np.random.default_rng(0).random(1200) < 0.05
        seconds = np.where(slow, 0.04, 0.002)
        source = Waiting(seconds.tolist())
        rates = compare({
            "ours": lambda: rate(source, workers, ordered=True, max_buffered_batches=workers * window),  # noqa: B023
            "limit": lambda: rate(source, workers, max_buffered_batches=workers * window),  # noqa: B023
        })  # fmt: skip
        possible = ideal_rate(seconds.tolist(), workers, workers * window) / ideal_rate(seconds.tolist(), workers, None)
        name = f"ordered, 5 % of requests 20 times slower, {workers} fetchers, {window} a fetcher"
        note = f"an ideal scheduler: {possible:.2f}"
        results.append(Result(name, median_ratio(rates, "ours", "limit"), target, "", note))
    return results


def ideal_rate(seconds: list[float], workers: int, window: int | None) -> float:
    """Return the requests/s of workers that only wait, at most `window` finished requests being parked (None: no order)."""
    running: list[tuple[float, int]] = []
    parked: set[int] = set()
    door: list[int] = []  # finished, for which there is no room: their workers wait
    now, dealt, following, idle = 0.0, 0, 0, workers
    while following < len(seconds):
        while idle and dealt < len(seconds):
            heapq.heappush(running, (now + seconds[dealt], dealt))
            dealt, idle = dealt + 1, idle - 1
        now, finished = heapq.heappop(running)
        if window is None:
            following, idle = following + 1, idle + 1
            continue
        heapq.heappush(door, finished)
        while door and (door[0] == following or len(parked) < window):
            parked.add(heapq.heappop(door))
            idle += 1
            while following in parked:
                parked.remove(following)
                following += 1
    return len(seconds) / now


def permutation() -> list[Result]:
    """Row numbers of a shuffled epoch in requests of 64, everything included."""
    results = []
    for rows in (10**7, 10**10):
        speeds = []
        for seed in range(5):
            order = EpochOrder(rows, (seed, 0), True)
            watch = Stopwatch()
            with watch.running():
                for begin in range(0, 3_000_000, 64):
                    order.rows(begin, begin + 64)
            speeds.append(3_000_000 / watch.seconds / 1e6)
        results.append(Result(f"permutation of {rows:.0e} rows", statistics.median(speeds), 10.0, "M/s", "requests of 64"))
    firsts = []
    for seed in range(20):
        started = time.perf_counter()
        EpochOrder(10**10, (seed, 1), True).rows(0, 64)
        firsts.append((time.perf_counter() - started) * 1000)
    results.append(Result("first request of 1e+10 rows", statistics.median(firsts), 5.0, "ms", "", at_most=True))
    return results


def policies() -> list[Result]:
    """What a skip policy costs while nothing fails, and what 1 % of bad rows cost, named by the source and not."""
    logging.getLogger("input_workers").setLevel(logging.ERROR)  # what is skipped is meant to be
    skip = iw.ErrorPolicy(skip=True)
    arrays = iw.sources.Arrays(np.zeros((200_000, 64), np.float32))
    requests = 1000
    bad = frozenset(
        np.random.default_rng(0).choice(requests * ROWS_PER_REQUEST, requests * ROWS_PER_REQUEST // 100, False).tolist()
    )
    seconds = [0.002] * requests
    rates = compare({"ours": lambda: rate(arrays, 2, on_error=skip), "limit": lambda: rate(arrays, 2)}, rounds=9)
    failing = compare({
        "limit": lambda: rate(Waiting(seconds), 4, on_error=skip),
        "named": lambda: rate(Waiting(seconds, bad, named=True), 4, on_error=skip),
        "unnamed": lambda: rate(Waiting(seconds, bad), 4, on_error=skip),
    })  # fmt: skip
    note = "2 ms a request of 16"
    return [
        Result("skip policy, nothing fails, of none", median_ratio(rates, "ours", "limit"), 0.98, "", "rows that cost nothing"),
        Result("1 % bad rows, named, of none", median_ratio(failing, "named", "limit"), None, "", note),
        Result("1 % bad rows, unnamed, of none", median_ratio(failing, "unnamed", "limit"), None, "", note),
    ]


def main(only: str = "") -> int:
    """Run every benchmark whose name contains `only`, print the report; 0 if every target that was measured is met."""
    parts: dict[str, Callable[[], list[Result]]] = {
        "ordered_equal": order_of_equal_requests,
        "ordered_unequal": order_of_unequal_requests,
        "permutation": permutation,
        "policies": policies,
    }
    return report(parts, only)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
