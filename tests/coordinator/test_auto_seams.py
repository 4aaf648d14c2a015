"""num_workers="auto" beside other parts: rows of any shape, failures in order, processes that die or have no thread."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fetchers.shared_between import CertifiedRows, Door, rows_seen
from fetchers.wandering import Script
from gates import HANG_SECONDS, await_true, register

import input_workers as iw
from input_workers.fetchers.worker_calls import WorkerCalls


def test_a_bound_on_bytes_and_rows_of_any_shape(coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    """How large a chunk is cannot be told from the specs."""
    script = Script(monkeypatch, 3)
    specs = [iw.ArraySpec((None,), np.float32), iw.ArraySpec((), np.int64)]
    source = register(
        coordinator,
        lambda worker_id, batch_size: [np.zeros((2, worker_id), np.float32), np.zeros(2, np.int64)],
        num_workers="auto",
        fetchers=iw.Threads(2, 5),
        rebatch=False,
        specs=specs,
        max_buffered_bytes=100,
    )
    coordinator.start()
    for _ in range(20):
        source.next_batch()
    await_true(lambda: source.next_batch().valid_rows == 2 and script.asked[-1][:2] == (3, 5), "three are there, five may be")


def test_in_order_a_request_of_a_released_process_that_dies_is_fetched_though_all_others_wait_for_it(
    coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch, door: Door, tmp_path: Path
) -> None:
    script, once = Script(monkeypatch, 2), str(tmp_path / "knocked")

    def before(request: iw.FetchRequest) -> None:
        if request.worker_id == 1 and not os.path.exists(once):
            open(once, "x").close()
            door.knock()

    source = register(
        coordinator,
        iw.Stream(CertifiedRows(400, before), rows_per_request=4),
        num_workers="auto",
        fetchers=iw.Processes(min_workers=2),
        ordered=True,
        max_buffered_batches=2,
    )
    coordinator.start()
    pid, _ = door.await_knock()
    script.have(1, "worker 1 is asked to rest")
    await_true(lambda: source.stats().workers[0].state == "blocked", "worker 0 has no room but for what worker 1 is at")
    os.kill(pid, signal.SIGKILL)
    assert [row for batch in source for row in rows_seen(batch)] == [*range(400)]


def test_one_that_was_released_and_failed_does_not_come_back(
    coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order its failure waits for the requests before it, and it must not fetch meanwhile."""
    script, go_on, fail = Script(monkeypatch, 2), threading.Event(), threading.Event()
    calls: list[int] = []

    class Rows:
        def __len__(self) -> int:
            return 40

        def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
            calls.append(request.index)
            assert (fail if request.index else go_on).wait(HANG_SECONDS)
            if request.index:
                raise ValueError("a bad disk")
            return [rows.copy(), rows.copy()]

    stream = iw.Stream(Rows(), rows_per_request=4)
    source = register(coordinator, stream, num_workers="auto", fetchers=iw.Threads(2), ordered=True)
    coordinator.start()
    await_true(lambda: sorted(calls) == [0, 1], "both are in a call")
    backend = source._core.run._fetchers
    (failing,) = [each for each in backend.at_work() if each.request.index]
    failing.released = True
    fail.set()
    await_true(lambda: failing not in backend.at_work(), "it has failed")
    script.want = 3  # only now: while it is in its call, another would rightly be begun
    await_true(lambda: script.asked[-1] == (1, 1, "end"), "it has failed, and no other is begun")
    assert source._core.run.workers == 2, "that the data end says nothing about the next run"
    go_on.set()
    assert source.next_batch().data.tolist() == [0, 1, 2, 3]
    with pytest.raises(iw.FetchFailed, match="a bad disk"):
        source.next_batch()
    assert sorted(calls) == [0, 1]
    assert source.stats().fetch_errors == {"ValueError": 1}


def test_a_process_whose_thread_cannot_be_started_does_not_outlive_the_run(
    coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(monkeypatch, 1)
    rows = iw.Stream(CertifiedRows(4000), rows_per_request=4)
    source = register(coordinator, rows, num_workers="auto", fetchers=iw.Processes(max_workers=3))
    launched: list[WorkerCalls] = []
    start, launch = threading.Thread.start, WorkerCalls.launch
    coordinator.start()

    def failing(thread: threading.Thread) -> None:
        if thread.name.startswith("fetcher-train-"):
            raise RuntimeError("can't start new thread")
        start(thread)

    def noted(calls: WorkerCalls, beside_threads: bool = False) -> None:
        launch(calls, beside_threads)
        launched.append(calls)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", failing)
        patch.setattr(WorkerCalls, "launch", noted)
        script.want = 3
        await_true(lambda: script.asked[-1][1:] == (script.asked[-1][0], "start"), "no more may be")
    assert len([row for batch in source for row in rows_seen(batch)]) == 4000
    await_true(lambda: not source.stats().fetchers_alive, "the data have ended, and nobody has stopped the source")
    (calls,) = launched
    assert calls._session is not None
    await_true(lambda: calls._session.process.has_ended(0.0), "so has the process that nobody served")


def test_stats_may_be_read_while_a_worker_is_added(coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    source = register(coordinator, iw.Stream(CertifiedRows(40), rows_per_request=4), num_workers=2, fetchers="process")
    coordinator.start()
    calls_by_id = source._core.run._fetchers._calls

    def another_comes(calls: WorkerCalls) -> int:
        calls_by_id[99] = calls
        return 1

    with monkeypatch.context() as patch:
        patch.setattr(WorkerCalls, "block_bytes", property(another_comes))
        assert source.stats().block_bytes == 2
    del calls_by_id[99]
