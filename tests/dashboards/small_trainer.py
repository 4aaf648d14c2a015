"""A real trainer of three sources, for a real Prometheus: one that is slow, one whose data are bad, one that is ahead.

It writes the address of its metrics in a line, trains once it is sent a line, and ends when its input is closed.
Usage: small_trainer.py FOLDER
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys
import threading
from typing import Any

import numpy as np

import input_workers as iw

ENDED = threading.Event()
BATCH = 8

SLOW_CALL_SECONDS = 0.4  # its trainer does nothing but wait
BAD_CALL_SECONDS = 0.1
STEP_SECONDS = 0.1  # of the healthy source's trainer; fetching takes next to nothing
BAD_ROWS_PASSED = 50  # one of each request, which then takes two calls: about ten seconds until it breaks


def slow(worker_id: int, batch_size: int) -> Any:
    with iw.timed("read"):
        ENDED.wait(SLOW_CALL_SECONDS)
    return [np.zeros((batch_size, 4), np.float32)]


class BadRows:
    """One row in eight cannot be read."""

    def __len__(self) -> int:
        return 100_000

    def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
        ENDED.wait(BAD_CALL_SECONDS)
        bad = rows[rows % BATCH == 3]
        if len(bad):
            raise iw.BadRows(bad) from OSError("no such row")
        return [np.zeros((len(rows), 4), np.float32)]


class Healthy:
    """Chunks of 256 KB from worker processes, of which one dies once."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._mark = str(folder / "died")
        self._calls = 0

    def __call__(self, worker_id: int, batch_size: int) -> Any:
        self._calls += 1
        if self._calls == 60:  # some seconds after the start
            try:
                os.close(os.open(self._mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return [np.zeros((batch_size, 8192), np.float32)]


def train(source: iw.DataInputCoordinator, step_seconds: float) -> None:
    try:
        for _ in source:
            ENDED.wait(step_seconds)
    except (iw.FetchFailed, iw.QueueClosed):
        pass


def main() -> None:
    coordinator = iw.GlobalCoordinator()
    common: dict[str, Any] = {"coordinator": coordinator}
    healthy = Healthy(pathlib.Path(sys.argv[1]))
    iw.init_data_input_workers("numpy", ["data"], slow, BATCH, 1, "slow", **common)
    iw.init_data_input_workers("numpy", ["data"], healthy, BATCH, 2, "healthy", fetchers="process", **common)
    policy = iw.ErrorPolicy(skip=True, max_errors=BAD_ROWS_PASSED)
    stream = iw.Stream(BadRows(), rows_per_request=BATCH)
    iw.init_data_input_workers("numpy", ["data"], stream, BATCH, 1, "failing", on_error=policy, **common)
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        sys.stdout.write(f"{server.url}\n")
        sys.stdout.flush()
        sys.stdin.readline()
        coordinator.start()
        steps = {"slow": 0.0, "failing": 0.0, "healthy": STEP_SECONDS}
        trainers = [threading.Thread(target=train, args=(coordinator[name], step)) for name, step in steps.items()]
        for trainer in trainers:
            trainer.start()
        sys.stdin.read()
        ENDED.set()
        assert coordinator.stop(30.0), coordinator.last_stop
        for trainer in trainers:
            trainer.join()


if __name__ == "__main__":
    main()
