"""A device's batches: none is lost to Ctrl-C, and those that were not ready are counted."""

from __future__ import annotations

import gc
import queue
import threading
import weakref
from typing import Any

import numpy as np
import pytest

from input_workers.contracts import ArraySpec, Slot, batch_type
from input_workers.errors import EndOfData, Failure, FeedFailed, QueueClosed
from input_workers.feeds import NumpyFeed
from input_workers.flow.device import Device, Target
from input_workers.flow.device_queue import DeviceQueue, QueuedBatch
from input_workers.metrics.device_recorder import DeviceRecorder


class InterruptedQueue(DeviceQueue):
    """Ctrl-C comes just after a batch was counted as delivered."""

    interrupt = False

    def commit(self, batch: QueuedBatch, ready: bool = True) -> None:
        super().commit(batch, ready)
        if self.interrupt:
            raise KeyboardInterrupt


class FeedWithEvents(NumpyFeed):
    """Its copies are done when the test says so."""

    chunk_alignment = None

    def __init__(self) -> None:
        self.on_time = False

    def send(self, slot: Slot) -> Any:
        done = threading.Event()
        if self.on_time:
            done.set()
        return slot.arrays, done

    def is_ready(self, ticket: Any) -> bool:
        return bool(ticket[1].is_set())

    def receive(self, ticket: Any) -> Any:
        return [Moved(array) for array in ticket[0]]

    def to_numpy(self, moved: Any) -> Any:
        return moved.array


class Moved:
    def __init__(self, array: Any) -> None:
        self.array = array


def make_device() -> tuple[Device, InterruptedQueue, FeedWithEvents]:
    feed = FeedWithEvents()
    waiting = InterruptedQueue(8, queue.SimpleQueue(), DeviceRecorder())
    make_batch = batch_type("train", ["data"])._make
    device = Device("train", 0, waiting, Target(feed, 2, [0], 4), make_batch, lambda failure, rows: None)
    device.open(device.target, [ArraySpec((), np.int64)])
    return device, waiting, feed


def send(device: Device, *numbers: int) -> None:
    for number in numbers:
        slot = device.target.lease(2)
        slot.arrays[0][...] = number
        slot.filled = 2
        device.send(device.target, slot)


@pytest.mark.parametrize("first", [False, True], ids=["first as delivered", "first as NumPy"])
@pytest.mark.parametrize("then", [False, True], ids=["then as delivered", "then as NumPy"])
def test_a_batch_that_was_counted_when_ctrl_c_came_is_the_next_one_in_the_form_that_is_asked_for(
    first: bool, then: bool
) -> None:
    device, waiting, _ = make_device()
    send(device, 1, 2)
    waiting.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        device.next_batch(0, first)
    assert waiting.log.taken_back == 1
    waiting.interrupt = False
    (again,), (other,) = device.next_batch(0, then), device.next_batch(0, then)
    assert type(again) is (np.ndarray if then else Moved)
    assert [each.tolist() if then else each.array.tolist() for each in (again, other)] == [[1, 1], [2, 2]]
    assert (waiting.log.taken_back, waiting.recorder.batches_delivered) == (0, 2)
    assert device.close() == []


