"""Sources that wait, decode, stand full or are many, and what they took; see also chunks."""

from __future__ import annotations

import collections
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import input_workers as iw
from input_workers.bench.measure import Drained, Stopwatch, drain, drain_all

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "PICTURES",
    "PICTURE_SIZE",
    "PREFETCH",
    "in_the_middle",
    "make_large_arrays",
    "next_batch_s",
    "read_pictures",
    "run_many_sources",
    "wait_in_fetchers",
    "write_pictures",
]

PICTURE_SIZE = (224, 224)
PICTURES = (64, *PICTURE_SIZE, 3)  # of float32: 38.5 MB
PREFETCH = 4


def write_pictures(folder: str, count: int) -> list[str]:
    """Write JPEG files of 500x375 pixels and about 48 KB, of one class; return their paths."""
    import cv2

    rng = np.random.default_rng(0)
    blobs = []
    for _ in range(24):
        noise = rng.integers(0, 256, (24, 32, 3), np.uint8)
        picture = cv2.resize(noise, (500, 375), interpolation=cv2.INTER_CUBIC)
        blobs.append(cv2.imencode(".jpg", picture)[1].tobytes())
    paths = [Path(folder) / "a" / f"{index:05}.jpg" for index in range(count)]
    paths[0].parent.mkdir()
    for index, path in enumerate(paths):
        path.write_bytes(blobs[index % len(blobs)])
    return [str(path) for path in paths]


def read_pictures(folder: str, rows_per_request: int | None = None) -> Drained:
    """Decode the pictures of a folder to 224x224 in batches of 64; 2 fetchers."""
    stream = iw.Stream(iw.sources.ImageFolder(folder, PICTURE_SIZE), rows_per_request=rows_per_request)
    return drain(stream, ["image", "label"], PICTURES[0], 2, last_batch="keep")


def wait_in_fetchers(calls: int = 200, workers: int = 64) -> float:
    """Return the rate of fetchers that wait 20 ms a call, as a share of what these waits allow."""
    call_s, rows_per_call = 0.02, 32
    chunk: list[NDArray[Any]] = [np.zeros((rows_per_call, 16), np.float32), np.zeros(rows_per_call, np.int64)]
    remaining: collections.defaultdict[int, int] = collections.defaultdict(lambda: calls)

    def fetch(worker_id: int, batch_size: int) -> list[NDArray[Any]]:  # noqa: ARG001
        if not remaining[worker_id]:
            raise iw.EndOfData
        remaining[worker_id] -= 1
        time.sleep(call_s)
        return chunk

    return drain_all(fetch, calls * workers * rows_per_call, workers).rate / (workers * rows_per_call / call_s)


def next_batch_s(feed: str) -> float:
    """Return the seconds that `next_batch` takes while batches of 64x224x224x3 uint8 are ready: the median."""
    depth = 64
    chunk: list[NDArray[Any]] = [np.zeros(PICTURES, np.uint8), np.zeros(PICTURES[0], np.int32)]
    coordinator = iw.init_data_input_workers(
        feed,
        ["image", "label"],
        lambda worker_id, batch_size: chunk,  # noqa: ARG005
        PICTURES[0],
        1,
        "bench",
        device_queue_depth=depth,
        coordinator=iw.GlobalCoordinator(),
    )
    took = []
    with coordinator:
        source = coordinator["bench"]
        held = [source.next_batch() for _ in range(2)]
        for _ in range(5):
            while source.stats().device_queue_depth < depth:
                time.sleep(0.01)
            for _ in range(depth // 2):
                started = time.perf_counter()
                held[0] = source.next_batch()
                took.append(time.perf_counter() - started)
        del held
    return statistics.median(took)


class SourcesCost(NamedTuple):
    """What a number of sources costs."""

    processor_us: float  # per row
    start_s: float


def run_many_sources(count: int, seconds: float) -> SourcesCost:
    """Run sources of 1,000 rows/s each for some seconds, after one second in which they begin."""
    rows_per_call = 20
    coordinator = iw.GlobalCoordinator()
    data = np.zeros((rows_per_call, 16), np.float32)

    def fetch(worker_id: int, batch_size: int) -> list[NDArray[Any]]:  # noqa: ARG001
        time.sleep(rows_per_call / 1000)
        return [data]

    for index in range(count):
        iw.init_data_input_workers("numpy", ["data"], fetch, 100, 1, f"source_{index}", coordinator=coordinator)
    started = time.perf_counter()
    coordinator.start()
    start_s = time.perf_counter() - started

    def read(source: Any) -> None:
        try:
            for _ in source:
                pass
        except iw.QueueClosed:
            pass

    readers = [threading.Thread(target=read, args=(source,)) for source in coordinator]
    for reader in readers:
        reader.start()
    time.sleep(1.0)
    rows, used = _rows_delivered(coordinator), time.process_time()
    time.sleep(seconds)
    used = time.process_time() - used
    rows = _rows_delivered(coordinator) - rows
    coordinator.stop()
    for reader in readers:
        reader.join()
    return SourcesCost(used / rows * 1e6, start_s)


def _rows_delivered(coordinator: iw.GlobalCoordinator) -> int:
    return sum(stats.rows_delivered for stats in coordinator.stats().values())


def make_large_arrays(fetchers: iw.Threads, batches: int = 100) -> float:
    """Return the rows/s of 2 threads whose every call makes and fills a new array of 38.5 MB."""
    coordinator = iw.init_data_input_workers(
        "numpy",
        ["data"],
        lambda worker_id, batch_size: [np.full(PICTURES, 1.0, np.float32)],  # noqa: ARG005
        PICTURES[0],
        2,
        "bench",
        PREFETCH,
        fetchers=fetchers,
        coordinator=iw.GlobalCoordinator(),
    )
    with coordinator:
        return in_the_middle(iter(coordinator["bench"]), batches) * PICTURES[0]


def in_the_middle(batches: Iterator[Any], count: int) -> float:
    """Return the batches/s of all but the first and the last tenth: in between, batches are made as fast as they are taken."""
    margin = max(2 * PREFETCH, count // 10)
    watch = Stopwatch()
    for _ in range(margin):
        next(batches)
    with watch.running():
        for _ in range(count - 2 * margin):
            next(batches)
    return (count - 2 * margin) / watch.seconds
