"""A source at full speed and a client that reads /metrics ten times a second go in; what the client costs comes out."""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import input_workers as iw
from input_workers.bench.measure import BATCH, Result

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["scraped"]

SCRAPES_PER_SECOND = 10
SLICE_SECONDS = 0.5
PAIRS = 40  # of slices, with scrapes and without
COST_WANTED = 0.005

# A process of its own, as Prometheus is. It reads "1" (scrape), "0" (do not) or the end, and then says how often it did.
CLIENT = f"""
import http.client, math, os, select, sys, time
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=10)
scrapes, due = 0, math.inf
while True:
    wait = None if due == math.inf else max(0.0, due - time.monotonic())
    if select.select([0], [], [], wait)[0]:
        order = os.read(0, 1)
        if not order:
            break
        due = time.monotonic() if order == b"1" else math.inf
    else:
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        if response.status != 200 or b"input_workers_rows_delivered_total" not in response.read():
            sys.exit(f"got {{response.status}}")
        scrapes, due = scrapes + 1, due + 1 / {SCRAPES_PER_SECOND}
print(scrapes)
"""


@dataclass(slots=True)
class _Slice:
    """What was done in a slice of time, and at what price."""

    rows: int = 0
    seconds: float = 0.0
    used: float = 0.0  # processor seconds of the process
    served: float = 0.0  # processor seconds of the metrics server's threads


def scraped(counts: tuple[int, ...] = (1, 64), pairs: int = PAIRS) -> list[Result]:
    """Compare rows/s of chunks of one row with and without scrapes, of one source among so many; the others are idle.

    Slices of time alternate within one run. What others do on a machine moves rows/s by far more than what is looked for, so
    there is no target for it, but for rows by processor time, which others cannot take away, and for the processor time of the
    server's threads, which is what the others of this process lose at most.
    """
    results = []
    for count in counts:
        slices, scrapes = _measure(count, pairs)
        both = list(zip(slices[True], slices[False], strict=True))
        by_time = statistics.median((a.rows / a.seconds) / (b.rows / b.seconds) for a, b in both)
        by_processor = statistics.median((a.rows / a.used) / (b.rows / b.used) for a, b in both)
        shares = sorted(each.served / each.seconds for each in slices[True])
        least, middle = (f"{1000 * share / SCRAPES_PER_SECOND:.2f}" for share in (shares[0], statistics.median(shares)))
        name = "1 source" if count == 1 else f"{count} sources"
        of_one = count == 1
        wanted, most = (1.0 - COST_WANTED, 100 * COST_WANTED) if of_one else (None, None)
        results += [
            Result(f"10 scrapes/s of {name}, rows/s of without", by_time, None, "", f"{pairs} pairs of {SLICE_SECONDS} s"),
            Result(f"10 scrapes/s of {name}, rows a processor second of without", by_processor, wanted, "", "1-row chunks"),
            Result(
                f"10 scrapes/s of {name}, processor time of the server",
                100 * statistics.median(shares),
                most,
                "%",
                f"of a core; {middle} ms a scrape, at least {least}; {scrapes} scrapes",
                at_most=True,
            ),
        ]
    return results


def _measure(count: int, pairs: int) -> tuple[dict[bool, list[_Slice]], int]:
    """Return slices of time, with scrapes and without, and how many scrapes there were."""
    row = [np.full((1, 16), 1.0, np.float32), np.full(1, 1)]
    idle = threading.Event()

    def wait(worker_id: int, batch_size: int) -> list[NDArray[Any]]:  # noqa: ARG001
        idle.wait()
        raise iw.EndOfData

    coordinator = iw.GlobalCoordinator()
    for index in range(count):
        fetch = wait if index else lambda worker_id, batch_size: row  # noqa: ARG005
        iw.init_data_input_workers("numpy", ["data", "label"], fetch, BATCH, 1, f"bench_{index}", coordinator=coordinator)
    slices: dict[bool, list[_Slice]] = {True: [], False: []}
    with coordinator, iw.serve_metrics(0, coordinator=coordinator) as server:
        command = [sys.executable, "-c", CLIENT, str(server.port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as client:
            assert client.stdin is not None  # noqa: S101  it is a pipe
            assert client.stdout is not None  # noqa: S101
            try:
                _slice(coordinator["bench_0"])  # warms up
                for pair in range(pairs):
                    for scrape in (pair % 2 == 0, pair % 2 == 1):
                        client.stdin.write(b"1" if scrape else b"0")
                        slices[scrape].append(_slice(coordinator["bench_0"]))
                client.stdin.close()
                scrapes = int(client.stdout.read() or 0)
            except BrokenPipeError as error:
                raise RuntimeError("benchmark: the client that scrapes has ended before its time; it says why above") from error
            except BaseException:
                client.kill()
                raise
            finally:
                idle.set()
    wanted = SCRAPES_PER_SECOND * sum(each.seconds for each in slices[True])
    if scrapes < wanted / 2:
        raise RuntimeError(f"benchmark: {scrapes} scrapes came through; wanted {wanted:.0f}")
    return slices, scrapes


def _slice(source: iw.DataInputCoordinator) -> _Slice:
    served, used, started = _server_seconds(), time.process_time(), time.perf_counter()
    found = _Slice()
    while found.seconds < SLICE_SECONDS:
        source.next_batch()
        found.rows += BATCH
        found.seconds = time.perf_counter() - started
    found.used = time.process_time() - used
    found.served = _server_seconds() - served
    return found


def _server_seconds() -> float:
    """Return the processor time that the threads of the metrics server have used."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("metrics-") and thread.ident]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0)) for thread in threads)
