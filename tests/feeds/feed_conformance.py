"""What every DeviceFeed must do, whatever its framework. A test class inherits it and says how to make and read the feed."""

import itertools
from typing import Any

import numpy as np
import pytest

import input_workers as iw
from input_workers.contracts import DeviceFeed, Slot
from input_workers.leases import SlotPool

DTYPES = ("bool", *(f"{kind}int{bits}" for kind in ("", "u") for bits in (8, 16, 32, 64)), "float16", "float32", "float64")
DTYPES += ("complex64", "complex128", "S7")
HELD, MORE = 20, 200


def rows_of(first: int, count: int, dtype: Any) -> np.ndarray:
    """Rows that say which they are: row r holds r, r + 1 and r + 2, in what the dtype can hold."""
    numbers = np.arange(first, first + count)[:, None] + np.arange(3)
    dtype = np.dtype(dtype)
    if dtype.kind == "S":
        return np.array([[f"row {n % 1000}" for n in row] for row in numbers], dtype)
    return (numbers % (2 if dtype.kind == "b" else 101)).astype(dtype)


def filled(slot: Slot, first: int) -> list[np.ndarray]:
    """Fill the slot with rows from `first` on; return a copy of what it now holds."""
    for array in slot.arrays:
        array[...] = rows_of(first, slot.rows, array.dtype)
    slot.filled = slot.rows
    return [array.copy() for array in slot.arrays]


