"""A device's batches: none is lost to Ctrl-C, and those that were not ready are counted."""

from __future__ import annotations

import queue
import threading
from typing import Any

import numpy as np
import pytest

from input_workers.contracts import ArraySpec, Slot, batch_type
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
    device = Device("train", waiting, Target(feed, 2), make_batch, [0], lambda failure, rows: None, keep_slots=4)
    device.open(device.target, [ArraySpec((), np.int64)])
    return device, waiting, feed


def send(device: Device, *numbers: int) -> None:
    for number in numbers:
        slot = device.target.lease(2, [np.empty(2, np.int64)])
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

    target = Target(Feed(), 4)
    target.open([ArraySpec((2,), np.int16), ArraySpec((0,), np.int16)], [0, 0], keep=2)
    chunk = [np.empty((8, 2), np.int16), np.empty((8, 0), np.int16)]
    slot, short = target.lease(4, chunk), target.lease(1, chunk)
    addresses = [array.ctypes.data for array in made]
    assert [array.nbytes for array in made] == [16, 4]  # an array without bytes needs none
    assert [slot.arrays[0].ctypes.data, short.arrays[0].ctypes.data] == addresses
    del slot, short
    assert target.lease(4, chunk).arrays[0].ctypes.data == addresses[0]
    target.close()
