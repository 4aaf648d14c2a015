"""A trainer that ends in one of eight ways. Run by test_exit_matrix: exit_child.py END HOLD STOP QUEUE FEED [START]."""

from __future__ import annotations

import atexit
import faulthandler
import gc
import os
import signal
import sys
import tempfile
import threading
from typing import Any

import numpy as np

import input_workers as iw

HANG_SECONDS = 25.0


def say_what_still_runs() -> None:
    """Registered before the service's own hook, so called after it: threads that outlast it would abort in native code."""
    alive = [thread.name for thread in threading.enumerate() if thread.name.startswith(("fetcher-", "enqueuer-"))]
    if alive:
        print("still running:", alive, file=sys.stderr)  # noqa: T201


def main() -> None:
    atexit.register(say_what_still_runs)
    end, hold, stop, state, feed, *start = sys.argv[1:]
    calls: Any = threading.Semaphore(0)
    if start:
        calls = Calls()

    def fetch(worker_id: int, batch_size: int) -> object:
        calls.release()
        if state == "empty" and len(started) > 4:
            threading.Event().wait(0.05)  # a disk that takes its time; a thread in here cannot be woken
            return None
        started.append(worker_id)
        return [np.ones((8, 1000)), np.ones(8, np.int64)]

    started: list[int] = []
    coordinator = iw.GlobalCoordinator()
    iw.init_data_input_workers(feed, ["data", "label"], fetch, 8, num_workers=2, coordinator=coordinator,
                               fetchers=iw.Processes(start=start[0]) if start else "thread")  # fmt: skip
    source = coordinator["train"]
    if end != "with":
        coordinator.start()
        held = run(coordinator, source, state, calls)
    if end == "with":
        with coordinator:
            held = run(coordinator, source, state, calls)
            if hold == "drop":
                held.clear()
            if stop == "stop":
                coordinator.stop()
            raise ValueError("the user's own")
    if hold == "drop":
        held.clear()
    else:
        globals()["held"] = held
    if stop == "stop":
        coordinator.stop()
    if end == "sys.exit":
        sys.exit(3)
    if end == "error":
        raise ValueError("the user's own")
    if end == "interrupt":
        raise KeyboardInterrupt
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "os._exit":
        os._exit(4)
    if end == "collected":
        del coordinator, source
        gc.collect()
    elif end == "main":
        globals()["coordinator"] = coordinator


class Calls:
    """Counts calls of functions in other processes, by a pipe with a name."""

    def __init__(self) -> None:
        self.path = os.path.join(tempfile.mkdtemp(), "calls")  # in a folder that the test removes
        os.mkfifo(self.path)
        self._read = os.open(self.path, os.O_RDWR)

    def __reduce__(self) -> tuple[Any, ...]:
        return Caller, (self.path,)

    def acquire(self, timeout: float) -> None:
        os.read(self._read, 1)

    def release(self) -> None:
        raise AssertionError("not in a worker")


class Caller:
    """The other side of Calls."""

    def __init__(self, path: str) -> None:
        self.path = path

    def release(self) -> None:
        try:
            end = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # the trainer has ended
            return
        try:
            os.write(end, b"+")
        except BlockingIOError:  # enough
            pass
        os.close(end)


def run(coordinator: iw.GlobalCoordinator, source: object, state: str, calls: Any) -> list[object]:
    held = [source.next_batch(HANG_SECONDS) for _ in range(3)]
    if state == "flowing":
        held += [source.next_batch(HANG_SECONDS) for _ in range(20)]
    elif state == "full":
        while source.stats().fetcher_blocked_seconds == 0:
            threading.Event().wait(0.001)
    else:
        for _ in range(8):
            calls.acquire(timeout=HANG_SECONDS)
    return held


if __name__ == "__main__":
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    main()
