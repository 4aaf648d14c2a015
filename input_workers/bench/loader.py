"""The loader beside PyTorch's DataLoader, on the same data sets with as many workers."""

from __future__ import annotations

import hashlib
import statistics
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import DataLoader

from input_workers.adapters.torch import loader
from input_workers.bench.measure import Result, Stopwatch, compare, median_ratio, report

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["main"]

WORKERS = 2
PREFETCH = 4
ROWS = 64
PICTURE = (224, 224, 3)  # 64 of float32 are 38.5 MB


class Pictures:
    """Pictures that lie in memory: a batch costs what stacking it and handing it over costs."""

    def __init__(self, batches: int) -> None:
        self._pictures: NDArray[np.float32] = np.ones((ROWS, *PICTURE), np.float32)
        self._count = batches * ROWS

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[NDArray[np.float32], int]:
        return self._pictures[index % ROWS], index


class Decoded:
    """Small pictures that cost as much as decoding does, with the interpreter lock let go: 500 KB hashed for each."""

    def __init__(self, batches: int) -> None:
        self._file = bytes(500_000)
        self._count = batches * ROWS

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        seed = hashlib.sha256(self._file).digest()
        return np.frombuffer(seed * 384, np.uint8).reshape(64, 64, 3).copy(), index


def rate(make: Callable[..., Any], dataset: Any, **more: Any) -> float:
    """Return the batches/s of an epoch but for its first and last batches, in which workers begin and end."""
    batches = iter(make(dataset, ROWS, num_workers=WORKERS, prefetch_factor=PREFETCH, **more))
    margin = 2 * PREFETCH
    count = len(dataset) // ROWS - 2 * margin
    watch = Stopwatch()
    for _ in range(margin):
        next(batches)
    with watch.running():
        for _ in range(count):
            next(batches)
    for _ in batches:
        pass
    return count / watch.seconds


def large() -> list[Result]:
    """38.5 MB batches from processes."""
    dataset = Pictures(60)
    rates = compare({
        "ours": lambda: rate(loader, dataset, fetchers="process"),
        "loader": lambda: rate(DataLoader, dataset),
    })  # fmt: skip
    note = f"{statistics.median(rates['ours']):.0f} batches/s"
    return [Result("38.5 MB batches from processes, times DataLoader", median_ratio(rates, "ours", "loader"), 2.0, "", note)]


def decoding() -> list[Result]:
    """Work without the interpreter lock: threads, processes, and DataLoader."""
    dataset = Decoded(40)
    rates = compare({
        "thread": lambda: rate(loader, dataset, fetchers="thread"),
        "process": lambda: rate(loader, dataset, fetchers="process"),
        "loader": lambda: rate(DataLoader, dataset),
    })  # fmt: skip
    return [
        Result(
            f"decoding without the interpreter lock, {side}, times DataLoader",
            median_ratio(rates, side, "loader"),
            None,  # the work is the same, and so are the cores
            "",
            f"{statistics.median(rates[side]):.0f} batches/s",
        )
        for side in ("thread", "process")
    ]


def main(only: str = "") -> int:
    """Run every benchmark whose name contains `only`, print the report; 0 if every target that was measured is met."""
    return report({"large": large, "decoding": decoding}, only)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
