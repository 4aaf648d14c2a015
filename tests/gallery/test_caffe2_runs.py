"""Defects of the ancestor's runs (life cycle, bounds, counters): the check fails on the restatement and holds on ours."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest
from gallery import caffe2_gallery as old
from gallery.caffe2_gallery import feed_of
from gates import HANG_SECONDS, Gate, await_true, register

import input_workers as iw


def numbered(count: int, rows: int) -> list[list[np.ndarray]]:
    return [[np.arange(i * rows, (i + 1) * rows), np.arange(i * rows, (i + 1) * rows)] for i in range(count)]


def test_dw13_a_stop_has_one_deadline_for_all_threads(coordinator: iw.GlobalCoordinator) -> None:
    gate, release = Gate(), threading.Event()
    threads = [threading.Thread(target=release.wait) for _ in range(10)]
    for thread in threads:
        thread.start()
    started = time.monotonic()
    old.join_one_by_one(threads, 0.05)
    assert time.monotonic() - started >= 10 * 0.05
    release.set()
    for thread in threads:
        thread.join()
    register(coordinator, gate, num_workers=40)
    coordinator.start()
    gate.await_calls(40)
    started = time.monotonic()
    assert coordinator.stop(0.2) is False
    assert time.monotonic() - started < 40 * 0.2
    assert len(coordinator.last_stop.stuck) == 40
    gate.open()


def test_dw14_and_dw15_a_second_run_has_its_own_chunks_and_its_own_threads(coordinator: iw.GlobalCoordinator) -> None:
    runs = old.QueuesByName()
    runs.workers = [lambda chunks: chunks.append("first run")]
    runs.start("train")
    runs.stop()
    with pytest.raises(AssertionError):
        assert list(runs.start("train")) == ["second run"]
    run = [0]
    source = register(coordinator, lambda worker_id, batch_size: [np.full(4, run[0]), np.full(4, run[0])])
    for run[0] in (1, 2):
        coordinator.start()
        assert (source.next_batch().data == run[0]).all()
        coordinator.stop()


def test_dw16_the_bound_is_in_bytes_too(coordinator: iw.GlobalCoordinator) -> None:
    faulty = old.UnboundedPut(80)
    faulty.fill(1_000_000, 0.001)
    with pytest.raises(AssertionError):
        assert faulty.nbytes <= 4_000_000
    source = register(coordinator, lambda worker_id, batch_size: [np.zeros((10, 100_000), np.uint8), np.zeros(10, np.uint8)],
                      10, max_buffered_batches=80, max_buffered_bytes=4_000_000, device_queue_depth=1)  # fmt: skip
    coordinator.start()
    await_true(lambda: source.stats().queue_bytes >= 3_000_000, "as much is fetched as fits")
    await_true(lambda: [each.state for each in source.stats().workers.values()] == ["blocked"], "the fetcher waits for room")
    stats = source.stats()
    assert 3_000_000 <= stats.queue_bytes <= 4_000_000
    assert stats.rows_fetched * 100_001 <= 4_000_000 + 2 * 1_000_010 + 3 * 1_000_010


def test_dw17_the_arrays_of_a_batch_arrive_together_or_not_at_all(coordinator: iw.GlobalCoordinator) -> None:
    faulty = old.QueuePerArray(2)
    faulty.put([np.zeros(2), np.zeros(2)], between=lambda: setattr(faulty, "closed", True))
    with pytest.raises(AssertionError):
        assert len(faulty.queues[0]) == len(faulty.queues[1]) == faulty.counted
    source = register(coordinator, lambda worker_id, batch_size: [np.zeros(3), np.zeros(3)])
    for _ in range(20):
        coordinator.start()
        source.next_batch()
        coordinator.stop()
        stats = source.stats()
        assert stats.rows_fetched == stats.rows_delivered + sum(stats.rows_dropped.values())


class Switching:
    """A number that lets another thread run in the middle of an addition."""

    def __init__(self, between: Any) -> None:
        self._between = between

    def __radd__(self, other: Any) -> Any:
        self._between()
        return other + 1

    def __float__(self) -> float:
        self._between()
        return 1.0


def test_dw18_a_sum_is_not_lost_when_threads_switch_in_the_middle(coordinator: iw.GlobalCoordinator) -> None:
    faulty = old.SharedSums()
    faulty.put("x", Switching(lambda: faulty.put("x", 1)))
    with pytest.raises(AssertionError):
        assert faulty.sums["x"] == 2
    source = register(coordinator, Gate())
    source.put_metric("x", Switching(lambda: source.put_metric("x", 1)))
    assert source._core.recorder.put_metrics()["x"] == (2.0, 2)


@pytest.mark.parametrize("jump", [-3600.0, 0.0, 3600.0])
def test_dw19_the_wall_clock_may_jump(coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    faulty = old.SharedSums()
    monkeypatch.setattr(time, "time", lambda: now + jump)
    with pytest.raises((AssertionError, ZeroDivisionError)):
        assert faulty.rate(1000) > 1
    source = register(coordinator, feed_of(numbered(50, 4)), 4)
    coordinator.start()
    assert len(list(source)) == 50
    assert source.stats().inputs_per_second >= 0
    assert source.stats().consumer_wait_seconds < HANG_SECONDS


def test_dw20_worker_ids_are_unique_under_many_threads(coordinator: iw.GlobalCoordinator) -> None:
    together = threading.Barrier(2)
    faulty, taken = old.UnlockedIds(lambda: together.wait(HANG_SECONDS)), []
    threads = [threading.Thread(target=lambda: taken.append(faulty.new())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(AssertionError):
        assert len(set(taken)) == 2
    # Ours: tests/coordinator/test_concurrency.py registers 200 sources from 8 threads.
    assert len({coordinator.get_new_worker_id() for _ in range(100)}) == 100


def test_dw21_a_batch_size_that_changes_tears_no_batch() -> None:
    faulty = old.SizeReadTwice(4)
    with pytest.raises(AssertionError):
        faulty.batch(np.arange(10), between=lambda: setattr(faulty, "batch_size", 6))
    # Ours: tests/coordinator/test_delivery.py changes it a thousand times under load.


def test_dw22_small_batches_do_not_hold_a_large_parent(coordinator: iw.GlobalCoordinator) -> None:
    parents: list[Any] = []

    def large() -> list[np.ndarray]:
        parent = np.zeros((1000, 100))
        parents.append(weakref.ref(parent))
        return [parent[:4], np.zeros(4)]

    faulty = old.AppendAndSplit(4, 10)
    faulty.put(large())
    batch = faulty.batch()
    gc.collect()
    assert parents[0]() is not None
    del batch
    source = register(coordinator, lambda worker_id, batch_size: large(), 4, rebatch=False)
    coordinator.start()
    held = [source.next_batch() for _ in range(50)]
    coordinator.stop()
    gc.collect()
    assert len(held) == 50
    assert sum(parent() is not None for parent in parents) <= 2, "a batch of 3 KB holds 800 KB"


def test_dw23_an_init_function_that_fails_leaves_nothing_running(coordinator: iw.GlobalCoordinator) -> None:
    def fail(*args: Any) -> None:
        raise OSError("no such disk")

    running: list[int] = []
    with pytest.raises(OSError, match="no such disk"):
        old.start_in_turn([lambda: None, fail], running.append)
    with pytest.raises(AssertionError):
        assert running == []
    register(coordinator, Gate(), name="first")
    register(coordinator, Gate(), name="second", init_fun=fail)
    before = threading.active_count()
    with pytest.raises(OSError, match="no such disk"):
        coordinator.start()
    assert threading.active_count() == before
