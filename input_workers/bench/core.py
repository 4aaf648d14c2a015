"""`input-workers bench core`: what the service costs, as ratios to a bare copy, a bare decode and a peer in the same run."""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import input_workers as iw
from input_workers.bench.measure import BATCH, Result, Stopwatch, compare, drain, median_ratio, report
from input_workers.bench.rechunk import rechunk_in_children, rechunk_small
from input_workers.bench.scrape import scraped

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["main"]


def decode() -> list[Result]:
    """Compare ImageFolder with two threads that decode and resize with nothing between."""
    import cv2

    files, size = 1536, (224, 224)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a").mkdir()
        rng = np.random.default_rng(0)
        blobs = []
        for _ in range(24):
            noise = rng.integers(0, 256, (24, 32, 3), np.uint8)
            picture = cv2.resize(noise, (500, 375), interpolation=cv2.INTER_CUBIC)
            blobs.append(cv2.imencode(".jpg", picture)[1].tobytes())
        for index in range(files):
            (Path(folder) / "a" / f"{index:05}.jpg").write_bytes(blobs[index % len(blobs)])
        source = iw.sources.ImageFolder(folder, size)
        paths = [str(path) for path in sorted((Path(folder) / "a").iterdir())]
        flag = getattr(cv2, "IMREAD_COLOR_RGB", cv2.IMREAD_COLOR)

        def limit() -> float:
            cv2.setNumThreads(1)
            turn = iter(paths)

            def work() -> None:
                out = np.empty((64, *size, 3), np.uint8)
                for index in itertools.cycle(range(64)):
                    path = next(turn, None)
                    if path is None:
                        return
                    data = np.fromfile(path, np.uint8)
                    cv2.resize(cv2.imdecode(data, flag), size[::-1], dst=out[index], interpolation=cv2.INTER_AREA)

            threads = [threading.Thread(target=work) for _ in range(2)]
            watch = Stopwatch()
            with watch.running():
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            return files / watch.seconds

        def ours() -> float:
            rows, seconds = drain(iw.Stream(source), ["image", "label"], 64, 2, last_batch="keep")
            return rows / seconds

        rates = compare({"limit": limit, "ours": ours})
    note = f"{statistics.median(rates['ours']):,.0f} pictures/s"
    return [Result("decode, of two bare decoding threads", median_ratio(rates, "ours", "limit"), 0.96, "", note)]


def waiting() -> list[Result]:
    """64 fetchers that wait 20 ms a call: is every wait used?"""
    calls, workers, seconds_per_call, rows_per_call = 200, 64, 0.02, 32
    data, label = np.zeros((rows_per_call, 16), np.float32), np.zeros(rows_per_call, np.int64)

    def ours() -> float:
        left = [calls] * workers
        numbers: dict[int, int] = {}

        def fetch(worker_id: int, batch_size: int) -> list[NDArray[Any]]:  # noqa: ARG001
            number = numbers.setdefault(worker_id, len(numbers))
            if not left[number]:
                raise iw.EndOfData
            left[number] -= 1
            time.sleep(seconds_per_call)
            return [data, label]

        rows, seconds = drain(fetch, ["data", "label"], BATCH, workers, last_batch="keep")
        return rows / seconds / (workers * rows_per_call / seconds_per_call)

    ratios = compare({"ours": ours})["ours"]
    return [Result("waiting work, of 64 x 32 rows / 20 ms", statistics.median(ratios), 0.98, "", "64 fetchers")]


def next_batch(feed: str, target_us: float) -> list[Result]:
    """How long `next_batch` takes where a batch of 64x224x224x3 uint8 is ready."""
    name = f"next_batch, full queue, {feed}"
    if importlib.util.find_spec(feed) is None:
        return [Result(name, None, target_us, "us", f"pip install input-workers[{feed}]", at_most=True)]
    depth = 64
    picture, label = np.zeros((64, 224, 224, 3), np.uint8), np.zeros(64, np.int32)
    coordinator = iw.init_data_input_workers(
        feed,
        ["image", "label"],
        lambda worker_id, batch_size: [picture, label],  # noqa: ARG005
        64,
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
    return [Result(name, statistics.median(took) * 1e6, target_us, "us", "64x224x224x3 uint8", at_most=True)]


def many_sources() -> list[Result]:
    """200 sources at 1,000 rows/s each: processor time per row, of one source's; and how long they take to start."""

    def cost(count: int, seconds: float) -> tuple[float, float]:
        """Return (processor seconds per row, seconds to start)."""
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
        start_seconds = time.perf_counter() - started

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
        before, used = sum(stats.rows_delivered for stats in coordinator.stats().values()), time.process_time()
        time.sleep(seconds)
        used = time.process_time() - used
        rows = sum(stats.rows_delivered for stats in coordinator.stats().values()) - before
        coordinator.stop()
        for reader in readers:
            reader.join()
        return used / rows, start_seconds

    ratios, starts = [], []
    for _ in range(3):
        one, _ = cost(1, 8.0)
        many, start_seconds = cost(200, 3.0)
        ratios.append(many / one)
        starts.append(start_seconds)
    return [
        Result("200 sources, cost a row of one's", statistics.median(ratios), 1.5, "", "1,000 rows/s each", at_most=True),
        Result("200 sources, start", statistics.median(starts), 1.0, "s", "", at_most=True),
    ]


def flat_memory() -> list[Result]:
    """Growth of the resident set over 100,000 batches, after the first 10,000."""
    data, label = np.zeros((32, 64), np.float32), np.zeros(32, np.int64)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    coordinator = iw.init_data_input_workers(
        "numpy",
        ["data", "label"],
        lambda worker_id, batch_size: [data, label],  # noqa: ARG005
        32,
        2,
        "bench",
        coordinator=iw.GlobalCoordinator(),
    )
    with coordinator:
        source = coordinator["bench"]
        for _ in range(10_000):
            source.next_batch()
        before = resident()
        for _ in range(100_000):
            source.next_batch()
        grown = (resident() - before) / 1e6
    return [Result("memory grown over 100,000 batches", grown, 2.0, "MB", "batches of 8.4 KB", at_most=True)]


def main(only: str = "") -> int:
    """Run every benchmark whose name contains `only`, print the report; 0 if every target that was measured is met."""
    parts: dict[str, Callable[[], list[Result]]] = {
        "rechunk": rechunk_in_children,
        "small": rechunk_small,
        "decode": decode,
        "waiting": waiting,
        "next_batch_numpy": lambda: next_batch("numpy", 20),
        "next_batch_tensorflow": lambda: next_batch("tensorflow", 30),
        "next_batch_torch": lambda: next_batch("torch", 30),
        "next_batch_jax": lambda: next_batch("jax", 30),
        "memory": flat_memory,
        "sources": many_sources,
        "scrape": scraped,
    }
    return report(parts, only)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
