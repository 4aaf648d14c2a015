"""`input-workers bench device`: how fast batches reach a device, and whether a training step ever waits for one.

On a GPU if PyTorch sees one, else on the host, by the same code: there a batch is where it must be as soon as it is filled,
and a step is a sleep. Only a GPU's numbers say something about copies.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import input_workers as iw
from input_workers.bench.measure import Result, compare, median_ratio, report
from input_workers.contracts import ArraySpec, DeviceFeed
from input_workers.feeds import feed_maker
from input_workers.leases import SlotPool

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["main"]

ON_GPU = torch.cuda.is_available()
FEED = "torch:cuda:0" if ON_GPU else "torch:cpu"
ROWS, SHAPE = 64, (224, 224, 3)  # float32: 38.5 MB
BATCHES = 100 if ON_GPU else 20
STEP_SECONDS, FETCH_SECONDS = 0.010, 0.008
# A step that begins later than this after the one before it has waited.
GAP_SECONDS = 0.001


def _wait_for_all() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def _slots() -> tuple[DeviceFeed, SlotPool]:
    feed = feed_maker(FEED, ROWS)()
    spec = ArraySpec(SHAPE, np.float32)
    feed.open([spec], ROWS)
    return feed, SlotPool([spec], [0], ROWS, 4, getattr(feed, "slot_memory", None))


def feeding() -> list[Result]:
    """Send batches of 38.5 MB, ready in their slots, and receive them, beside a loop that does nothing but copy."""
    feed, pool = _slots()
    sources = [torch.from_numpy(pool.lease().arrays[0]).fill_(1.0) for _ in range(2)]  # page-locked, where that is needed
    target = torch.empty_like(sources[0], device=FEED.removeprefix("torch:"))

    def bare() -> float:
        _wait_for_all()
        started = time.perf_counter()
        for _, source in zip(range(BATCHES), itertools.cycle(sources), strict=False):
            target.copy_(source, non_blocking=True)
        _wait_for_all()
        return BATCHES / (time.perf_counter() - started)

    def ours() -> float:
        _wait_for_all()
        started = time.perf_counter()
        for _ in range(BATCHES):
            feed.receive(feed.send(pool.lease()))
        _wait_for_all()
        return BATCHES / (time.perf_counter() - started)

    def whole() -> float:
        """With fetching, which writes into memory that is lent, and everything between."""
        source = iw.Stream(_Pictures((BATCHES + 8) * ROWS))
        coordinator = iw.init_data_input_workers(FEED, ["image"], source, ROWS, 2, "bench", coordinator=iw.GlobalCoordinator())
        with coordinator:
            batches = iter(coordinator["bench"])
            for _ in range(8):  # memory is mapped, and page-locked, at the first ones
                next(batches)
            _wait_for_all()
            started = time.perf_counter()
            for _ in range(BATCHES):
                next(batches)
            _wait_for_all()
            return BATCHES / (time.perf_counter() - started)

    ours()
    rates = compare({"bare": bare, "ours": ours, "whole": whole})
    feed.close()
    megabytes = sources[0].nbytes / 1e6
    note = f"{statistics.median(rates['bare']) * megabytes / 1000:.1f} GB/s bare, batches of {megabytes:.1f} MB"
    ratio, through = median_ratio(rates, "ours", "bare"), median_ratio(rates, "whole", "bare")
    return [
        Result(f"send and receive, {FEED}, of a bare copy loop", ratio, 0.9 if ON_GPU else None, "", note),
        Result(f"the whole service, {FEED}, of a bare copy loop", through, None, "", "each row is copied on the host, too"),
    ]


class _Pictures:
    """A source whose rows cost nothing: they are whatever is in the memory that is lent."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._first = np.zeros((ROWS, *SHAPE), np.float32)

    def __len__(self) -> int:
        return self._rows

    def fetch(self, rows: NDArray[np.int64], request: iw.FetchRequest) -> list[NDArray[Any]]:
        return request.out if request.out is not None else [self._first[: len(rows)]]


def _make_step() -> tuple[Callable[[Any], Any], Callable[[Any, Any], float]]:
    """Return a training step of 10 ms, which returns when it began and ended, and what reads the seconds between."""
    if not ON_GPU:

        def step_on_host(batch: Any) -> tuple[float, float]:  # noqa: ARG001
            begun = time.perf_counter()
            time.sleep(STEP_SECONDS)
            return begun, time.perf_counter()

        return step_on_host, lambda before, after: after - before

    def events() -> tuple[Any, Any]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def spin(cycles: int, batch: Any = None) -> tuple[Any, Any]:
        begun, ended = events()
        begun.record()
        torch.cuda._sleep(cycles)
        if batch is not None:
            batch[0].sum()
        ended.record()
        return begun, ended

    cycles = 10_000_000
    spin(cycles)
    begun, ended = spin(cycles)
    ended.synchronize()
    cycles = int(cycles * STEP_SECONDS * 1000 / begun.elapsed_time(ended))
    return lambda batch: spin(cycles, batch), lambda before, after: before.elapsed_time(after) / 1000


def steps() -> list[Result]:
    """Train with steps of 10 ms on batches that take 8 ms each to fetch: the share of steps that waited for their batch."""
    data, label = np.ones((ROWS, 32, 32, 3), np.float32), np.zeros(ROWS, np.int64)

    def fetch(worker_id: int, batch_size: int) -> list[NDArray[Any]]:  # noqa: ARG001
        time.sleep(FETCH_SECONDS)
        return [data, label]

    step, seconds = _make_step()
    coordinator = iw.init_data_input_workers(
        FEED, ["image", "label"], fetch, ROWS, 1, "bench", coordinator=iw.GlobalCoordinator()
    )
    marks = []
    gc.collect()
    with coordinator:
        source = coordinator["bench"]
        for _ in range(20):
            step(source.next_batch())
        _wait_for_all()
        not_ready = source.stats().batches_not_ready
        for number in range(500):
            marks.append(step(source.next_batch()))
            if number >= 2:  # the trainer is two steps ahead of the device, as trainings are
                _wait_for_step(marks[number - 2])
        _wait_for_all()
        stats = source.stats()
    gaps = [seconds(before[1], after[0]) for before, after in itertools.pairwise(marks)]
    late = sum(gap > GAP_SECONDS for gap in gaps) / len(gaps)
    note = f"{len(gaps)} steps, gaps of {statistics.median(gaps) * 1e3:.2f} ms, at most {max(gaps) * 1e3:.1f}"
    return [
        Result(f"steps of 10 ms that waited, fetching 8 ms, {FEED}", late, 0.0 if ON_GPU else None, "", note, at_most=True),
        Result("batches not on the device when received", stats.batches_not_ready - not_ready, 0, "", "", at_most=True),
    ]


def _wait_for_step(mark: tuple[Any, Any]) -> None:
    if ON_GPU:
        mark[1].synchronize()


def main(only: str = "") -> int:
    """Run every benchmark whose name contains `only`, print the report; 0 if every target that was measured is met."""
    return report({"feeding": feeding, "steps": steps}, only)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