def test_a_batch_that_ctrl_c_interrupts_twice_is_still_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    device, waiting, feed = make_device()
    send(device, 1)
    waiting.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        device.next_batch(0)
    with monkeypatch.context() as patched:
        patched.setattr(feed, "receive", lambda ticket: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            device.next_batch(0)
    assert waiting.log.taken_back == 1
    assert device.next_batch(0, True).data.tolist() == [1, 1]
    assert waiting.log.taken_back == 0


def test_batches_are_counted_whose_copy_was_not_done_when_they_were_received() -> None:
    device, waiting, feed = make_device()
    feed.on_time = True
    send(device, 1, 2)
    feed.on_time = False
    send(device, 3)
    counts = []
    for _ in range(3):
        device.next_batch(0)
        counts.append(waiting.recorder.batches_not_ready)
    assert counts == [0, 0, 1]


def test_slots_come_from_the_memory_that_the_feed_makes() -> None:
    made: list[Any] = []

    class Feed(NumpyFeed):
        def slot_memory(self, nbytes: int) -> Any:
            raw = np.zeros(nbytes + 64, np.uint8)
            begin = -raw.ctypes.data % 64
            made.append(raw[begin : begin + nbytes])
            return made[-1]

    target = Target(Feed(), 4, [0, 0], 2)
    assert target.has_own_memory
    target.open([ArraySpec((2,), np.int16), ArraySpec((0,), np.int16)])
    chunk = [np.empty((8, 2), np.int16), np.empty((8, 0), np.int16)]
    slot, short = target.lease(4), target.lease(1, chunk)
    addresses = [array.ctypes.data for array in made]
    assert [array.nbytes for array in made] == [16, 4]  # an array without bytes needs none
    assert [slot.arrays[0].ctypes.data, short.arrays[0].ctypes.data] == addresses
    del slot, short
    assert target.lease(4).arrays[0].ctypes.data == addresses[0]
    target.close()


class ClosableFeed(FeedWithEvents):
    """Notes when it is closed, and whether its memory is still there."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = 0
        self.made: list[weakref.ref[np.ndarray]] = []

    def slot_memory(self, nbytes: int) -> Any:
        raw = np.zeros(nbytes + 64, np.uint8)
        begin = -raw.ctypes.data % 64
        self.made.append(weakref.ref(raw))
        return raw[begin : begin + nbytes]

    def close(self) -> None:
        self.closed += 1

    @property
    def slots_alive(self) -> int:
        gc.collect()
        return sum(memory() is not None for memory in self.made)


def replaced() -> tuple[Device, DeviceQueue, ClosableFeed, ClosableFeed]:
    """Return a device with two batches queued whose target has been replaced."""
    device, waiting, _ = make_device()
    old, new = ClosableFeed(), ClosableFeed()
    device.close()
    device.target = Target(old, 2, [0], 4)
    device.open(device.target, [ArraySpec((), np.int64)])
    send(device, 1, 2)
    device.replace_target(Target(new, 2, [0], 4))
    return device, waiting, old, new


def test_a_target_that_was_replaced_is_closed_when_its_last_batch_was_received() -> None:
    device, _, old, new = replaced()
    assert len(device.retired) == 1
    device.close_retired_targets()
    assert device.next_batch(0, True).data.tolist() == [1, 1]
    device.close_retired_targets()
    assert (old.closed, len(device.retired)) == (0, 1), "one of its batches is still queued"
    assert device.next_batch(0, True).data.tolist() == [2, 2]
    device.close_retired_targets()
    device.close_retired_targets()
    assert (old.closed, len(device.retired)) == (1, 0)
    assert device.close() == []
    assert (old.closed, new.closed) == (1, 0), "once; the other was never opened"


def test_its_free_memory_goes_at_once_and_the_rest_with_its_batches() -> None:
    device, _, old, _ = replaced()
    free = device.retired[0].lease(2)
    assert old.slots_alive == 3
    del free
    assert old.slots_alive == 3, "it is kept for the next batch"
    device.close_retired_targets()
    assert old.slots_alive == 2
    device.next_batch(0, True)
    assert old.slots_alive == 1
    device.next_batch(0, True)
    assert old.slots_alive == 0
    device.close()


def test_it_stays_open_while_a_batch_is_being_filled_for_it() -> None:
    device, _, old, _ = replaced()
    device.retired[0].laid_out = 1
    for _ in range(2):
        device.next_batch(0)
    device.close_retired_targets()
    assert (old.closed, len(device.retired)) == (0, 1)
    assert old.slots_alive > 0
    device.retired[0].laid_out = 0
    device.close_retired_targets()
    assert (old.closed, len(device.retired), old.slots_alive) == (1, 0, 0)
    device.close()


@pytest.mark.parametrize("how", ["given up", "aborted"])
def test_it_is_closed_too_if_a_batch_will_never_be_received(how: str) -> None:
    device, waiting, old, _ = replaced()
    first = waiting.get(0, "train")
    if how == "given up":
        assert waiting.give_up(first)
        assert waiting.give_up(waiting.get(0, "train"))
        device.close_retired_targets()
        assert (old.closed, len(device.retired)) == (1, 0)
    else:
        assert waiting.abort(lambda: QueueClosed("stopped")) == 4
    device.close()
    assert old.closed == 1


def test_a_batch_that_was_received_in_vain_is_received_with_its_own_feed_after_the_target_was_replaced() -> None:
    device, waiting, old, _ = replaced()
    waiting.interrupt = True  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        device.next_batch(0)
    waiting.interrupt = False  # type: ignore[attr-defined]
    waiting.commit(waiting.get(0, "train"))
    device.close_retired_targets()
    assert old.closed == 0, "the trainer has not got the first of its batches yet"
    assert device.next_batch(0, True).data.tolist() == [1, 1]
    device.close()
    assert old.closed == 1


def test_a_feed_that_cannot_be_closed_is_told_and_the_others_are_closed() -> None:
    device, _, old, _ = replaced()
    error = OSError("busy")

    class Failing(ClosableFeed):
        def close(self) -> None:
            raise error

    device.open(Target(Failing(), 2, [0], 4), [ArraySpec((), np.int64)])
    assert device.close() == [error]
    assert old.closed == 1
    assert device.close() == []


def test_epoch_ends_and_failures_to_receive_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[tuple[Failure, int]] = []
    device, waiting, feed = make_device()
    device._on_failure = lambda failure, rows: failures.append((failure, rows))
    waiting.put(QueuedBatch(None, None, 0, 0, 3))
    with pytest.raises(EndOfData, match="end of epoch 3"):
        device.next_batch(0)
    send(device, 1)
    with monkeypatch.context() as patched:
        patched.setattr(feed, "receive", lambda ticket: 1 // 0)
        with pytest.raises(FeedFailed) as caught:
            device.next_batch(0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert [rows for _, rows in failures] == [2]
    assert (waiting.rows_waiting, waiting.recorder.rows_delivered) == (0, 0)
    device.close()
