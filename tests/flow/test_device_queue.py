"""The queue of batches on the device: each batch to one getter, and none lost whatever interrupts."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from gates import HANG_SECONDS
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from input_workers.errors import EndOfData, QueueClosed, WaitTimeout
from input_workers.feeds.numpy_feed import NumpyFeed
from input_workers.flow.device import Target
from input_workers.flow.device_queue import DeviceQueue, QueuedBatch
from input_workers.metrics.device_recorder import DeviceRecorder

TARGET = Target(NumpyFeed(), 2, [0], 0)


def new_queue(depth: int = 4) -> tuple[DeviceQueue, queue.SimpleQueue[None], DeviceRecorder]:
    wake: queue.SimpleQueue[None] = queue.SimpleQueue()
    recorder = DeviceRecorder()
    return DeviceQueue(depth, wake, recorder), wake, recorder


def batch(number: int, rows: int = 2) -> QueuedBatch:
    return QueuedBatch(number, TARGET, rows, rows, 0)


def test_batches_leave_in_the_order_in_which_they_came() -> None:
    batches, _, recorder = new_queue()
    for number in range(4):
        assert batches.put(batch(number))
    taken = [batches.get(0, "train") for _ in range(4)]
    assert [each.ticket for each in taken] == [0, 1, 2, 3]
    assert recorder.rows_delivered == 0, "not delivered before it is committed"
    assert batches.rows_waiting == 8
    for each in taken:
        batches.commit(each)
    assert (recorder.rows_delivered, recorder.batches_delivered, batches.rows_waiting) == (8, 4, 0)


def test_the_mark_of_an_epoch_is_no_batch() -> None:
    batches, _, recorder = new_queue()
    batches.put(batch(0))
    batches.put(QueuedBatch(None, None, 0, 0, 0))
    for _ in range(2):
        batches.commit(batches.get(0, "train"))
    assert recorder.batches_delivered == 1


def test_a_timeout_names_who_waited_and_leaves_the_stream_untouched() -> None:
    batches, _, recorder = new_queue()
    for _ in range(3):
        with pytest.raises(WaitTimeout, match=r"gpu_0/train: no batch within 0 s"):
            batches.get(0, "gpu_0/train")
    batches.put(batch(7))
    assert batches.get(0, "train").ticket == 7
    assert recorder.waited_seconds(time.monotonic()) >= 0


def test_a_full_queue_says_so_once_and_a_token_follows_when_there_is_room() -> None:
    batches, wake, _ = new_queue(depth=2)
    for number in range(2):
        assert batches.has_room()
        batches.put(batch(number))
    assert wake.empty(), "nobody asked for room"
    assert not batches.has_room()
    assert not batches.has_room()
    batches.get(0, "train")
    assert wake.get(timeout=HANG_SECONDS) is None
    batches.get(0, "train")
    assert wake.empty(), "one token a question"
    assert batches.has_room()


def test_an_interrupted_get_puts_its_batch_back_in_front() -> None:
    batches, _, recorder = new_queue()
    for number in range(3):
        batches.put(batch(number))
    first = batches.get(0, "train")
    batches.put_back(first)
    assert [batches.get(0, "train").ticket for _ in range(3)] == [0, 1, 2]
    assert recorder.rows_delivered == 0


def test_a_batch_put_back_after_the_end_is_still_delivered_before_the_error() -> None:
    batches, _, _ = new_queue()
    batches.put(batch(0))
    taken = batches.get(0, "train")
    batches.end(lambda: EndOfData("done"))
    batches.put_back(taken)
    assert batches.get(0, "train").ticket == 0
    with pytest.raises(EndOfData):
        batches.get(0, "train")


def test_the_end_comes_after_the_batches_that_wait_and_every_raise_is_a_new_exception() -> None:
    batches, _, _ = new_queue()
    batches.put(batch(0))
    batches.end(lambda: EndOfData("done"))
    batches.end(lambda: QueueClosed("a later end"))
    assert not batches.put(batch(1))
    assert batches.get(0, "train").ticket == 0
    seen = []
    for _ in range(3):
        with pytest.raises(EndOfData) as caught:
            batches.get(0, "train")
        seen.append(caught.value)
    assert len({id(error) for error in seen}) == 3


def test_an_abort_hands_over_what_waits_or_is_in_hand_and_nothing_is_delivered_after_it() -> None:
    batches, _, recorder = new_queue()
    for number in range(3):
        batches.put(batch(number))
    in_hand = batches.get(0, "train")
    assert batches.abort(lambda: QueueClosed("stopped")) == 6
    assert batches.abort(lambda: QueueClosed("stopped")) == 0, "counted once"
    with pytest.raises(QueueClosed):
        batches.commit(in_hand)
    assert not batches.give_up(in_hand)
    batches.put_back(in_hand)
    with pytest.raises(QueueClosed):
        batches.get(0, "train")
    assert (recorder.rows_delivered, batches.rows_waiting, len(batches)) == (0, 0, 0)


def test_a_batch_given_up_is_neither_waiting_nor_delivered() -> None:
    batches, _, recorder = new_queue()
    batches.put(batch(0))
    assert batches.give_up(batches.get(0, "train"))
    assert (batches.rows_waiting, recorder.rows_delivered) == (0, 0)
    assert batches.abort(lambda: QueueClosed("stopped")) == 0


@pytest.mark.parametrize("how", ["end", "abort"])
def test_every_waiting_getter_is_woken(how: str) -> None:
    batches, _, _ = new_queue()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(batches.get, HANG_SECONDS, "train") for _ in range(8)]
        getattr(batches, how)(lambda: QueueClosed("stopped"))
        for each in waiting:
            with pytest.raises(QueueClosed):
                each.result(HANG_SECONDS)


def test_an_abort_wakes_a_putter_that_waits_for_room() -> None:
    batches, wake, _ = new_queue(depth=1)
    batches.put(batch(0))
    assert not batches.has_room()
    batches.abort(lambda: QueueClosed("stopped"))
    assert wake.get(timeout=HANG_SECONDS) is None
    assert batches.has_room()
    assert not batches.put(batch(1))


def test_each_batch_goes_to_exactly_one_of_many_getters_and_no_token_is_lost() -> None:
    batches, wake, recorder = new_queue(depth=3)
    total, got = 5000, queue.SimpleQueue[int]()

    def consume() -> None:
        while True:
            try:
                each = batches.get(HANG_SECONDS, "train")
            except EndOfData:
                return
            batches.commit(each)
            got.put(each.ticket)

    threads = [threading.Thread(target=consume) for _ in range(6)]
    for thread in threads:
        thread.start()
    for number in range(total):
        while not batches.has_room():
            wake.get(timeout=HANG_SECONDS)
        assert batches.put(batch(number, 1))
    batches.end(lambda: EndOfData("done"))
    for thread in threads:
        thread.join(HANG_SECONDS)
        assert not thread.is_alive()
    assert sorted(got.get_nowait() for _ in range(total)) == list(range(total))
    assert recorder.rows_delivered == total


class Machine(RuleBasedStateMachine):
    """Against a plain list: what was put is waiting, in hand, delivered, given up, or was handed over by the abort."""

    def __init__(self) -> None:
        super().__init__()
        self.queue, self.wake, self.recorder = new_queue(3)
        self.waiting: list[QueuedBatch] = []
        self.hand: list[QueuedBatch] = []
        self.rows = dict.fromkeys(("put", "delivered", "given up", "aborted"), 0)
        self.ended = self.aborted = False

    @rule(rows=st.integers(1, 5))
    def put(self, rows: int) -> None:
        each = batch(self.rows["put"], rows)
        if self.queue.put(each):
            assert not self.ended
            self.waiting.append(each)
            self.rows["put"] += rows
        else:
            assert self.ended

    @rule()
    def get(self) -> None:
        try:
            each = self.queue.get(0, "train")
        except WaitTimeout:
            assert not self.waiting
            assert not self.ended
        except (EndOfData, QueueClosed) as error:
            assert not self.waiting
            assert isinstance(error, QueueClosed) == self.aborted  # noqa: PT017
        else:
            assert each is self.waiting.pop(0)
            self.hand.append(each)

    @precondition(lambda self: self.hand)
    @rule(how=st.sampled_from(["commit", "give_up", "put_back"]), data=st.data())
    def settle(self, how: str, data: st.DataObject) -> None:
        each = self.hand.pop(data.draw(st.integers(0, len(self.hand) - 1)))
        if how == "commit":
            if self.aborted:
                with pytest.raises(QueueClosed):
                    self.queue.commit(each)
            else:
                self.queue.commit(each)
                self.rows["delivered"] += each.rows
        elif how == "give_up":
            assert self.queue.give_up(each) is not self.aborted
            self.rows["given up"] += 0 if self.aborted else each.rows
        else:
            self.queue.put_back(each)
            if not self.aborted:
                self.waiting.insert(0, each)

    @rule()
    def end(self) -> None:
        self.queue.end(lambda: EndOfData("done"))
        self.ended = True

    @rule()
    def abort(self) -> None:
        self.rows["aborted"] += self.queue.abort(lambda: QueueClosed("stopped"))
        self.ended = self.aborted = True
        self.waiting = []

    @invariant()
    def every_row_is_somewhere(self) -> None:
        waiting = self.queue.rows_waiting
        assert self.rows["put"] == waiting + self.rows["delivered"] + self.rows["given up"] + self.rows["aborted"]
        assert self.recorder.rows_delivered == self.rows["delivered"]
        assert len(self.queue) == len(self.waiting)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=30)
