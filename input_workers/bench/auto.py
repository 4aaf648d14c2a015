"""num_workers="auto" beside the best fixed number: how near it comes, how soon, and how calm it is then."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import input_workers as iw
from input_workers.bench.measure import Result, report
from input_workers.cores import usable_cores

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["main"]

BEST, CALL_SECONDS, ROWS = 48, 0.48, 32
FEWEST = 8
ROUNDS, SOON_SECONDS, SECONDS = 3, 20.0, 30.0


@dataclass(frozen=True, slots=True)
class Course:
    """How a source went: when each batch came, in seconds from the start, and how many fetchers there were each second."""

    batches: list[float]
    alive: list[int]

    def rate(self, begin: float, end: float) -> float:
        """Return the batches/s between two seconds."""
        return sum(begin <= at < end for at in self.batches) / (end - begin)

    def steady(self) -> float:
        """Return the batches/s of the second half of the batches."""
        half = self.batches[len(self.batches) // 2 :]
        return (len(half) - 1) / (half[-1] - half[0])


def waits(worker_id: int, batch_size: int) -> list[NDArray[Any]]:  # noqa: ARG001
    """Wait in the kernel, as for a disk or another machine."""
    time.sleep(CALL_SECONDS)
    return [np.zeros((batch_size, 16), np.float32)]


def computes(worker_id: int, batch_size: int) -> list[NDArray[Any]]:  # noqa: ARG001
    """Compute for some 30 ms without the interpreter lock."""
    block = np.arange(1 << 21, dtype=np.float64)
    for _ in range(4):
        np.sqrt(block, out=block)
    return [np.zeros((batch_size, 16), np.float32)]


def course(fetch: Any, workers: int | str, step_s: float, seconds: float, fetchers: str | iw.Threads | iw.Processes) -> Course:
    """Train on a source for so long: a step is a wait of `step_s`."""
    coordinator = iw.init_data_input_workers(
        "numpy", ["data"], fetch, ROWS, workers, "bench", fetchers=fetchers, coordinator=iw.GlobalCoordinator()
    )
    batches: list[float] = []
    alive: list[int] = []
    source = coordinator["bench"]
    started = due = time.monotonic()
    with coordinator:
        while due - started < seconds or len(batches) < FEWEST:
            source.next_batch()
            # A step ends when it is due, however late the sleep before it returned; who was held up begins anew.
            due = max(due, time.monotonic()) + step_s
            batches.append(time.monotonic() - started)
            if batches[-1] >= len(alive) + 1:
                alive.append(source.stats().fetchers_alive)
            time.sleep(max(0.0, due - time.monotonic()))
    return Course(batches, alive)


def soon(of: Course, rate: float) -> float:
    """Return from which second on, over two seconds each, the rate was 0.95 of this one; `inf`: never."""
    last = int(of.batches[-1])
    return next((float(at) for at in range(last - 1) if of.rate(at, at + 2) >= 0.95 * rate), float("inf"))


def near(name: str, fetchers: Callable[[], iw.Threads | iw.Processes]) -> list[Result]:
    """Fixed and auto in turn, for a trainer that needs 48 workers which do nothing but wait."""
    ratios, times, most, changes = [], [], [], []
    for _ in range(ROUNDS):
        fixed = course(waits, BEST, CALL_SECONDS / BEST, SOON_SECONDS / 2, fetchers())
        rate = fixed.steady()
        auto = course(waits, "auto", CALL_SECONDS / BEST, SECONDS, fetchers())
        ratios.append(auto.rate(SOON_SECONDS, SECONDS) / rate)
        times.append(soon(auto, rate))
        late = auto.alive[int(SOON_SECONDS) :]
        most.append(max(auto.alive))
        changes.append(len(set(late)) - 1)
    return [
        Result(f"{name}, of 48 fixed, after {SOON_SECONDS:g} s", statistics.median(ratios), 0.95, "", _range(ratios)),
        Result(f"{name}, until 0.95 of it", statistics.median(times), SOON_SECONDS, "s", _range(times), at_most=True),
        Result(f"{name}, the most workers there were", max(most), None, "", "48 are needed"),
        Result(f"{name}, changes after {SOON_SECONDS:g} s", max(changes), 2, "", "", at_most=True),
    ]


def _range(values: list[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def waiting() -> list[Result]:
    """Threads, and processes."""
    return near("auto, threads that wait", iw.Threads)


def waiting_processes() -> list[Result]:
    """As `waiting`, for processes."""
    return near("auto, processes that wait", lambda: iw.Processes(max_workers=64))


def computing() -> list[Result]:
    """Threads that only compute, for a trainer that takes all there is."""
    cores = usable_cores()
    ratios, most = [], []
    for _ in range(ROUNDS):
        fixed = course(computes, max(1, round(cores)), 0.0, SECONDS / 3, iw.Threads())
        auto = course(computes, "auto", 0.0, SECONDS, iw.Threads())
        ratios.append(auto.rate(SOON_SECONDS, SECONDS) / fixed.steady())
        most.append(max(auto.alive))
    return [
        Result("auto, threads that compute, of one a core", statistics.median(ratios), None, "", _range(ratios)),
        Result("auto, threads that compute, workers a core", max(most) / -(-cores // 1), 1.0, "", "", at_most=True),
    ]


def main(only: str = "") -> int:
    """Run the benchmarks whose name contains `only`; return 0 if every target is met."""
    parts = {"threads": waiting, "processes": waiting_processes, "computing": computing}
    return report(parts, only)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
