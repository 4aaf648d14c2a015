"""Chunks made beforehand go in, rows per second come out: of a bare copy, of the service, of torchdata.nodes."""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

import input_workers as iw
from input_workers.bench.measure import BATCH, Result, Stopwatch, compare, drain, median_ratio

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["rechunk_in_children", "rechunk_small"]

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
    sizes = [int(rows) for rows in np.random.default_rng(0).integers(1, 65, 2000)]
    return rechunk("re-chunk 1 to 64 rows of 12 KB", lambda: make_chunks(sizes, (3, 32, 32)), 2, 0.6, peer=True)


def rechunk_small() -> list[Result]:
    """Chunks of one row of 72 bytes, out of arrays that stay."""
    return rechunk("1-row chunks of 72 bytes", lambda: resident_rows(300_000, (16,)), 1, 0.35)


# Freeing an array of hundreds of KB gives its pages back to the system, which takes as long as copying it did. That is the
# fetch function's memory and no cost of the service, so the limit has none of it; glibc can be told to keep the pages.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def rechunk_in_children() -> list[Result]:
    """Run `rechunk_large` in two processes: with glibc's malloc keeping freed memory, and as it is (no target)."""
    results = []
    for name, environment in (("", KEEP_FREED_MEMORY), (", memory given back", {})):
        command = [sys.executable, "-m", "input_workers.bench.rechunk"]
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


if __name__ == "__main__":
    print(json.dumps([asdict(result) for result in rechunk_large()]))
