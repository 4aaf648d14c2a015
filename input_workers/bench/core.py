"""`input-workers bench core`: what the service costs, as ratios to a bare copy, a bare decode and a peer in the same run."""

from __future__ import annotations

import collections
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import input_workers as iw
from input_workers.bench.measure import Result, Stopwatch, compare, drain, median_ratio, table

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["main"]

BATCH = 128
SLOTS = 6  # what a source uses: a device queue of 4, one in the trainer's hands, one in the making


def make_chunks(sizes: Sequence[int], shape: tuple[int, ...]) -> collections.deque[list[NDArray[Any]]]:
    """Return chunks as a fetch function would have made them: nobody else refers to their arrays."""
    return collections.deque([np.full((rows, *shape), 1.0, np.float32), np.full(rows, 1)] for rows in sizes)


def resident_rows(count: int, shape: tuple[int, ...]) -> list[list[NDArray[Any]]]:
    """Return `count` chunks of one row each, views of two arrays that stay."""
    data, label = np.full((1024, *shape), 1.0, np.float32), np.full(1024, 1)
    rows = [[data[row : row + 1], label[row : row + 1]] for row in range(1024)]
    return [rows[index % 1024] for index in range(count)]


def hand_over(chunks: Sequence[list[NDArray[Any]]]) -> Callable[[int, int], list[NDArray[Any]]]:
    """Return a fetch function that costs nothing: it returns the next of these chunks, and lets go of it."""
    following = iter(chunks.popleft, None) if isinstance(chunks, collections.deque) else iter(chunks)

    def fetch(worker_id: int, batch_size: int) -> list[NDArray[Any]]:  # noqa: ARG001
        try:
            return next(following)
        except (IndexError, StopIteration):
            raise iw.EndOfData from None

    return fetch


def bare_copy(chunks: Sequence[Sequence[NDArray[Any]]], shape: tuple[int, ...]) -> float:
    """Return the rows/s of one thread that copies these chunks into reused slots, with nothing between: the limit."""
    slots = [(np.full((BATCH, *shape), 0.0, np.float32), np.full(BATCH, 0)) for _ in range(SLOTS)]
    turn = filled = rows = 0
    watch = Stopwatch()
    with watch.running():
        for data, label in chunks:
            begin, count = 0, len(label)
            rows += count
            while begin < count:
                step = min(count - begin, BATCH - filled)
                slot_data, slot_label = slots[turn]
                if step == count:
                    slot_data[filled : filled + step] = data
                    slot_label[filled : filled + step] = label
                else:
                    slot_data[filled : filled + step] = data[begin : begin + step]
                    slot_label[filled : filled + step] = label[begin : begin + step]
                begin += step
                filled += step
                if filled == BATCH:
                    filled, turn = 0, (turn + 1) % SLOTS
    return rows / watch.seconds


def rechunk(
    name: str, make: Callable[[], Sequence[list[NDArray[Any]]]], workers: int, target: float, peer: bool = False
) -> list[Result]:
    """Compare the service with the bare copy of the same chunks and, as a peer, torchdata.nodes' batcher where it is there."""
    shape = make()[0][0].shape[1:]

    def ours() -> float:
        chunks = make()
        wanted = sum(len(label) for _, label in chunks)
        rows, seconds = drain(hand_over(chunks), ["data", "label"], BATCH, workers, last_batch="keep")
        if rows != wanted:
            raise RuntimeError(f"benchmark: {rows} of {wanted} rows came")
        return rows / seconds

    sides: dict[str, Callable[[], float]] = {"limit": lambda: bare_copy(make(), shape), "ours": ours}
    peer_there = importlib.util.find_spec("torchdata") is not None
    if peer and peer_there:
        sides["torchdata"] = lambda: torchdata_batcher(make())
    rates = compare(sides)
    rate = f"{statistics.median(rates['ours']):,.0f} rows/s"
    results = [Result(f"{name}, of one bare copy", median_ratio(rates, "ours", "limit"), target, "", rate)]
    if not peer:
        return results
    ratio = median_ratio(rates, "ours", "torchdata") if peer_there else None
    note = "torchdata.nodes.Batcher" if peer_there else "pip install input-workers[bench]"
    return [*results, Result(f"{name}, times torchdata.nodes", ratio, 2.5, "", note)]


def rechunk_large() -> list[Result]:
    """Chunks of 1 to 64 rows of 12 KB, made beforehand and handed over."""
    sizes = [int(rows) for rows in np.random.default_rng(0).integers(1, 65, 1000)]
    return rechunk("re-chunk 1 to 64 rows of 12 KB", lambda: make_chunks(sizes, (3, 32, 32)), 2, 0.6, peer=True)


def rechunk_small() -> list[Result]:
    """Chunks of one row of 72 bytes, out of arrays that stay."""
    return rechunk("1-row chunks of 72 bytes", lambda: resident_rows(300_000, (16,)), 1, 0.35)


# Freeing an array of hundreds of KB gives its pages back to the system, which takes as long as copying it did. That is the
# fetch function's memory and no cost of the service, so the limit has none of it; glibc can be told to keep the pages.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(100 << 20),
}


def rechunk_in_children() -> list[Result]:
    """Run `rechunk_large` in two processes: with glibc's malloc keeping freed memory, and as it is (no target)."""
    results = []
    for name, environment in (("", KEEP_FREED_MEMORY), (", memory given back", {})):
        command = [sys.executable, "-m", "input_workers.bench.core", "rechunk_large"]
        answer = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
        for row in json.loads(answer.stdout):
            result = Result(**row)
            results.append(replace(result, name=result.name + name, target=result.target if not name else None))
    return results


def torchdata_batcher(chunks: Sequence[Sequence[NDArray[Any]]]) -> float:
    """Return the rows/s of torchdata.nodes: rows are unpacked, batched into lists and stacked."""
    from torchdata import nodes

    def rows() -> Any:
        for data, label in chunks:
            yield from zip(data, label, strict=True)

    node = nodes.Batcher(nodes.IterableWrapper(rows()), batch_size=BATCH, drop_last=False)
    node = nodes.ParallelMapper(node, lambda batch: [np.stack(column) for column in zip(*batch, strict=True)], num_workers=2)
    count = 0
    watch = Stopwatch()
    with watch.running():
        for _, label in nodes.Loader(node):
            count += len(label)
    return count / watch.seconds


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
    picture, label = np.zeros((64, 224, 224, 3), np.uint8), np.zeros(64, np.int64)
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
        "memory": flat_memory,
        "sources": many_sources,
    }
    results: list[Result] = []
    for name, part in parts.items():
        if only in name:
            measured = part()
            results += measured
            print(table(measured), flush=True)
    return 0 if all(result.met or result.value is None for result in results) else 1


if __name__ == "__main__":
    if sys.argv[1:] == ["rechunk_large"]:
        print(json.dumps([asdict(result) for result in rechunk_large()]))
    else:
        sys.exit(main(*sys.argv[1:]))
