"""Stopwatch, interleaved rounds, medians of ratios and the report of all benchmarks.

Rounds are interleaved, so the noise of a shared machine hits all sides alike.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import input_workers as iw

__all__ = ["BATCH", "Drained", "Result", "Stopwatch", "compare", "drain", "drain_all", "median_ratio", "report", "table"]

T = TypeVar("T")

ROUNDS = 5
BATCH = 128


@dataclass(frozen=True, slots=True)
class Result:
    """A line of the report: `value` should be at least `target`, or at most where `at_most`."""

    name: str
    value: float | None  # None: it could not be measured, and `note` says why
    target: float | None  # None: for comparison only
    unit: str
    note: str
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        if self.value is None or self.target is None:
            return self.target is None
        return self.value <= self.target if self.at_most else self.value >= self.target


class Stopwatch:
    """Seconds between entering and leaving, with the garbage collector kept out of what was made before."""

    seconds = 0.0
    processor_seconds = 0.0  # of all threads of this process

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure the body."""
        gc.collect()
        gc.freeze()
        used, started = time.process_time(), time.perf_counter()
        try:
            yield
        finally:
            self.seconds = time.perf_counter() - started
            self.processor_seconds = time.process_time() - used
            gc.unfreeze()


class Drained(NamedTuple):
    """What reading a source to its end took."""

    rows: int
    seconds: float
    processor_seconds: float

    @property
    def rate(self) -> float:
        """Rows per second."""
        return self.rows / self.seconds

    @property
    def processor_us(self) -> float:
        """Processor time per row, in microseconds."""
        return self.processor_seconds / self.rows * 1e6


def compare(sides: Mapping[str, Callable[[], T]], rounds: int = ROUNDS) -> dict[str, list[T]]:
    """Run every side once a round, in turn; return what each side returned, by round."""
    returned: dict[str, list[T]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            returned[name].append(run())
    return returned


def median_ratio(rates: dict[str, list[float]], name: str, to: str) -> float:
    """Return the median over the rounds of one side's rate divided by another's in the same round."""
    return statistics.median(a / b for a, b in zip(rates[name], rates[to], strict=True))


def drain(fetch: Any, names: list[str], batch_size: int, workers: int, feed: str = "numpy", **options: Any) -> Drained:
    """Read a source from its start to its end."""
    coordinator = iw.init_data_input_workers(
        feed, names, fetch, batch_size, workers, "bench", coordinator=iw.GlobalCoordinator(), **options
    )
    watch = Stopwatch()
    rows = 0
    with watch.running():
        coordinator.start()
        for batch in coordinator["bench"]:
            rows += len(batch[0])
    if not coordinator.stop():
        raise RuntimeError(f"benchmark: stop() was not clean: {coordinator.last_stop}")
    return Drained(rows, watch.seconds, watch.processor_seconds)


def drain_all(fetch: Any, rows: int, workers: int, batch_size: int = BATCH, **options: Any) -> Drained:
    """Read a source of `data` and `label` to its end, and make sure that all its rows were delivered."""
    drained = drain(fetch, ["data", "label"], batch_size, workers, last_batch="keep", **options)
    if drained.rows != rows:
        raise RuntimeError(f"benchmark: {drained.rows} of {rows} rows were delivered")
    return drained


def table(results: list[Result]) -> str:
    """Return the report as text."""
    lines = []
    for result in results:
        mark = "  " if result.target is None else "ok" if result.met else "--" if result.value is None else "NO"
        value = "not measured" if result.value is None else f"{result.value:.3g} {result.unit}".strip()
        sign = "at most" if result.at_most else "at least"
        target = "" if result.target is None else f"{sign} {result.target:g}"
        lines.append(f"{mark} {result.name:<72}{value:>12}  {target:<14}{result.note}".rstrip())
    return "\n".join(lines)


def report(parts: dict[str, Callable[[], list[Result]]], only: str) -> int:
    """Run every part whose name contains `only` and print what it measured; 0 if every target that was measured is met.

    Raises:
        ConfigError: no part has such a name.
    """
    if not any(only in name for name in parts):
        raise iw.ConfigError(f"unknown part {only!r}; the parts are {', '.join(parts)}")
    results: list[Result] = []
    for name, part in parts.items():
        if only in name:
            measured = part()
            results += measured
            print(table(measured), flush=True)
    return 0 if all(result.met or result.value is None for result in results) else 1
