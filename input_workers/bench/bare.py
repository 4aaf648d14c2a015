"""What a loop without the service achieves on the same rows, and torchdata.nodes as a peer: the limits of the benchmarks."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.bench.measure import BATCH, Drained, Stopwatch

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["assemble_pictures", "copy_chunks", "copy_in_threads", "decode_pictures", "read_torchdata"]

SLOTS = 6  # what a source uses: a device queue of 4, one in the trainer's hands, one being filled
PICTURES_PER_BATCH = 64


def copy_chunks(chunks: Iterable[Sequence[NDArray[Any]]], shape: tuple[int, ...]) -> float:
    """Return the rows/s of one thread that copies chunks into reused slots, with nothing between."""
    slots = _make_slots(shape)
    watch = Stopwatch()
    with watch.running():
        rows = _copy(chunks, slots)
    return rows / watch.seconds


def copy_in_threads(chunks: Sequence[Sequence[NDArray[Any]]], shape: tuple[int, ...], count: int) -> float:
    """Return the rows/s of some threads that each copy their share of the chunks into slots of their own."""
    return _run_threads([
        functools.partial(_copy, chunks[index::count], _make_slots(shape)) for index in range(count)
    ])  # fmt: skip


def _make_slots(shape: tuple[int, ...]) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    return [(np.full((BATCH, *shape), 0.0, np.float32), np.full(BATCH, 0)) for _ in range(SLOTS)]


def _copy(chunks: Iterable[Sequence[NDArray[Any]]], slots: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> int:
    """Copy chunks into one slot after the other; return the number of rows."""
    turn = filled = rows = 0
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
    return rows


def _run_threads(works: Sequence[Callable[[], int]]) -> float:
    """Run functions that return a number of rows, each in a thread; return the rows/s of all."""
    rows: list[int] = []
    threads = [threading.Thread(target=lambda work=work: rows.append(work())) for work in works]
    watch = Stopwatch()
    with watch.running():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if len(rows) != len(works):
        raise RuntimeError(f"benchmark: {len(works) - len(rows)} of {len(works)} threads have failed")
    return sum(rows) / watch.seconds


def decode_pictures(paths: Sequence[str], size: tuple[int, int]) -> float:
    """Return the pictures/s of two threads that decode and resize into a reused array, with nothing between."""
    decode = _decoder(size)
    remaining = iter(paths)

    def work() -> int:
        out = np.empty((PICTURES_PER_BATCH, *size, 3), np.uint8)
        count = 0
        for path in remaining:
            decode(path, out[count % PICTURES_PER_BATCH])
            count += 1
        return count

    return _run_threads([work, work])


def assemble_pictures(paths: Sequence[str], size: tuple[int, int]) -> float:
    """Return the pictures/s of two threads that each decode new batches of 64 rows, which a third thread receives."""
    decode = _decoder(size)
    remaining = iter([paths[begin : begin + PICTURES_PER_BATCH] for begin in range(0, len(paths), PICTURES_PER_BATCH)])
    batches: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> int:
        count = 0
        for part in remaining:
            images, labels = np.empty((len(part), *size, 3), np.uint8), np.zeros(len(part), np.int64)
            for path, image in zip(part, images, strict=True):
                decode(path, image)
            batches.put((images, labels))
            count += len(part)
        batches.put(None)
        return count

    def receive() -> int:
        # Each worker puts None at its end.
        for _ in range(2):
            for _batch in iter(batches.get, None):
                pass
        return 0

    return _run_threads([work, work, receive])


def _decoder(size: tuple[int, int]) -> Callable[[str, NDArray[np.uint8]], None]:
    """Return a function that decodes a file into an array."""
    import cv2

    cv2.setNumThreads(1)
    flag = getattr(cv2, "IMREAD_COLOR_RGB", cv2.IMREAD_COLOR)
    width_height = size[::-1]

    def decode(path: str, out: NDArray[np.uint8]) -> None:
        picture = cv2.imdecode(np.fromfile(path, np.uint8), flag)
        cv2.resize(picture, width_height, dst=out, interpolation=cv2.INTER_AREA)

    return decode


def read_torchdata(chunks: Iterable[Sequence[NDArray[Any]]]) -> Drained:
    """Read chunks by torchdata.nodes: rows are taken apart, collected in lists and stacked by 2 workers."""
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
    return Drained(count, watch.seconds, watch.processor_seconds)
