"""Threads that run a generator ahead of a loop: every item once, bounded, errors never an end, and nothing left behind."""

from __future__ import annotations

import collections
import queue as queues
import threading
import traceback
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from gates import HANG_SECONDS, await_true
from self_certifying import Witness, make_chunk
from turns import Turns

import input_workers as iw
from input_workers.adapters import BackgroundGenerator, background_generator


def join(background: BackgroundGenerator[Any]) -> None:
    for thread in background._shared.threads:
        thread.join(HANG_SECONDS)
        assert not thread.is_alive(), thread


@pytest.mark.parametrize("thread_count", [1, 2, 7])
@pytest.mark.parametrize("prefetch", [1, 3, 100])
@pytest.mark.parametrize("queue", [None, queues.Queue, queues.SimpleQueue])
def test_all_items_of_threads_of_unlike_lengths_arrive_once_and_in_the_order_of_each(
    thread_count: int, prefetch: int, queue: Any
) -> None:
    numbers = iter(range(thread_count))

    def chunks(lengths: list[int]) -> Iterator[Any]:
        worker = next(numbers)
        for call in range(lengths[worker]):
            yield make_chunk(worker, call, 3)

    lengths = [0, 1, 40, 3, 200, 1, 2][:thread_count]
    background = BackgroundGenerator(chunks, prefetch, thread_count, queue and queue(), args=[lengths])
    witness = Witness()
    items = background.iterator()
    for chunk in items:
        witness.see(chunk)
    assert witness.rows == 3 * sum(lengths)
    witness.assert_complete()
    for _ in range(3):  # the end stays the end
        with pytest.raises(StopIteration):
            next(items)
    background.check_and_raise_error()


def test_none_arrays_and_texts_are_items_like_others() -> None:
    array = np.array(["a", "b"])
    given = [None, array, "EOF", StopIteration(), 0, None]
    background = BackgroundGenerator(lambda *, items: items, 2, 1, kwargs={"items": given})
    got = list(background.iterator())
    assert len(got) == 6
    assert all(mine is theirs for mine, theirs in zip(given, got, strict=True))


class Item:
    """Something of which a test counts how many are alive."""


@pytest.mark.parametrize("queue", [None, queues.Queue(3), queues.Queue()])
def test_no_more_items_are_held_than_prefetch_and_one_for_each_thread(queue: queues.Queue[Any] | None) -> None:
    alive: weakref.WeakSet[Item] = weakref.WeakSet()
    most = 0

    def items() -> Iterator[Item]:
        nonlocal most
        for _ in range(100):
            item = Item()
            alive.add(item)
            most = max(most, len(alive))
            yield item
            del item

    background = BackgroundGenerator(items, 3, 4, queue)
    reading = background.iterator()
    await_true(lambda: background._shared._at_the_door == 4, "all threads at the door")
    assert len(alive) == 3 + 4
    seen = 0
    for item in reading:
        del item
        seen += 1
        if seen < 50:
            await_true(lambda: len(alive) == 3 + 4, "full again")
    assert seen == 400
    assert most <= 3 + 4 + 1  # one that the loop had
    assert not alive


def test_an_item_that_was_taken_is_held_by_nobody_here() -> None:
    made, asked, may_end = [], threading.Event(), threading.Event()

    def items() -> Iterator[Item]:
        box = [Item()]
        made.append(weakref.ref(box[0]))
        yield box.pop()
        asked.set()
        may_end.wait(HANG_SECONDS)

    reading = BackgroundGenerator(items, 1, 1).iterator()
    next(reading)
    assert asked.wait(HANG_SECONDS)
    assert made[0]() is None
    may_end.set()


def test_the_end_comes_when_the_last_thread_has_ended_not_the_first() -> None:
    turns = Turns()
    background = BackgroundGenerator(turns, 5, 2)
    reading = background.iterator()
    turns.await_asked(2)
    turns.orders.put(None)
    await_true(lambda: len(turns.closed) == 1)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(next, reading)
        turns.orders.put("late")
        assert waiting.result(HANG_SECONDS) == "late"
        turns.orders.put(None)
        assert next(reading, "end") == "end"


@pytest.mark.parametrize("waits", [True, False])
def test_an_error_is_raised_at_the_next_item_with_its_traceback_and_thread_and_stays(waits: bool) -> None:
    turns, error = Turns(), OSError("disk gone")
    background = BackgroundGenerator(turns, 5, 2)
    reading = background.iterator()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lambda: next(reading)) if waits else None
        if waits:
            await_true(lambda: background._shared._waiting == 1)
        else:
            turns.orders.put("dropped")
            turns.await_asked(3)
        turns.orders.put(error)
        if waiting is not None:
            assert waiting.exception(HANG_SECONDS) is error
    await_true(lambda: len(turns.closed) == 1)
    turns.orders.put("for the other thread, which ends")
    join(background)
    for raises in (lambda: next(reading), lambda: next(reading), background.check_and_raise_error):
        with pytest.raises(OSError, match="disk gone") as caught:
            raises()
        assert caught.value is error
        frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert frames.count("__call__") == 1, "the traceback of the generator, once"
    assert [note for note in error.__notes__ if "raised in thread 'generator-Turns-" in note]
    assert len(turns.closed) == 2


