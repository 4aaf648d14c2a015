"""Ctrl-C anywhere in `start()`: nothing is left running, and the next start delivers every row.

The interpreter handles a signal where a Python function is entered and when a call of anything else comes back (and at
jumps backwards, which are left out). A profiler raises KeyboardInterrupt at each such place, one after the other, until a
start comes through unharmed; not where Python itself would come to harm.
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import pytest
from gates import HANG_SECONDS, await_true, register

import input_workers as iw

ROWS = 10


def is_pythons_own(function: str, event: str, arg: Any) -> bool:
    """Whether Ctrl-C here breaks Python itself: a condition keeps its lock, a thread counts as starting for ever."""
    starting = function == "Thread.start" and event == "c_return" and arg.__name__ == "__exit__"
    return function.startswith(("Condition._", "WeakSet.__init__.<locals>._remove")) or starting


class CtrlC:
    """Raises KeyboardInterrupt at the `at`-th place where this thread looks for signals."""

    def __init__(self, at: int) -> None:
        self._left = at
        self.where: str | None = None  # None: there were fewer places

    def _look(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event in ("call", "c_return") or (event == "return" and code.co_name == "__init__"):
            if self.where is not None or code.co_filename == __file__ or is_pythons_own(code.co_qualname, event, arg):
                return
            if not self._left:
                after = f" after {arg.__name__}()" if event == "c_return" else ""
                self.where = f"{os.path.basename(code.co_filename)}:{frame.f_lineno} {code.co_qualname}: {event}{after}"
                raise KeyboardInterrupt
            self._left -= 1

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Interrupt the body."""
        gc.disable()  # Ctrl-C in what a collection calls is Python's own
        sys.setprofile(self._look)
        try:
            yield
        finally:
            sys.setprofile(None)
            gc.enable()


def in_a_thread(call: Callable[[], Any]) -> Any:
    """Return what it returns, or raise what it raises; fail if it hangs."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append((call(), None))
        except BaseException as error:
            results.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HANG_SECONDS)
    assert not thread.is_alive(), "hangs"
    result, error = results[0]
    if error is not None:
        raise error
    return result


def is_interrupted(call: Callable[[], Any], ctrl_c: CtrlC) -> bool:
    """Make the call in a thread of its own; return whether KeyboardInterrupt came out of it, as it then must."""

    def run() -> None:
        with ctrl_c.armed():
            call()

    try:
        in_a_thread(run)
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    assert interrupted == (ctrl_c.where is not None), "it was swallowed"
    return interrupted


def left(before: set[threading.Thread], seconds: float = HANG_SECONDS) -> list[str]:
    """Return the names of threads but those before that have not ended within so many seconds."""
    deadline = time.monotonic() + seconds
    fresh = [thread for thread in threading.enumerate() if thread not in before]
    for thread in fresh:
        if thread.ident is None:  # it has been started, and not yet begun
            await_true(lambda: thread.ident is not None)  # noqa: B023
        thread.join(max(0.0, deadline - time.monotonic()))
    return [thread.name for thread in fresh if thread.is_alive()]


class Logger:
    def log(self, metrics: dict[str, float]) -> None:
        pass


class Situation:
    """Sources of a coordinator, made ready for the start that is interrupted."""

    def __init__(self, ready: Callable[[Situation], None]) -> None:
        self.coordinator = iw.GlobalCoordinator()
        self.sources: list[Any] = []
        self.reads: list[int] = []  # how often each was read to its end
        self.add("train", num_workers=2, init_fun=lambda handle, everything: None, external_loggers=[Logger()])
        ready(self)

    def add(self, name: str, **more: Any) -> None:
        stream = iw.Stream(iw.sources.Arrays(np.arange(ROWS), np.arange(ROWS)), rows_per_request=3)
        self.sources.append(register(self.coordinator, stream, 4, name, last_batch="keep", **more))
        self.reads.append(0)

    def read_all(self) -> None:
        for index, source in enumerate(self.sources):
            rows = sorted(np.concatenate([batch.data for batch in source]).tolist())
            assert rows == list(range(ROWS)), f"{source.name}: {rows}"
            self.reads[index] += 1

    def check(self) -> None:
        """Every row was delivered as often as read, and every other is accounted for. After a stop."""
        assert not self.coordinator.last_stop.failures
        for reads, stats in zip(self.reads, self.coordinator.stats().values(), strict=True):
            assert stats.rows_delivered == reads * ROWS
            assert stats.rows_fetched == stats.rows_delivered + sum(stats.rows_dropped.values())
            assert stats.rows_in_flight == 0


def first(situation: Situation) -> None:
    situation.add("test")


def after_a_stop(situation: Situation) -> None:
    situation.add("test")
    situation.coordinator.start()
    situation.read_all()
    assert situation.coordinator.stop()


def beside_a_running_one(situation: Situation) -> None:
    situation.coordinator.start()
    situation.add("test")
    situation.add("inline", num_workers=0)


@pytest.mark.parametrize(("ready", "step"), [(first, 1), (after_a_stop, 2), (beside_a_running_one, 1)])
def test_a_start_interrupted_anywhere_leaves_nothing_and_can_be_repeated(ready: Callable[[Situation], None], step: int) -> None:
    threads = set(threading.enumerate())
    kept = []  # what is dropped would be collected in some later start, where Ctrl-C in a finalizer is nobody's
    for at in itertools.count(step=step):
        situation, ctrl_c = Situation(ready), CtrlC(at)
        kept.append(situation)
        coordinator = situation.coordinator
        running = set(threading.enumerate())
        try:
            interrupted = is_interrupted(coordinator.start, ctrl_c)
            if interrupted and left(running, 0.0) and ready is not beside_a_running_one:
                # It came when all was started, or a thread is about to end: a stop ends what is left.
                assert in_a_thread(coordinator.stop)
                rest = left(running)
                assert not rest, f"not ended by a stop: {rest}"
            if interrupted:
                in_a_thread(coordinator.start)
            in_a_thread(situation.read_all)
            assert in_a_thread(lambda: coordinator.stop(HANG_SECONDS)), coordinator.last_stop  # noqa: B023
            situation.check()
            rest = left(threads)
            assert not rest, f"left behind: {rest}"
        except BaseException as error:
            error.add_note(f"after Ctrl-C at place {at}, {ctrl_c.where}")
            raise
        if not interrupted:
            break
    assert at > 50, f"only {at} places: does the profiler see them?"
