"""A signal handler interrupts the trainer anywhere in a read, and stops the source or asks for a batch itself."""

from __future__ import annotations

import itertools
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest

from input_workers.contracts import ArraySpec, batch_type
from input_workers.errors import LifecycleError, QueueClosed, WaitTimeout
from input_workers.feeds.numpy_feed import NumpyFeed
from input_workers.flow.device import Device, Target
from input_workers.flow.device_queue import DeviceQueue, QueuedBatch
from input_workers.metrics.device_recorder import DeviceRecorder
from input_workers.progress import Progress

LIMIT_SECONDS = 10.0
WAIT_SECONDS = 0.3  # so long a getter waits that nobody wakes
TARGET = Target(NumpyFeed(), 2, [0], 0)


class Signal:
    """Calls a handler at the `at`-th place where the thread looks for signals: where a Python function is entered, and where
    a call of anything else comes back."""

    def __init__(self, at: int, handler: Callable[[], object]) -> None:
        self._left, self._handler = at, handler
        self.where: str | None = None  # None: there were fewer places

    def _look(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event not in ("call", "c_return") or self.where is not None or code.co_filename == __file__:
            return
        if "input_workers" not in code.co_filename:
            return
        if self._left:
            self._left -= 1
            return
        after = f" after {arg.__name__}()" if event == "c_return" else ""
        self.where = f"{os.path.basename(code.co_filename)}:{frame.f_lineno} {code.co_qualname}: {event}{after}"
        self._handler()

    def interrupt(self, call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        """Make the call in a thread that is interrupted; return what it returned, and what it raised."""
        result: list[tuple[Any, BaseException | None]] = []

        def run() -> None:
            sys.setprofile(self._look)
            try:
                result.append((call(), None))
            except BaseException as error:
                result.append((None, error))
            finally:
                sys.setprofile(None)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(LIMIT_SECONDS)
        assert not thread.is_alive(), f"it hangs after a signal at {self.where}"
        return result[0]


def new_queue(*rows: int) -> DeviceQueue:
    batches = DeviceQueue(8, queue.SimpleQueue(), DeviceRecorder())
    batches.progress = Progress(0, {}, lambda epoch: 100, [batches.log], False)
    for number, count in enumerate(rows):
        assert batches.put(QueuedBatch(number, TARGET, count, count, 0, [(0, number * 10, number * 10 + count)]))
    return batches


def at_every_place(step: Callable[[int], str | None], least: int) -> list[str]:
    """Run a step for place 0, 1, 2, ... until it says that there are no more; it returns where it was interrupted."""
    places: list[str] = []
    for at in itertools.count():
        where = step(at)
        if where is None:
            break
        places.append(where)
    assert len(places) >= least, f"only {len(places)} places: does the profiler see them? {places}"
    return places


def stopped() -> QueueClosed:
    return QueueClosed("stopped")


def get(batches: DeviceQueue) -> QueuedBatch:
    return batches.get(WAIT_SECONDS, "train")


def get_and_commit(batches: DeviceQueue) -> None:
    batches.commit(get(batches))


def get_and_put_back(batches: DeviceQueue) -> None:
    batches.put_back(get(batches))


@pytest.mark.parametrize("steps", [get_and_commit, get_and_put_back])
def test_a_stop_anywhere_in_a_read_counts_every_row_once_and_nothing_hangs(steps: Callable[[DeviceQueue], None]) -> None:
    def step(at: int) -> str | None:
        batches, aborted = new_queue(2, 3), [0]

        def stop() -> None:
            aborted[0] += batches.abort(stopped)

        signal = Signal(at, stop)
        _, error = signal.interrupt(lambda: steps(batches))
        if signal.where is not None:
            assert error is None or isinstance(error, QueueClosed), f"{error!r} after a stop at {signal.where}"
            delivered = batches.recorder.rows_delivered
            assert delivered + aborted[0] == 5, f"{delivered} delivered, {aborted[0]} stopped at {signal.where}"
            assert batches.rows_waiting == 0, f"a stop at {signal.where} leaves a batch behind"
            with pytest.raises(QueueClosed):
                batches.get(0, "train")
        return signal.where

    at_every_place(step, 10)


def test_a_stop_anywhere_in_a_read_that_waits_ends_it() -> None:
    def step(at: int) -> str | None:
        batches, moments = new_queue(), []

        def stop() -> None:
            moments.append(time.monotonic())
            batches.abort(stopped)

        signal = Signal(at, stop)
        started = time.monotonic()
        _, error = signal.interrupt(lambda: get(batches))
        if signal.where is None:
            assert isinstance(error, WaitTimeout)
        elif moments[0] - started < WAIT_SECONDS:  # else it has given up already
            assert isinstance(error, QueueClosed), f"{error!r} after a stop at {signal.where}"
        return signal.where

    at_every_place(step, 10)


def test_a_handler_that_asks_for_a_batch_while_the_thread_is_inside_is_refused() -> None:
    batches, answers = new_queue(2, 3), []

    def ask() -> None:
        with pytest.raises(LifecycleError, match="signal handler"):
            batches.get(0, "train")
        answers.append("refused")

    def inside() -> None:
        with batches.lock:
            ask()

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join(LIMIT_SECONDS)
    assert answers == ["refused"]
    assert get(batches).ticket == 0, "another call is not refused"


def test_a_handler_that_asks_anywhere_in_a_read_loses_nothing_and_is_refused_inside() -> None:
    refused: list[str] = []

    def step(at: int) -> str | None:
        batches, got = new_queue(2, 3, 4), []

        def ask() -> None:
            try:
                batch = batches.get(0, "train")
            except LifecycleError:
                refused.append(str(signal.where))
            else:
                got.append(batch.ticket)
                batches.commit(batch)

        signal = Signal(at, ask)
        batch, error = signal.interrupt(lambda: get(batches))
        assert error is None, f"{error!r} after a signal at {signal.where}"
        got.append(batch.ticket)
        batches.commit(batch)
        while len(batches):
            batch = get(batches)
            got.append(batch.ticket)
            batches.commit(batch)
        assert sorted(got) == [0, 1, 2], f"{got} after a signal at {signal.where}"
        assert batches.recorder.rows_delivered == 9
        return signal.where

    at_every_place(step, 5)
    assert any("_take" in where for where in refused), refused


def new_device(feed: NumpyFeed, failed: list[int]) -> tuple[Device, DeviceQueue]:
    batches = DeviceQueue(8, queue.SimpleQueue(), DeviceRecorder())
    make_batch = batch_type("train", ["data"])._make
    target = Target(feed, 2, [0], 4)
    device = Device("train", 0, batches, target, make_batch, lambda failure, rows: failed.append(rows))
    device.open(target, [ArraySpec((), np.int64)])
    for number in range(2):
        slot = target.lease(2)
        slot.arrays[0][...] = number
        slot.filled = 2
        assert device.send(target, slot)
    return device, batches


class FailingFeed(NumpyFeed):
    def receive(self, ticket: Any) -> Any:
        raise OSError("cannot be received")


@pytest.mark.parametrize("feed", [NumpyFeed, FailingFeed])
def test_a_stop_anywhere_in_next_batch_counts_every_row_once(feed: Callable[[], NumpyFeed]) -> None:
    def step(at: int) -> str | None:
        failed: list[int] = []
        device, batches = new_device(feed(), failed)
        aborted = [0]

        def stop() -> None:
            aborted[0] += batches.abort(stopped)

        signal = Signal(at, stop)
        device_batch, _ = signal.interrupt(lambda: device.next_batch(WAIT_SECONDS))
        if signal.where is not None:
            rows = batches.recorder.rows_delivered + aborted[0] + sum(failed)
            assert rows == 4, f"{batches.recorder.rows_delivered} + {aborted[0]} + {failed} rows at {signal.where}"
            assert device_batch is None or batches.recorder.rows_delivered == 2
        device.close()
        return signal.where

    at_every_place(step, 14)