def aligned(array: np.ndarray, offset: int = 0) -> np.ndarray:
    """A copy that begins `offset` bytes behind a multiple of 64."""
    raw = np.empty(array.nbytes + 128, np.uint8)
    begin = -raw.ctypes.data % 64 + offset
    copy = raw[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


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


class FeedConformance:
    """Inherit it as TestSomething."""

    feed = ""  # as init_data_input_workers takes it
    dtypes = DTYPES
    shares_slots = True  # the batch is the slot's memory

    def make_feed(self) -> DeviceFeed:
        raise NotImplementedError

    def value(self, delivered: Any) -> np.ndarray:
        """What was delivered, as a NumPy array."""
        raise NotImplementedError

    def dtype(self, delivered: Any) -> np.dtype:
        """The dtype of what was delivered; of byte strings, "S"."""
        raise NotImplementedError

    def address(self, delivered: Any) -> int:
        """Where its memory is."""
        raise NotImplementedError

    def same(self, delivered: Any, wanted: np.ndarray) -> bool:
        got = self.value(delivered)
        same_dtype = self.dtype(delivered).kind == "S" if wanted.dtype.kind == "S" else self.dtype(delivered) == wanted.dtype
        return same_dtype and got.shape == wanted.shape and got.tolist() == wanted.tolist()

    def opened(self, *dtypes: Any, rows: int = 8, keep: int = 4) -> tuple[DeviceFeed, SlotPool]:
        feed = self.make_feed()
        specs = [iw.ArraySpec((3,), dtype) for dtype in dtypes]
        feed.open(specs, rows)
        return feed, SlotPool(specs, [0] * len(specs), rows, keep)

    def test_is_a_device_feed(self):
        assert isinstance(self.make_feed(), DeviceFeed)

    def test_values_shapes_and_dtypes_are_delivered_as_they_were_fetched(self):
        feed, pool = self.opened(*self.dtypes)
        slot = pool.lease()
        wanted = filled(slot, 40)
        delivered = feed.receive(feed.send(slot))
        for dtype, got, want in zip(self.dtypes, delivered, wanted, strict=True):
            assert self.same(got, want), dtype
        feed.close()

    def test_special_values_keep_their_bits(self):
        feed, pool = self.opened(np.float32, np.float64)
        slot = pool.lease()
        for array, word in zip(slot.arrays, (np.uint32, np.uint64), strict=True):
            array[...] = [np.nan, -0.0, np.inf]
            array.view(word)[0, 0] |= word(5)  # the payload of a NaN
        wanted = [array.tobytes() for array in slot.arrays]
        assert [self.value(got).tobytes() for got in feed.receive(feed.send(slot))] == wanted

    def test_a_held_batch_never_changes_while_its_slots_come_and_go(self):
        feed, pool = self.opened(*self.dtypes)
        held = []
        for number in range(HELD + MORE):
            slot = pool.lease()
            wanted = filled(slot, number * 8)
            delivered = feed.receive(feed.send(slot))
            del slot
            if number % (MORE // HELD) == 0:
                held.append((delivered, wanted))
        for delivered, wanted in held:
            assert all(self.same(got, want) for got, want in zip(delivered, wanted, strict=True))

    def test_one_array_of_a_batch_may_be_held_without_the_rest(self):
        feed, pool = self.opened(np.float32, np.int64)
        slot = pool.lease()
        _, wanted = filled(slot, 1)
        _, label = feed.receive(feed.send(slot))
        del slot, _
        for number in range(10):
            filled(pool.lease(), 100 + number)
        assert self.same(label, wanted)

    def test_a_slot_is_used_again_when_its_batch_has_died_and_not_before(self):
        feed, pool = self.opened(np.float32)
        slot = pool.lease()
        filled(slot, 0)
        address = slot.arrays[0].ctypes.data
        delivered = feed.receive(feed.send(slot))
        del slot
        if self.shares_slots:
            others = [pool.lease() for _ in range(6)]
            assert address not in [other.arrays[0].ctypes.data for other in others]
            del others
        del delivered
        free = [pool.lease() for _ in range(6)]
        assert address in [slot.arrays[0].ctypes.data for slot in free]

    def test_what_comes_from_an_aligned_slot_is_its_memory(self):
        if not self.shares_slots:
            pytest.skip("this device has memory of its own")
        feed, pool = self.opened(np.uint8, np.int64)
        slot = pool.lease()
        filled(slot, 0)
        addresses = [array.ctypes.data for array in slot.arrays]
        assert [self.address(got) for got in feed.receive(feed.send(slot))] == addresses

    @pytest.mark.parametrize("offset", [4, 16, 32, 60])
    def test_unaligned_arrays_are_delivered_right(self, offset):
        feed, _ = self.opened(np.float32)
        array = aligned(rows_of(7, 8, np.float32), offset)
        wanted = array.copy()
        (got,) = feed.receive(feed.send(Slot([array], 8, 8)))
        del array
        assert self.same(got, wanted)

    def test_read_only_arrays_are_delivered_right(self):
        feed, _ = self.opened(np.float32)
        array = aligned(rows_of(7, 8, np.float32))
        array.flags.writeable = False
        (got,) = feed.receive(feed.send(Slot([array], 8, 8)))
        assert self.same(got, rows_of(7, 8, np.float32))

    @pytest.mark.parametrize("layout", ["fortran", "strided", "reversed"])
    def test_arrays_in_another_layout_are_delivered_right(self, layout):
        feed, _ = self.opened(np.float32)
        rows = rows_of(7, 8, np.float32)
        array = {"fortran": np.asfortranarray(rows), "strided": np.repeat(rows, 2, 0)[::2], "reversed": rows[::-1]}[layout]
        wanted = array.copy()
        (got,) = feed.receive(feed.send(Slot([array], 8, 8)))
        assert self.same(got, wanted)

    @pytest.mark.parametrize("shape", [(0, 3), (4, 0), (1, 3), (5,)])
    def test_odd_shapes_are_delivered(self, shape):
        feed = self.make_feed()
        feed.open([iw.ArraySpec(shape[1:], np.float32)], shape[0])
        array = aligned(np.ones(shape, np.float32))
        (got,) = feed.receive(feed.send(Slot([array], shape[0], shape[0])))
        assert self.same(got, np.ones(shape, np.float32))

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
