"""Process fetchers beside PyTorch's DataLoader with as many workers, and beside processes that send nothing back."""

from __future__ import annotations

import importlib.util
import multiprocessing
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

import input_workers as iw
from input_workers.bench.measure import Result, Stopwatch, compare, drain, median_ratio, report
from input_workers.bench.versions import Figure, Workload
from input_workers.bench.workloads import PICTURES, PREFETCH, in_the_middle

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["WORKLOADS", "main"]

WORKERS = 2


class Batches:
    """A whole batch for each row number: a PyTorch data set and, by `fetch`, a source whose requests are one batch each."""

    def __init__(self, count: int, make: Callable[[int, NDArray[Any] | None], NDArray[Any]]) -> None:
        self.count = count
        self._make = make

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> NDArray[Any]:
        if index >= self.count:
            raise IndexError
        return self._make(index, None)


class Rows:
    """Rows of which every request is a batch. Unlike a data set's, its batches may be written into lent memory."""

    def __init__(self, batches: Batches, rows_per_batch: int, uses_out: bool) -> None:
        self._batches = batches
        self._rows = rows_per_batch
        self._uses_out = uses_out

    def __len__(self) -> int:
        return len(self._batches) * self._rows

    def fetch(self, rows: NDArray[np.int64], request: iw.FetchRequest) -> list[NDArray[Any]]:
        """Return the batch of this request."""
        out = request.out if self._uses_out else None
        return [self._batches._make(request.index, None if out is None else out[0])]


def filled(index: int, out: NDArray[Any] | None) -> NDArray[Any]:
    """Return a batch of pictures of one value."""
    array = np.empty(PICTURES, np.float32) if out is None else out
    array.fill(index)
    return array


def rolled(index: int, out: NDArray[Any] | None) -> NDArray[Any]:  # noqa: ARG001
    """Return 32 pictures of 64x64 whose rows were rolled one by one: Python's work, not NumPy's."""
    pictures = np.full((32, 64, 64), index, np.float32)
    for picture in pictures:
        for row in range(64):
            picture[row] = np.roll(picture[row], row)
    return pictures


def service(batches: Batches, rows: int, uses_out: bool = False) -> float:
    """Return our batches/s."""
    coordinator = iw.init_data_input_workers(
        "numpy",
        ["data"],
        iw.Stream(Rows(batches, rows, uses_out), rows_per_request=rows),
        rows,
        WORKERS,
        "bench",
        PREFETCH,
        fetchers="process",
        coordinator=iw.GlobalCoordinator(),
    )
    with coordinator:
        return in_the_middle(iter(coordinator["bench"]), len(batches))


def data_loader(batches: Batches) -> float:
    """Return the batches/s of PyTorch's DataLoader on the same."""
    import torch
    from torch.utils.data import DataLoader

    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=WORKERS,
        prefetch_factor=PREFETCH,
        collate_fn=torch.from_numpy,
        multiprocessing_context="forkserver",
    )
    return in_the_middle(iter(loader), len(batches))


def _make_all(batches: Batches, first: int, ready: Any, go: Any) -> None:
    ready.release()
    go.wait()
    for index in range(first, len(batches), WORKERS):
        batches[index]


def nothing_sent(batches: Batches) -> float:
    """Return the batches/s of processes that make them and send nothing back: the limit."""
    context = multiprocessing.get_context("forkserver")
    ready, go = context.Semaphore(0), context.Event()
    processes = [context.Process(target=_make_all, args=(batches, first, ready, go)) for first in range(WORKERS)]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    watch = Stopwatch()
    with watch.running():
        go.set()
        for process in processes:
            process.join()
    return len(batches) / watch.seconds


