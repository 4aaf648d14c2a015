"""Interleaved rounds go in, medians and ratios come out: a shared machine's noise hits all sides alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import input_workers as iw

__all__ = ["BATCH", "Result", "Stopwatch", "compare", "drain", "median_ratio", "report", "table"]

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
    """Seconds between entering and leaving, the garbage collector kept out of what was made before."""

    seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure the body."""
        gc.collect()
        gc.freeze()
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds = time.perf_counter() - started
            gc.unfreeze()


def compare(sides: dict[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Run every side once a round, in turn; return the rates of each."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            rates[name].append(run())
    return rates


def median_ratio(rates: dict[str, list[float]], name: str, to: str) -> float:
    """Return the median over the rounds of one side's rate divided by another's in the same round."""
    return statistics.median(a / b for a, b in zip(rates[name], rates[to], strict=True))


def drain(
    fetch: Any, names: list[str], batch_size: int, workers: int, feed: str = "numpy", **options: Any
) -> tuple[int, float]:
    """Read a source to its end; return (rows delivered, seconds from start to end)."""
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
    return rows, watch.seconds


def table(results: list[Result]) -> str:
    """Return the report as text."""
    lines = []
    for result in results:
        mark = "  " if result.target is None else "ok" if result.met else "--" if result.value is None else "NO"
        value = "not measured" if result.value is None else f"{result.value:.3g} {result.unit}".strip()
        sign = "at most" if result.at_most else "at least"
        target = "" if result.target is None else f"{sign} {result.target:g}"
        lines.append(f"{mark} {result.name:<66}{value:>12}  {target:<14}{result.note}".rstrip())
    return "\n".join(lines)


def report(parts: dict[str, Callable[[], list[Result]]], only: str) -> int:
    """Run every part whose name contains `only` and print what it measured; 0 if every target that was measured is met."""
    results: list[Result] = []
    for name, part in parts.items():
        if only in name:
            measured = part()
            results += measured
            print(table(measured), flush=True)
    return 0 if all(result.met or result.value is None for result in results) else 1
