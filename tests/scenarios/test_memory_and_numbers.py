"""Memory as the system counts it, and many sources at once. Each case in a process of its own, whose memory is its own."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

PRELUDE = """
import resource, threading
import numpy as np
import input_workers as iw

def resident():
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * resource.getpagesize()

def peak():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

def make(fetch, batch_size, **more):
    more = {"num_workers": 1, **more}
    return iw.init_data_input_workers("numpy", ["data"], fetch, batch_size, coordinator=iw.GlobalCoordinator(), **more)
"""


def run(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", PRELUDE + script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("keeps", [False, True], ids=["handed over", "kept by the function"])
def test_a_chunk_of_a_hundred_batches_costs_its_own_memory_and_a_few_batches(keeps: bool) -> None:
    run(f"""
ROW, BATCH, TIMES = 1 << 20, 4, 100
keeps = {keeps}
kept = np.ones((BATCH * TIMES, ROW), np.uint8) if keeps else None
calls = []
def fetch(worker_id, batch_size):
    if len(calls) == 2:
        raise iw.EndOfData
    calls.append(1)
    return [kept if keeps else np.ones((BATCH * TIMES, ROW), np.uint8)]
coordinator = make(fetch, BATCH, max_buffered_batches=2)
chunk, batch = BATCH * TIMES * ROW, BATCH * ROW
before = peak()
with coordinator:
    assert sum(batch.data.shape[0] for batch in coordinator["train"]) == 2 * BATCH * TIMES
grown = peak() - before
# One chunk in the queue, one in the fetcher's hands, the device queue's batches and two more; and what Python itself takes.
bound = 2 * chunk + (4 + 2) * batch + (32 << 20)
assert grown <= bound, (grown >> 20, bound >> 20)
""")


GIGABYTE = 1 << 30


@pytest.mark.skipif(psutil.virtual_memory().available < 4 * GIGABYTE, reason="needs 4 GB of free memory")
@pytest.mark.parametrize("keeps", [False, True], ids=["handed over", "kept by the function"])
def test_a_chunk_of_a_gigabyte_costs_at_most_one_chunk_more_than_the_function_itself_holds(keeps: bool) -> None:
    run(f"""
BATCH, TIMES = 4, 100
ROW = {GIGABYTE} // (BATCH * TIMES)
def make_rows():
    rows = np.ones((BATCH * TIMES, ROW), np.uint8)
    rows[:, -1] = np.arange(BATCH * TIMES) % 256
    return rows
kept = make_rows() if {keeps} else None
calls = []
def fetch(worker_id, batch_size):
    if calls:
        raise iw.EndOfData
    calls.append(1)
    return [kept if {keeps} else make_rows()]
coordinator = make(fetch, BATCH, max_buffered_batches=2)
before = peak()
rows = 0
with coordinator:
    for batch in coordinator["train"]:
        assert batch.data[:, -1].tolist() == [(rows + row) % 256 for row in range(BATCH)]
        assert batch.data[0, 0] == 1
        rows += BATCH
assert rows == BATCH * TIMES
grown = peak() - before
# The chunk, or the copy of the one that is kept; the device queue's batches and two more; and what Python itself takes.
bound = (BATCH * TIMES + (4 + 2) * BATCH) * ROW + (32 << 20)
assert grown <= bound, (grown >> 20, bound >> 20)
""")


def test_a_small_input_that_is_held_keeps_nothing_else_alive() -> None:
    run("""
def fetch(worker_id, batch_size):
    return [np.zeros((1 << 20,), np.uint8)[: 1 << 12].reshape(4, -1)]
coordinator = make(fetch, 4)
with coordinator:
    source = coordinator["train"]
    for _ in range(100):
        source.next_batch()
    before = resident()
    held = [source.next_batch() for _ in range(2000)]
    grown = resident() - before
size = sum(batch.data.nbytes for batch in held)
assert grown <= 2 * size + (8 << 20), (grown, size)
""")


def test_labels_that_are_held_do_not_hold_the_pictures() -> None:
    run("""
def fetch(worker_id, batch_size):
    return [np.zeros((3, 1 << 18), np.uint8), np.zeros(3, np.int64)]
coordinator = iw.init_data_input_workers("numpy", ["picture", "label"], fetch, 4, 1, coordinator=iw.GlobalCoordinator())
with coordinator:
    source = coordinator["train"]
    for _ in range(50):
        source.next_batch()
    before = resident()
    held = [source.next_batch().label for _ in range(500)]  # 500 MB of pictures
    assert resident() - before < 64 << 20, resident() - before
""")


def test_two_hundred_sources_start_deliver_and_stop() -> None:
    run("""
coordinator = iw.GlobalCoordinator()
for number in range(200):
    fetch = lambda worker_id, batch_size, number=number: [np.full(5, number)]
    iw.init_data_input_workers("numpy", ["data"], fetch, 8, 1, f"source_{number}", coordinator=coordinator)
before = threading.active_count()
coordinator.start()
for number, source in enumerate(coordinator):
    for _ in range(20):
        assert (source.next_batch().data == number).all()
assert coordinator.stop(60.0), coordinator.last_stop
assert not coordinator.last_stop.failures
assert threading.active_count() == before
""")


def test_memory_stays_flat_over_starts_and_stops() -> None:
    run("""
coordinator = make(lambda worker_id, batch_size: [np.zeros((3, 64))], 8, num_workers=2)
def cycle():
    coordinator.start()
    coordinator["train"].next_batch()
    assert coordinator.stop(60.0)
for _ in range(30):
    cycle()
before = resident()
for _ in range(200):
    cycle()
assert resident() - before < 5 << 20, resident() - before
""")