def test_the_first_error_wins_and_knows_the_others() -> None:
    turns, first = Turns(), OSError("first")
    background = BackgroundGenerator(turns, 5, 2)
    turns.await_asked(2)
    turns.orders.put(first)
    await_true(lambda: background._shared.failure is not None)
    turns.orders.put(KeyError("second"))
    join(background)
    with pytest.raises(OSError, match="first"):
        next(background.iterator())
    assert "later, in thread" in str(first.__notes__)
    assert "KeyError: 'second'" in str(first.__notes__)


def test_an_error_is_recorded_before_the_end_can_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = threading.Event()
    fail = background_generator._Shared.fail

    def late(shared: Any, error: BaseException, thread: str) -> bool:
        recorded.wait(0.05)  # nobody sets it: a delay where the error is not recorded yet
        return fail(shared, error, thread)

    monkeypatch.setattr(background_generator._Shared, "fail", late)

    def broken() -> Iterator[int]:
        yield 1
        raise OSError("disk gone")

    reading = BackgroundGenerator(broken, 1, 1).iterator()
    assert next(reading) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(reading)


def stop_iteration() -> Any:
    raise StopIteration


def in_generator(error: BaseException) -> Any:
    def generator() -> Iterator[int]:
        yield 0
        raise error

    return generator


@pytest.mark.parametrize(
    ("generator", "error", "text"),
    [
        (stop_iteration, iw.FetchFailed, "raised StopIteration"),
        (in_generator(SystemExit(0)), iw.FetchFailed, "raised SystemExit: 0"),
        (in_generator(GeneratorExit()), iw.FetchFailed, "raised GeneratorExit"),
        (in_generator(KeyboardInterrupt()), iw.FetchFailed, "raised KeyboardInterrupt"),
        (in_generator(StopIteration()), RuntimeError, "generator raised StopIteration"),
        (lambda: 3, TypeError, "not iterable"),
        (lambda a: iter(()), TypeError, "missing"),
    ],
)
def test_what_a_loop_would_take_for_an_end_is_an_error(generator: Any, error: type[BaseException], text: str) -> None:
    with pytest.raises(error, match=text):
        collections.deque(BackgroundGenerator(generator, 5, 3).iterator(), 0)


def test_the_first_error_wins_over_that_of_close() -> None:
    class Both:
        def __iter__(self) -> Both:
            return self

        def __next__(self) -> int:
            raise OSError("first")

        def close(self) -> None:
            raise KeyError("second")

    with pytest.raises(OSError, match="first") as caught:
        next(BackgroundGenerator(Both, 1, 1).iterator())
    assert "close raised KeyError" in str(caught.value.__notes__)


def test_readers_share_one_stream_and_all_see_its_end() -> None:
    background = BackgroundGenerator(lambda: iter(range(500)), 4, 2)
    reading = background.iterator()
    assert background.iterator() is reading
    with ThreadPoolExecutor(5) as threads:
        parts = [threads.submit(list, reading) for _ in range(5)]
        seen = sorted(item for part in parts for item in part.result(HANG_SECONDS))
    assert seen == sorted([*range(500), *range(500)])


def test_items_wait_in_the_queue_that_was_given_by_its_order_and_bound() -> None:
    queue: queues.PriorityQueue[int] = queues.PriorityQueue(4)
    background = BackgroundGenerator(lambda: iter([3, 1, 2, 0]), 1, 1, queue)
    join(background)  # all fit, though prefetch is 1
    assert queue.qsize() == 4
    assert list(background.iterator()) == [0, 1, 2, 3]
    background = BackgroundGenerator(lambda: iter([3, 1, "a"]), 9, 1, queue)
    join(background)
    with pytest.raises(TypeError, match="not supported"):
        list(background.iterator())


def test_room_that_a_thread_is_about_to_fill_is_nobody_else_s() -> None:
    class Slow(queues.Queue[Any]):
        entered = 0
        may_go = threading.Event()

        def put_nowait(self, item: Any) -> None:
            self.entered += 1
            assert self.may_go.wait(HANG_SECONDS)
            super().put_nowait(item)

    queue = Slow()
    background = BackgroundGenerator(lambda: iter(range(3)), 2, 4, queue)
    await_true(lambda: queue.entered == 2 and background._shared._at_the_door == 2)
    queue.may_go.set()
    assert sorted(background.iterator()) == [0] * 4 + [1] * 4 + [2] * 4


def test_a_queue_that_others_fill_is_an_error_not_a_hang() -> None:
    class Deceiving(queues.Queue[Any]):
        def qsize(self) -> int:
            return 0

    queue = Deceiving(1)
    background = BackgroundGenerator(lambda: iter([1, 2]), 1, 1, queue)
    join(background)
    with pytest.raises(iw.LifecycleError, match="nobody else fills"):
        background.check_and_raise_error()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"generator": iter([])}, "generator: got list_iterator"),
        ({"prefetch": 0}, "prefetch: got 0"),
        ({"prefetch": True}, "prefetch: got True"),
        ({"thread_count": 0}, "thread_count: got 0"),
        ({"queue": []}, "queue: got builtins.list"),
    ],
)
def test_wrong_arguments_are_config_errors(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(iw.ConfigError, match=message):
        BackgroundGenerator(**{"generator": lambda: iter(()), **wrong})


def test_a_queue_that_holds_something_is_refused() -> None:
    queue: queues.Queue[int] = queues.Queue()
    queue.put(1)
    with pytest.raises(iw.ConfigError, match="got a Queue with 1 items"):
        BackgroundGenerator(lambda: iter(()), queue=queue)
