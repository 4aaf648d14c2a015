"""faceswap's BackgroundGenerator: its defects on a restatement, where the check must fail, and ours, where it holds."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from gallery import caffe2_gallery as old
from gates import Gate, await_true, register

import input_workers as iw


def test_fs1_one_worker_that_ends_does_not_end_the_stream(coordinator: iw.GlobalCoordinator) -> None:
    with pytest.raises(AssertionError):
        assert list(old.FirstNoneEnds([lambda: range(2), lambda: range(5)])) == [0, 1, 0, 1, 2, 3, 4]
    ends = {0: 2, 1: 5}

    def fetch(worker_id: int, batch_size: int) -> Any:
        if not ends[worker_id]:
            raise iw.EndOfData
        ends[worker_id] -= 1
        return [np.zeros(1), np.zeros(1)]

    source = register(coordinator, fetch, 1, num_workers=2)
    coordinator.start()
    assert len(list(source)) == 7


def test_fs2_and_fs3_an_error_is_never_a_clean_end_and_wakes_who_waits(coordinator: iw.GlobalCoordinator) -> None:
    def fail() -> Any:
        yield 0
        raise OSError("disk gone")

    clean_ends: list[bool] = []
    old.FirstNoneEnds([fail], before_record=lambda faulty: clean_ends.append(list(faulty) == [0] and faulty.error is None))
    with pytest.raises(AssertionError):
        assert clean_ends == [False]
    gate = Gate()
    source = register(coordinator, gate, 4)
    coordinator.start()
    gate.await_calls()
    timer = threading.Thread(target=lambda: gate.raise_in(OSError("disk gone")))
    timer.start()
    started = time.monotonic()
    with pytest.raises(iw.FetchFailed):
        source.next_batch()
    assert time.monotonic() - started < 5 * 0.2
    timer.join()


def test_fs4_an_array_may_be_an_item() -> None:
    with pytest.raises(ValueError, match="ambiguous"):
        list(old.FirstNoneEnds([lambda: [np.array(["a", "b"])]]))
    # Ours never compares what it carries: batches are arrays in every test here.


def test_fs5_fetchers_end_when_the_trainer_leaves_with_full_queues(coordinator: iw.GlobalCoordinator) -> None:
    faulty = old.UnboundedPut(2)
    thread = threading.Thread(target=faulty.fill, args=(1, 1.0))
    thread.start()
    thread.join(0.05)
    with pytest.raises(AssertionError):
        assert not thread.is_alive()
    faulty.fill(1, 0.001)
    thread.join()
    source = register(coordinator, lambda worker_id, batch_size: [np.zeros(4), np.zeros(4)], num_workers=5)
    coordinator.start()
    await_true(lambda: len(source._core.run.assembly._waiters) == 5, "every fetcher at the door")
    assert coordinator.stop()
