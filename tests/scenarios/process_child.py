"""A trainer with worker processes that gets into trouble. Run by test_process_trouble: process_child.py WHAT START."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import resource
import shutil
import signal
import sys
import tempfile
import time

import numpy as np

import input_workers as iw
from input_workers.fetchers.fork_server import fork_server

HANG_SECONDS = 25.0


def chunk(worker_id: int, batch_size: int) -> object:
    return [np.ones((8, 2000)), np.ones(8, np.int64)]


def register(fetch: object, start: object, workers: int = 2) -> iw.GlobalCoordinator:
    coordinator = iw.GlobalCoordinator()
    iw.init_data_input_workers(
        "numpy", ["data", "label"], fetch, 8, num_workers=workers, coordinator=coordinator, fetchers=iw.Processes(start=start)
    )
    return coordinator


def say(*words: object) -> None:
    print(*words, flush=True)  # noqa: T201


def orphans(start: str) -> None:
    """Say who the workers are, two of which hold the interpreter lock in C, and be killed."""

    folder = tempfile.mkdtemp()
    path = os.path.join(folder, "pids")
    os.mkfifo(path)

    def fetch(worker_id: int, batch_size: int) -> object:
        with open(path, "w") as pipe:
            pipe.write(f"{os.getpid()}\n")
        if worker_id:
            ctypes.PyDLL(None).sleep(60)
        time.sleep(60)
        return None

    read = os.open(path, os.O_RDWR)
    coordinator = register(fetch, start, 3)
    coordinator.start()
    with os.fdopen(read, "r", buffering=1) as lines:
        found = [lines.readline().strip() for _ in range(3)]
    shutil.rmtree(folder)
    server = fork_server.holds()
    say(*found, *([server[0]] if server else []))
    os.kill(os.getpid(), signal.SIGKILL)


def few_descriptors(start: str) -> None:
    """Start with any number of descriptors left; say what went wrong, and what is left open."""
    before = len(os.listdir("/proc/self/fd"))
    for left in range(2, 40, 3):
        coordinator = register(chunk, start)
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + left, 4096))
        try:
            coordinator.start()
        except OSError as error:
            text = str(error)
        else:
            text = ""
            try:
                coordinator["train"].next_batch(HANG_SECONDS)
            except iw.SourceFailed as error:  # the worker has no more descriptors than we have
                if "Too many open files" not in str(error):
                    raise
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        assert coordinator.stop(), coordinator.last_stop
        del coordinator  # what failed is remembered with its frames, and they hold chunks
        gc.collect()
        fork_server.stop()
        left_open = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
        assert len(left_open) == before, left_open
        say(left, text)


def few_processes(start: str) -> None:
    """Start as a user who may have no more processes."""
    with register(chunk, "spawn") as first:  # what is imported late is imported
        first["train"].next_batch(HANG_SECONDS)
    coordinator = register(chunk, start, 4)
    os.setuid(54321)
    before = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    try:
        coordinator.start()
    except OSError as error:
        say(error)
    assert len(os.listdir("/proc/self/fd")) == before


def flood(start: str) -> None:
    """Workers that print 100 MB while they work."""

    def fetch(worker_id: int, batch_size: int) -> object:
        if calls:
            raise iw.EndOfData
        calls.append(1)
        for number in range(5000):
            sys.stdout.write(f"{number:05} {'x' * 10_000}\n")
        print("the last line", end="")  # noqa: T201
        print("on stderr", file=sys.stderr)  # noqa: T201
        return [np.ones((8, 2000)), np.ones(8, np.int64)]

    calls: list[int] = []
    with register(fetch, start) as coordinator:
        assert sum(batch.valid_rows for batch in coordinator["train"]) == 16


def fork_by_the_user(start: str) -> None:
    """The trainer forks beside running workers: the child must not touch them, nor keep them alive."""
    faulthandler.cancel_dump_traceback_later()  # its thread would be waited for at the end of a fork
    signal.alarm(int(HANG_SECONDS))
    coordinator = register(chunk, start)
    coordinator.start()
    coordinator["train"].next_batch(HANG_SECONDS)
    child = os.fork()
    if not child:
        signal.alarm(int(HANG_SECONDS))
        try:
            coordinator["train"].next_batch(1.0)
        except iw.LifecycleError:
            pass
        del coordinator
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    for _ in range(50):
        coordinator["train"].next_batch(HANG_SECONDS)
    assert coordinator["train"].stats().fetcher_restarts == 0
    fork = os.fork()
    if not fork:
        signal.alarm(int(HANG_SECONDS))
        time.sleep(60)
        os._exit(0)
    workers = [pid for pid in children(os.getpid()) if pid != fork]
    server = fork_server.holds()
    if server is not None:
        workers += children(server[0])
    say(fork, *workers)
    os.kill(os.getpid(), signal.SIGKILL)


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(each) for each in file.read().split()]


if __name__ == "__main__":
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    globals()[sys.argv[1]](sys.argv[2])
