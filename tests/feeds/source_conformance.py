"""What a source delivers through a feed, whatever its framework: the half of the feeds' conformance suite with threads."""

import gc
import itertools
import weakref
from typing import Any

import numpy as np
import pytest

import input_workers as iw

HELD, MORE = 20, 200


def rows_of(first: int, count: int, dtype: Any) -> np.ndarray:
    """Rows that say which they are: row r holds r, r + 1 and r + 2, in what the dtype can hold."""
    numbers = np.arange(first, first + count)[:, None] + np.arange(3)
    dtype = np.dtype(dtype)
    if dtype.kind == "S":
        return np.array([[f"row {n % 1000}" for n in row] for row in numbers], dtype)
    return (numbers % (2 if dtype.kind == "b" else 101)).astype(dtype)


class CountingSource:
    """A source whose row r says r, with the memory that was offered to it."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.lent: set[int] = set()

    def __len__(self) -> int:
        return self.rows

    def fetch(self, rows, request):
        arrays = [np.stack([rows_of(int(row), 1, np.float32)[0] for row in rows]), np.array(rows)]
        if request.out is None:
            return arrays
        for out, array in zip(request.out, arrays, strict=True):
            out[...] = array
            self.lent.add(out.ctypes.data)
        return request.out


def aligned_bytes(nbytes: int) -> np.ndarray:
    raw = np.empty(nbytes + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + nbytes]


class SourceConformance:
    """A feed's suite inherits it and says how to read what is delivered."""

    @pytest.mark.parametrize("chunk_rows", [1, 5, 8, 100], ids=lambda rows: f"chunks of {rows}")
    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_source_delivers_exact_batches_in_order(self, chunk_rows, workers):
        starts = iter(range(0, 200, chunk_rows))

        def fetch(worker_id, batch_size):
            first = next(starts, None)
            if first is None:
                raise iw.EndOfData
            count = min(chunk_rows, 200 - first)
            return [rows_of(first, count, np.float32), np.arange(first, first + count)]

        coordinator = iw.GlobalCoordinator()
        iw.init_data_input_workers(self.feed, ["data", "label"], fetch, 8, workers, coordinator=coordinator)
        with coordinator:
            batches = list(coordinator["train"])
        assert len(batches) == 25
        for number, batch in enumerate(batches):
            assert batch.valid_rows == 8
            assert self.same(batch.data, rows_of(number * 8, 8, np.float32))
            assert self.same(batch.label, np.arange(number * 8, number * 8 + 8))

    def test_batches_held_by_the_trainer_never_change_while_others_are_delivered(self):
        numbers = itertools.count()

        def fetch(worker_id, batch_size):
            first = next(numbers) * 7
            return [rows_of(first, 7, np.float32), np.arange(first, first + 7)]

        coordinator = iw.GlobalCoordinator()
        iw.init_data_input_workers(self.feed, ["data", "label"], fetch, 16, 1, coordinator=coordinator)
        with coordinator:
            held = [coordinator["train"].next_batch() for _ in range(HELD)]
            for _ in range(MORE):
                coordinator["train"].next_batch()
            for number, batch in enumerate(held):
                assert self.same(batch.label, np.arange(number * 16, number * 16 + 16))
                assert self.same(batch.data, rows_of(number * 16, 16, np.float32))

    def test_a_chunk_that_is_an_aligned_batch_becomes_the_batch_without_a_copy(self):
        if not self.shares_slots:
            pytest.skip("this device has memory of its own")
        source = CountingSource(40)
        coordinator = iw.GlobalCoordinator()
        iw.init_data_input_workers(self.feed, ["data", "label"], iw.Stream(source), 4, 1, coordinator=coordinator)
        with coordinator:
            batches = list(coordinator["train"])
        assert np.concatenate([self.value(batch.label) for batch in batches]).tolist() == list(range(40))
        # The first is fetched before it is known what rows look like, so no memory is lent for it.
        assert {self.address(batch.data) for batch in batches[1:]} <= source.lent

    def test_several_devices_each_get_their_own_batches(self):
        coordinator = iw.GlobalCoordinator()
        stream = iw.Stream(CountingSource(64), rows_per_request=5)
        for scope in ("a", "b"):
            iw.init_data_input_workers(self.feed, ["data", "label"], stream, 4, 1, name_scope=scope, coordinator=coordinator)
        with coordinator:
            pairs = list(zip(coordinator["a/train"], coordinator["b/train"], strict=True))
        labels = np.concatenate([self.value(batch.label) for pair in pairs for batch in pair])
        assert sorted(labels.tolist()) == list(range(64))

    @pytest.mark.parametrize("last_batch", ["keep", "pad"])
    @pytest.mark.parametrize("workers", [0, 1])
    def test_the_last_batch_is_shorter_or_padded_and_every_row_is_counted(self, last_batch, workers):
        coordinator = iw.GlobalCoordinator()
        stream = iw.Stream(CountingSource(44), rows_per_request=5)
        iw.init_data_input_workers(
            self.feed, ["data", "label"], stream, 8, workers, last_batch=last_batch, coordinator=coordinator
        )
        with coordinator:
            batches = list(coordinator["train"])
            stats = coordinator["train"].stats()
        assert [batch.valid_rows for batch in batches] == [8] * 5 + [4]
        padding = [43] * 4 if last_batch == "pad" else []
        labels = [self.value(batch.label) for batch in batches]
        assert np.concatenate(labels).tolist() == [*range(44), *padding]
        assert self.same(batches[-1].data, rows_of(40, 4, np.float32)[[0, 1, 2, 3] + [3] * len(padding)])
        assert (stats.rows_fetched, stats.rows_delivered, stats.rows_padded) == (44, 44, len(padding))
        assert (stats.batches_delivered, stats.rows_in_flight, sum(stats.rows_dropped.values())) == (6, 0, 0)

    def test_without_rebatching_chunks_are_delivered_as_they_came(self):
        sizes = [4, 12, 8, 4, 8]
        starts = iter(np.cumsum([0, *sizes[:-1]]).tolist())

        def fetch(worker_id, batch_size):
            first = next(starts, None)
            if first is None:
                raise iw.EndOfData
            count = dict(zip(np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True))[first]
            return [rows_of(first, count, np.float32), np.arange(first, first + count)]

        coordinator = iw.GlobalCoordinator()
        iw.init_data_input_workers(self.feed, ["data", "label"], fetch, 8, 1, rebatch=False, coordinator=coordinator)
        with coordinator:
            batches = list(coordinator["train"])
        assert [len(self.value(batch.label)) for batch in batches] == sizes
        assert np.concatenate([self.value(batch.label) for batch in batches]).tolist() == list(range(36))

    def test_rows_without_a_value_are_delivered(self):
        numbers = iter(range(5))

        def fetch(worker_id, batch_size):
            if next(numbers, None) is None:
                raise iw.EndOfData
            return [np.empty((8, 0, 3), np.float32), np.full(8, 2.0)]

        coordinator = iw.GlobalCoordinator()
        iw.init_data_input_workers(self.feed, ["data", "label"], fetch, 4, 1, coordinator=coordinator)
        with coordinator:
            batches = list(coordinator["train"])
        assert [self.value(batch.data).shape for batch in batches] == [(4, 0, 3)] * 10

    def test_host_memory_is_bounded_and_given_back(self):
        feed, alive, made = self.make_feed(), weakref.WeakSet(), []
        make = getattr(feed, "slot_memory", lambda nbytes: aligned_bytes(nbytes))

        class Memory(np.ndarray):
            __hash__ = object.__hash__

        def counted(nbytes):
            memory = make(nbytes).view(Memory)
            alive.add(memory)
            made.append(nbytes)
            return memory

        feed.slot_memory = counted
        numbers = itertools.count()

        def fetch(worker_id, batch_size):
            first = next(numbers) * 7
            return [rows_of(first, 7, np.float32)]

        coordinator, depth, buffered = iw.GlobalCoordinator(), 3, 2
        iw.init_data_input_workers(
            feed, ["data"], fetch, 16, 1, max_buffered_batches=buffered, device_queue_depth=depth, coordinator=coordinator
        )
        with coordinator:
            for _ in range(MORE):
                batch = coordinator["train"].next_batch()
            assert 0 < len(made) <= buffered + depth + 2 + 1  # the bound, the queue and two more, and the trainer's one
            held = [coordinator["train"].next_batch() for _ in range(HELD)]
            assert len(alive) <= HELD + depth + 3
            del held
            assert coordinator["train"].next_batch() is not None
        del batch
        gc.collect()
        assert len(alive) == 0

    def test_as_numpy_the_same_batches_come_as_arrays(self):
        coordinator = iw.GlobalCoordinator()
        stream = iw.Stream(CountingSource(44), epochs=2, epoch_end="break", rows_per_request=5)
        iw.init_data_input_workers(self.feed, ["data", "label"], stream, 8, 1, last_batch="pad", coordinator=coordinator)
        with coordinator:
            source = coordinator["train"]
            arrays = source.as_numpy()
            del source
            assert iter(arrays) is arrays
            first = coordinator["train"].next_batch()
            assert self.same(first.label, np.arange(8))
            rest = list(arrays)
            again = arrays.next_batch(60.0)
        assert [type(batch) for batch in rest] == [type(first)] * 5
        assert [(batch.epoch, batch.valid_rows) for batch in [*rest, again]] == [(0, 8)] * 4 + [(0, 4), (1, 8)]
        assert {type(array) for batch in rest for array in batch} == {np.ndarray}
        assert np.concatenate([batch.label for batch in rest]).tolist() == [*range(8, 44), *[43] * 4]
        assert rest[0].data.tolist() == rows_of(8, 8, np.float32).tolist()
        assert rest[0].label.dtype == np.int64
