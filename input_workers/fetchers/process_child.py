"""The start and the end of a worker process: what it is told first, its signals and descriptors, and its exit code."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import random
import signal
import socket
import sys
import time
from collections.abc import Sequence

import numpy as np

from input_workers.fetchers import frames
from input_workers.fetchers.fork_server import set_process_name
from input_workers.fetchers.frames import Link, raised
from input_workers.fetchers.worker import Worker
from input_workers.fetchers.worker_job import Job, die_with_parent
from input_workers.fetchers.worker_seeds import seed_late_comers

__all__ = ["STACK_SIGNAL", "main", "serve"]

STACK_SIGNAL = signal.SIGUSR2  # shows the stacks of all threads on stderr, also while C code holds the GIL


def serve(end: int, life: int) -> int:
    """Be a worker on these descriptors until the parent closes the pipe; return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # handled once, in the parent
    for descriptor in (end, life):  # not for what the function starts
        os.set_inheritable(descriptor, False)
    die_with_parent(life)
    faulthandler.enable()
    faulthandler.register(STACK_SIGNAL, all_threads=True)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    link = Link(socket.socket(fileno=end))
    try:
        started = time.monotonic()
        job: Job
        name, job = link.receive()
        try:
            set_process_name(name)
            arena = link.receive_descriptor()
            job.settle()
            random.seed()
            np.random.seed()
            worker = Worker(link, job, arena)
            seed_late_comers()
            if job.worker_init_fun is not None:
                pickle.loads(job.worker_init_fun)(job.worker_id)  # noqa: S301
        except BaseException as error:
            link.send((*raised(error), time.monotonic() - started))
            link.close()
            return 1
        link.send((frames.READY, time.monotonic() - started))
        worker.run()
    except (EOFError, ConnectionError):
        link.close()
    return 0


def main(end: int, life: int, path: Sequence[str]) -> None:
    """Entry of a spawned worker."""
    sys.path[:] = path
    code = 1
    try:
        code = serve(end, life)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code and code is not error.code:
            sys.stderr.write(f"SystemExit: {error.code}\n")
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        # The function's daemon threads, or what it registered at exit, must not hold this process up.
        os._exit(code)
