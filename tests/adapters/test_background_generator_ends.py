"""A BackgroundGenerator that is left, closed, interrupted, forked, or still running when the program ends."""

from __future__ import annotations

import collections
import gc
import os
import queue as queues
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from gates import HANG_SECONDS, await_true
from turns import Turns

import input_workers as iw
from input_workers.adapters import BackgroundGenerator
from input_workers.coordinator import exit_hook


@pytest.mark.parametrize("queue", [None, queues.Queue])
@pytest.mark.parametrize("how", ["dropped", "closed", "never asked for", "in a cycle"])
def test_a_loop_that_leaves_frees_threads_at_the_door_and_closes_their_generators(how: str, queue: Any) -> None:
    closed = collections.Counter[str]()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed[threading.current_thread().name] += 1

    background = BackgroundGenerator(endless, 1, 3, queue and queue())
    threads, shared = list(background._shared.threads), background._shared
    if how != "never asked for":
        for _ in zip(range(5), background.iterator(), strict=False):
            reading = background.iterator()
    await_true(lambda: shared._at_the_door >= 3, "all threads at the door")
    if how == "closed":
        reading.close()
        for _ in range(2):
            with pytest.raises(iw.QueueClosed):
                next(reading)
    elif how == "in a cycle":
        cycle: list[Any] = [reading]
        cycle.append(cycle)
        del reading, cycle
        gc.collect()
    elif how == "dropped":
        del reading
        gc.collect()
        with pytest.raises(iw.LifecycleError, match="was dropped"):
            background.iterator()
    del background
    gc.collect()
    for thread in threads:
        thread.join(HANG_SECONDS)
        assert not thread.is_alive()
    assert closed == {thread.name: 1 for thread in threads}
    await_true(lambda: shared not in exit_hook._runs)


def test_close_wakes_every_reader_and_is_no_end() -> None:
    turns = Turns()
    reading = BackgroundGenerator(turns, 1, 1).iterator()
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(lambda: next(reading)) for _ in range(3)]
        await_true(lambda: reading._shared._waiting == 3)
        reading.close()
        assert all(isinstance(each.exception(HANG_SECONDS), iw.QueueClosed) for each in waiting)
    turns.orders.put("ends the generator")


def test_an_error_that_nobody_can_get_is_shown_by_the_hook_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", shown.append)

    def broken() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            raise OSError("cannot close")

    background = BackgroundGenerator(broken, 1, 1)
    shared = background._shared
    await_true(lambda: shared._at_the_door == 1)
    threads = list(shared.threads)
    del background
    gc.collect()
    threads[0].join(HANG_SECONDS)
    assert [str(each.exc_value) for each in shown] == ["cannot close"]


def test_a_thread_that_cannot_be_started_takes_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = iter([None, None, RuntimeError("can't start new thread")])
    start, started = threading.Thread.start, []

    def failing(thread: threading.Thread) -> None:
        error = next(starts)
        if error is not None:
            raise error
        started.append(thread)
        start(thread)

    before = len(exit_hook._runs)
    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(RuntimeError, match="can't start"):
        BackgroundGenerator(lambda: iter(int, 1), 1, 3)
    for thread in started:
        thread.join(HANG_SECONDS)
        assert not thread.is_alive()
    assert len(exit_hook._runs) == before


def test_ctrl_c_ends_a_wait_and_loses_nothing() -> None:
    turns = Turns()
    background = BackgroundGenerator(turns, 1, 1)
    reading = background.iterator()

    main = threading.main_thread().ident

    def interrupt() -> None:
        await_true(lambda: sys._current_frames()[main].f_code.co_name == "take")
        os.kill(os.getpid(), signal.SIGINT)

    for item in range(3):
        timer = threading.Thread(target=interrupt)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            next(reading)
        timer.join()
        turns.orders.put(item)
        assert next(reading) == item
    turns.orders.put(None)
    assert list(reading) == []


def test_a_fork_cannot_read_and_the_parent_goes_on(no_other_threads: None) -> None:
    background = BackgroundGenerator(lambda: iter(range(100)), 2, 1)
    reading = background.iterator()
    assert next(reading) == 0
    pid = os.fork()
    if not pid:
        try:
            next(reading)
        except iw.LifecycleError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert list(reading) == [*range(1, 100)]


EXITS = {
    "at the door": ("yield from iter(int, 1)", "next(items)"),
    "dropped": ("yield from iter(int, 1)", "next(items); del items"),
    "in native code": ("while True: yield np.sort(np.random.rand(300_000))", "next(items)"),
    "stuck": ("yield 1; threading.Event().wait()", "next(items)"),
    "an error of the trainer": ("yield from iter(int, 1)", "next(items); sys.exit(3)"),
}


@pytest.mark.parametrize("case", EXITS)
def test_a_program_that_ends_is_neither_held_up_nor_aborted(case: str) -> None:
    body, main = EXITS[case]
    lines = ["import sys, threading, numpy as np", "from input_workers.adapters import BackgroundGenerator", "def f():"]
    lines += [f"    {body}", f"items = BackgroundGenerator(f, 2, 3).iterator(); {main}"]
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-W", "error", "-c", "\n".join(lines)], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (3 if "error" in case else 0, b"")
    assert time.monotonic() - started < 40


def test_a_program_that_ends_closes_the_generators_first() -> None:
    body = "try: yield from iter(int, 1)\n    finally: os.write(1, b'closed ')"
    lines = ["import os", "from input_workers.adapters import BackgroundGenerator", f"def f():\n    {body}"]
    lines += ["items = BackgroundGenerator(f, 2, 3).iterator(); next(items)"]
    done = subprocess.run([sys.executable, "-W", "error", "-c", "\n".join(lines)], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"closed " * 3, b"")
