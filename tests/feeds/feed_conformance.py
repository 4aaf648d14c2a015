"""What every DeviceFeed must do, whatever its framework. A test class inherits it and says how to make and read the feed.

The other half, what a source with such a feed does, is in `source_conformance`.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from feeds.source_conformance import SourceConformance, rows_of

import input_workers as iw
from input_workers.contracts import DeviceFeed, Slot
from input_workers.leases import SlotPool

DTYPES = ("bool", *(f"{kind}int{bits}" for kind in ("", "u") for bits in (8, 16, 32, 64)), "float16", "float32", "float64")
DTYPES += ("complex64", "complex128", "S7", ml_dtypes.bfloat16)
NUMBERS = tuple(dtype for dtype in DTYPES if dtype != "S7")
HELD, MORE = 20, 200


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


class FeedConformance(SourceConformance):
    """Inherit it as TestSomething."""

    feed: Any = ""  # as init_data_input_workers takes it
    dtypes: tuple[Any, ...] = DTYPES
    shares_slots = True  # the batch is the slot's memory
    odd_shapes: tuple[tuple[int, ...], ...] = ((0, 3), (4, 0), (1, 3), (5,))

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

    def let_go(self) -> None:
        """Have the framework drop now what it would drop at its next operation."""

    def same(self, delivered: Any, wanted: np.ndarray) -> bool:
        got = self.value(delivered)
        same_dtype = self.dtype(delivered).kind == "S" if wanted.dtype.kind == "S" else self.dtype(delivered) == wanted.dtype
        return same_dtype and got.shape == wanted.shape and got.tolist() == wanted.tolist()

    def opened(self, *dtypes: Any, rows: int = 8, keep: int = 4) -> tuple[DeviceFeed, SlotPool]:
        feed = self.make_feed()
        specs = [iw.ArraySpec((3,), dtype) for dtype in dtypes]
        feed.open(specs, rows)
        return feed, SlotPool(specs, [0] * len(specs), rows, keep, getattr(feed, "slot_memory", None))

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
        (wanted,) = filled(slot, 0)
        address = slot.arrays[0].ctypes.data
        delivered = feed.receive(feed.send(slot))
        del slot
        if self.shares_slots:
            others = [pool.lease() for _ in range(6)]
            assert address not in [other.arrays[0].ctypes.data for other in others]
            del others
        assert self.same(delivered[0], wanted)  # a copy that went on has ended
        del delivered
        self.let_go()
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

    def test_odd_shapes_are_delivered(self):
        for shape in self.odd_shapes:
            feed = self.make_feed()
            feed.open([iw.ArraySpec(shape[1:], np.float32)], shape[0])
            array = aligned(np.ones(shape, np.float32))
            (got,) = feed.receive(feed.send(Slot([array], shape[0], shape[0])))
            assert self.same(got, np.ones(shape, np.float32)), shape
            feed.close()

    def test_batches_are_received_in_other_threads_than_they_were_sent_in(self):
        feed, pool = self.opened(*self.dtypes)
        with ThreadPoolExecutor(1) as sender, ThreadPoolExecutor(2) as receivers:
            for number in range(20):
                slot = pool.lease()
                wanted = filled(slot, number * 8)
                ticket = sender.submit(feed.send, slot).result()
                del slot
                delivered = receivers.submit(feed.receive, ticket).result()
                assert all(self.same(got, want) for got, want in zip(delivered, wanted, strict=True))
        feed.close()

    def test_as_numpy_arrays_they_have_their_values_and_dtypes_and_hold_the_memory(self):
        feed, pool = self.opened(*self.dtypes)
        to_numpy = getattr(feed, "to_numpy", np.asarray)
        slot = pool.lease()
        wanted = filled(slot, 40)
        arrays = [to_numpy(got) for got in feed.receive(feed.send(slot))]
        del slot
        for number in range(10):
            filled(pool.lease(), 100 + number)
        for array, want in zip(arrays, wanted, strict=True):
            assert type(array) is np.ndarray
            assert (array.dtype if want.dtype.kind != "S" else want.dtype, array.tolist()) == (want.dtype, want.tolist())


class MayBeWrittenTo:
    """Of feeds whose framework lets the trainer write to its batch."""

    def test_the_trainer_may_write_to_its_batch(self):
        feed, pool = self.opened(np.float32)
        slot = pool.lease()
        slot.arrays[0][...] = 0
        (mine,) = feed.receive(feed.send(slot))
        mine += 1
        del slot
        for _ in range(6):
            pool.lease().arrays[0][...] = 7
        assert (self.value(mine) == 1).all()
