"""Random workers are killed at random moments while rows flow; the rows alone say whether any was lost, repeated or torn."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from typing import Any

import psutil
from fetchers.shared_between import CertifiedRows, certified_rows, rows_seen
from gates import register

import input_workers as iw
from input_workers.fetchers.fork_server import fork_server


def kill_while_it_runs(coordinator: iw.GlobalCoordinator, kills: int, seed: int, ordered: bool) -> None:
    """Run epochs of a Stream until so many workers were killed; each epoch must come whole."""
    rows, generator = 4000, random.Random(seed)
    stream = iw.Stream(CertifiedRows(rows, width=300), True, seed, None, rows_per_request=20, epoch_end="break")
    source = register(coordinator, stream, 32, num_workers=4, fetchers=iw.Processes(restarts=10 * kills), ordered=ordered,
                      max_buffered_batches=4, last_batch="keep")  # fmt: skip
    coordinator.start()
    done, next_kill = 0, time.monotonic()
    while done < kills:
        seen: list[int] = []
        for batch in source:
            seen += rows_seen(batch)
            server = fork_server.holds()
            workers = psutil.Process(server[0]).children() if server is not None else []
            if workers and done < kills and time.monotonic() >= next_kill:
                os.kill(generator.choice(workers).pid, signal.SIGKILL)
                done += 1
                next_kill = time.monotonic() + generator.uniform(0.0, 0.2)
        assert sorted(seen) == [*range(rows)]
    assert source.stats().fetcher_restarts >= 1


def kill_a_plain_function(coordinator: iw.GlobalCoordinator, kills: int, seed: int) -> None:
    """Every chunk of a plain function comes at most once, whole, and the source goes on."""
    generator = random.Random(seed)

    def fetch(worker_id: int, batch_size: int) -> Any:
        first = int.from_bytes(os.urandom(5), "big")
        return certified_rows(range(first, first + 16), 200)

    source = register(coordinator, fetch, 16, num_workers=3, fetchers=iw.Processes(restarts=10 * kills))
    coordinator.start()
    firsts: set[int] = set()
    tick = threading.Event()
    for _ in range(kills):
        for _ in range(generator.randrange(1, 40)):
            rows = rows_seen(source.next_batch())
            assert rows == [*range(rows[0], rows[0] + 16)]
            assert rows[0] not in firsts
            firsts.add(rows[0])
        server = fork_server.holds()
        workers = psutil.Process(server[0]).children() if server is not None else []
        if workers:
            os.kill(generator.choice(workers).pid, signal.SIGKILL)
        tick.wait(generator.uniform(0.0, 0.02))
    for _ in range(100):
        rows_seen(source.next_batch())
