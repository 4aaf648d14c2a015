"""Reads a source with `num_workers=0` while a timer sends Ctrl-C at random moments; what was wrong is written to stderr.

Arguments: seconds, and "ordered" or "plain".
"""

from __future__ import annotations

import faulthandler
import random
import signal
import sys
import time
from typing import Any

import numpy as np

import input_workers as iw


class Rows:
    def __len__(self) -> int:
        return 1 << 24

    def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
        return [rows.copy()]


class Storm:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, number: int, frame: Any) -> None:
        self.count += 1
        raise KeyboardInterrupt


def make_function() -> Any:
    """Return a plain function that returns the next three rows; interrupted, it is called again and begins them anew."""
    following = [0]

    def fetch(worker_id: int, batch_size: int) -> Any:
        rows = np.arange(following[0], following[0] + 3)
        following[0] += 3
        return [rows]

    return fetch


def read(source: Any, storm: Storm, seconds: float) -> list[int]:
    """Read under the storm; return the rows that came."""
    rows: list[int] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        batches: list[Any] = []
        before = storm.count
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0005 + random.random() * 0.003)
            while storm.count == before:
                batches.append(source.next_batch(5.0))
        except KeyboardInterrupt:
            pass
        for batch in batches:
            rows += batch.data.tolist()
        faulthandler.dump_traceback_later(8.0, exit=True)
    return rows


def main(seconds: float, kind: str) -> str | None:
    fetch = iw.Stream(Rows(), rows_per_request=3) if kind == "ordered" else make_function()
    coordinator = iw.init_data_input_workers(
        "numpy", ["data"], fetch, 4, 0, ordered=kind == "ordered", coordinator=iw.GlobalCoordinator()
    )
    coordinator.start()
    source = coordinator["train"]
    rows = source.next_batch(5.0).data.tolist()
    random.seed(2)
    storm = Storm()
    signal.signal(signal.SIGALRM, storm)
    faulthandler.dump_traceback_later(8.0, exit=True)
    rows += read(source, storm, seconds)
    if storm.count < 50:
        return f"only {storm.count} interrupts"
    # A plain function that was interrupted just before it returned has lost its rows; a Stream loses none.
    if kind == "ordered" and rows != list(range(len(rows))):
        first = next(index for index, row in enumerate(rows) if row != index)
        return f"row {rows[first]} in place of row {first}, after {storm.count} interrupts"
    if rows != sorted(set(rows)):
        return "rows twice or out of order"
    coordinator.stop()
    failures = coordinator.last_stop.failures
    if failures or source.stats().rows_in_flight:
        return f"{failures}, {source.stats().ledger}"
    return None


if __name__ == "__main__":
    wrong = main(float(sys.argv[1]), sys.argv[2])
    sys.exit(wrong)
