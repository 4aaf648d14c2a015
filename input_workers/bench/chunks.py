"""Chunks of rows for the benchmarks, made beforehand or slices of arrays that stay, and sources that are read to their end."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

import input_workers as iw
from input_workers.bench.measure import Drained, drain_all

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "IMAGE",
    "MIXED_SIZES",
    "DataSet",
    "hand_over",
    "make_chunks",
    "read_buffers",
    "read_handed_over",
    "read_in_order",
    "read_resident",
    "resident_rows",
    "slices_of_buffers",
]

IMAGE = (3, 32, 32)  # of float32: 12 KB
MIXED_SIZES: list[int] = np.random.default_rng(0).integers(1, 65, 2000).tolist()


class DataSet:
    """Rows of 12 KB with labels that stay in memory, and the bounds of the chunks to be read from them.

    It is larger than the processor's caches, and the chunks lie anywhere in it.
    """

    def __init__(self, sizes: Sequence[int], rows: int = 16_384) -> None:
        self.data = np.full((rows, *IMAGE), 1.0, np.float32)
        self.label = np.full(rows, 1)
        begins = np.random.default_rng(1).integers(0, rows - max(sizes) + 1, len(sizes)).tolist()
        self.bounds = [(begin, begin + size) for begin, size in zip(begins, sizes, strict=True)]
        self.rows = sum(sizes)

    def chunks(self) -> Iterator[list[NDArray[Any]]]:
        """Yield the chunks, as slices of the data set."""
        for begin, end in self.bounds:
            yield [self.data[begin:end], self.label[begin:end]]


def make_chunks(sizes: Sequence[int], shape: tuple[int, ...]) -> collections.deque[list[NDArray[Any]]]:
    """Return chunks as a fetch function would have made them: nothing else refers to their arrays."""
    return collections.deque([np.full((rows, *shape), 1.0, np.float32), np.full(rows, 1)] for rows in sizes)


def resident_rows(count: int, shape: tuple[int, ...]) -> list[list[NDArray[Any]]]:
    """Return `count` chunks of one row each, views of two arrays that stay."""
    data, label = np.full((1024, *shape), 1.0, np.float32), np.full(1024, 1)
    rows = [[data[row : row + 1], label[row : row + 1]] for row in range(1024)]
    return [rows[index % 1024] for index in range(count)]


def hand_over(chunks: Sequence[list[NDArray[Any]]]) -> Callable[[int, int], list[NDArray[Any]]]:
    """Return a fetch function that costs nothing: it returns the next of these chunks and keeps no reference to it."""
    following = iter(chunks.popleft, None) if isinstance(chunks, collections.deque) else iter(chunks)

    def fetch(worker_id: int, batch_size: int) -> list[NDArray[Any]]:  # noqa: ARG001
        try:
            return next(following)
        except (IndexError, StopIteration):
            raise iw.EndOfData from None

    return fetch


def read_handed_over(sizes: Sequence[int]) -> Drained:
    """Read chunks of 12 KB rows that were made beforehand, by 2 fetchers."""
    return drain_all(hand_over(make_chunks(sizes, IMAGE)), sum(sizes), 2)


def read_resident(data_set: DataSet, workers: int = 2) -> Drained:
    """Read chunks that are slices of a data set in memory."""
    # Fetchers share an iterator of the list: unlike a generator, it may be asked by several threads.
    bounds = iter(data_set.bounds)

    def fetch(worker_id: int, batch_size: int) -> list[NDArray[Any]]:  # noqa: ARG001
        begin, end = next(bounds, (0, 0))
        if not end:
            raise iw.EndOfData
        return [data_set.data[begin:end], data_set.label[begin:end]]

    return drain_all(fetch, data_set.rows, workers)


def slices_of_buffers(sizes: Sequence[int]) -> Iterator[list[NDArray[Any]]]:
    """Yield slices of two buffers in turn."""
    buffers = [_new_buffer(sizes) for _ in range(2)]
    for index, size in enumerate(sizes):
        data, label = buffers[index % 2]
        yield [data[:size], label[:size]]


def read_buffers(sizes: Sequence[int]) -> Drained:
    """Read chunks that are slices of one buffer per fetcher, as if each call had filled the buffer anew; 2 fetchers."""
    buffers: dict[int, list[NDArray[Any]]] = {}
    remaining = iter(sizes)

    def fetch(worker_id: int, batch_size: int) -> list[NDArray[Any]]:  # noqa: ARG001
        size = next(remaining, 0)
        if not size:
            raise iw.EndOfData
        if worker_id not in buffers:
            buffers[worker_id] = _new_buffer(sizes)
        data, label = buffers[worker_id]
        return [data[:size], label[:size]]

    return drain_all(fetch, sum(sizes), 2)


def _new_buffer(sizes: Sequence[int]) -> list[NDArray[Any]]:
    return [np.full((max(sizes), *IMAGE), 1.0, np.float32), np.full(max(sizes), 1)]


def read_in_order(data_set: DataSet, ordered: bool, epochs: int = 4) -> Drained:
    """Read a Stream of arrays in memory, in requests of 32 rows of 12 KB; 2 fetchers."""
    source = iw.sources.Arrays(data_set.data, data_set.label)
    stream = iw.Stream(source, rows_per_request=32, epochs=epochs)
    return drain_all(stream, len(data_set.label) * epochs, 2, ordered=ordered)