def large() -> list[Result]:
    """38.5 MB batches, filled by the worker: by the ordinary path and into `request.out`."""
    batches = Batches(80, filled)
    name = "38.5 MB batches, {}, times DataLoader"
    if importlib.util.find_spec("torch") is None:
        note = "pip install input-workers[bench]"
        return [
            Result(name.format("returned"), None, 5.0, "", note),
            Result(name.format("in request.out"), None, 12.0, "", note),
        ]
    rates = compare({
        "returned": lambda: service(batches, PICTURES[0]),
        "out": lambda: service(batches, PICTURES[0], uses_out=True),
        "loader": lambda: data_loader(batches),
    })  # fmt: skip
    return [
        Result(
            name.format(how), median_ratio(rates, side, "loader"), target, "", f"{statistics.median(rates[side]):.0f} batches/s"
        )
        for how, side, target in (("returned", "returned", 5.0), ("in request.out", "out", 12.0))
    ]


def pure_python() -> list[Result]:
    """A transform in Python, 2,048 rows rolled for a batch."""
    batches = Batches(300, rolled)
    sides: dict[str, Callable[[], float]] = {
        "limit": lambda: nothing_sent(batches),
        "ours": lambda: service(batches, 32),
    }
    if importlib.util.find_spec("torch") is not None:
        sides["loader"] = lambda: data_loader(batches)
    rates = compare(sides)
    results = [Result("pure-Python transform, of nothing sent back", median_ratio(rates, "ours", "limit"), 0.97, "", "")]
    if "loader" in sides:
        results.append(
            Result("DataLoader, of nothing sent back", median_ratio(rates, "loader", "limit"), None, "", "for comparison")
        )
    return results


def read_small(calls: int = 200_000) -> float:
    """Return the rows/s of chunks of one row of 16 float32, from start to end."""

    def fetch(worker_id: int, batch_size: int, remaining: list[int] = [calls // WORKERS]) -> list[NDArray[Any]]:  # noqa: ARG001, B006
        if not remaining[0]:
            raise iw.EndOfData
        remaining[0] -= 1
        return [np.zeros((1, 16), np.float32)]

    return drain(fetch, ["data"], 128, WORKERS, fetchers="process").rate


def small() -> list[Result]:
    """Chunks of one row of 16 float32."""
    rates = [read_small() for _ in range(5)]
    return [Result("chunks of one row of 16 float32", statistics.median(rates), 25_000, "/s", "from start to end")]


def first_batch() -> list[Result]:
    """Seconds from start() to the first batch, of a fresh interpreter's first start."""
    code = (
        "import time, numpy as np, input_workers as iw\n"
        "fetch = lambda worker_id, batch_size: [np.zeros((32, 16), np.float32)]\n"
        "c = iw.init_data_input_workers('numpy', ['data'], fetch, 32, 2, fetchers='process')\n"
        "started = time.perf_counter()\n"
        "c.start()\n"
        "c['train'].next_batch()\n"
        "print(time.perf_counter() - started)\n"
        "c.stop()\n"
    )
    took = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        took.append(float(done.stdout))
    return [Result("first batch after start()", statistics.median(took), 1.5, "s", "2 workers", at_most=True)]


def _batches(name: str, batches: Batches, rows: int, uses_out: bool = False) -> list[Figure]:
    return [Figure(name, service(batches, rows, uses_out), "batches/s")]


# Compared with another version.
WORKLOADS = {
    "large_returned": Workload(lambda: _batches("38.5 MB batches, returned", Batches(160, filled), PICTURES[0])),
    "large_out": Workload(lambda: _batches("38.5 MB batches, in request.out", Batches(300, filled), PICTURES[0], True)),
    "python": Workload(lambda: _batches("pure-Python transform", Batches(300, rolled), 32)),
    "small": Workload(lambda: [Figure("chunks of one row of 16 float32", read_small(), "rows/s")]),
}


def main(only: str = "") -> int:
    """Run every benchmark whose name contains `only`, print the report; 0 if every target that was measured is met."""
    parts: dict[str, Callable[[], list[Result]]] = {
        "large": large,
        "python": pure_python,
        "small": small,
        "first": first_batch,
    }
    return report(parts, only)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
