"""Fetchers as threads: the conformance suite, and what is true of threads alone."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from fetchers.backend_conformance import BackendConformance, end_of_data
from gates import HANG_SECONDS, Gate, register
from self_certifying import CertifiedFetch, Witness

import input_workers as iw


class TestThreads(BackendConformance):
    fetchers = "thread"


class TestThreadsWithOptions(BackendConformance):
    fetchers = iw.Threads()


def stuck_in_here(event: threading.Event) -> None:
    event.wait(HANG_SECONDS)


def test_a_call_that_takes_too_long_fails_the_source_and_shows_where_it_hangs(coordinator: iw.GlobalCoordinator) -> None:
    release = threading.Event()
    fetch = CertifiedFetch(lambda worker, call: 4 if call < 2 else None, lambda: stuck_in_here(release))
    source = register(coordinator, fetch, 4, fetch_timeout_s=0.2)
    coordinator.start()
    witness = Witness()
    started = time.monotonic()
    for _ in range(2):
        witness.see(source.next_batch(), 4)
    with pytest.raises(iw.FetchTimeout, match=r"source 'train', worker 0: a call has run for over 0\.2 s") as caught:
        source.next_batch()
    assert time.monotonic() - started < 5 * 1.2
    assert "stuck_in_here" in str(caught.value)
    assert "event.wait(HANG_SECONDS)" in str(caught.value)
    assert source.stats().fetch_errors == {"FetchTimeout": 1}
    assert coordinator.stop(0.1) is False
    assert [each.name for each in coordinator.last_stop.stuck] == ["fetcher-train-0"]
    release.set()


def test_specs_are_not_waited_for_when_the_only_call_hangs(coordinator: iw.GlobalCoordinator) -> None:
    release = threading.Event()
    source = register(coordinator, lambda worker_id, batch_size: stuck_in_here(release), fetch_timeout_s=0.1)
    coordinator.start()
    try:
        with pytest.raises(iw.FetchTimeout):
            source.specs(HANG_SECONDS / 6)
    finally:
        release.set()


def test_calls_that_are_each_short_enough_never_time_out(coordinator: iw.GlobalCoordinator) -> None:
    pause = threading.Event()

    def lengths(worker: int, call: int) -> int | None:
        pause.wait(0.02)
        return 1 if call < 30 else None

    source = register(coordinator, CertifiedFetch(lengths, end_of_data), 5, fetch_timeout_s=1.0, num_workers=2)
    coordinator.start()
    assert sum(batch.valid_rows for batch in source) == 60


@pytest.mark.parametrize("seconds", [1e10, float("inf")])
def test_any_number_of_seconds_is_a_fetch_timeout(coordinator: iw.GlobalCoordinator, seconds: float) -> None:
    gate = Gate()
    source = register(coordinator, gate, 4, fetch_timeout_s=seconds)
    coordinator.start()
    gate.await_calls()
    gate.release(4)
    assert source.next_batch().valid_rows == 4
    gate.open(lambda worker_id: end_of_data())


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3])
def test_a_thread_that_cannot_be_started_undoes_the_whole_start(
    coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    fetch = CertifiedFetch(lambda worker, call: 4 if call < 8 else None, end_of_data)
    sources = [register(coordinator, fetch, 4, name=name, num_workers=2) for name in ("train", "test")]
    start, started = threading.Thread.start, [0]

    def failing(thread: threading.Thread) -> None:
        if "-test" in thread.name:
            started[0] += 1
            if started[0] == fails_at + 1:
                raise RuntimeError("can't start new thread")
        start(thread)

    before = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", failing)
        if fails_at < 3:
            with pytest.raises(RuntimeError, match="can't start new thread"):
                coordinator.start()
            assert threading.active_count() == before
    coordinator.start()
    assert all(sum(batch.valid_rows for batch in source) >= 0 for source in sources)
    assert sum(source.stats().rows_fetched for source in sources) == sum(fetch.made.values())


def test_threads_are_named_after_their_source_and_worker(coordinator: iw.GlobalCoordinator) -> None:
    gate = Gate()
    register(coordinator, gate, num_workers=2)
    coordinator.start()
    gate.await_calls(2)
    names = {thread.name for thread in threading.enumerate()}
    assert {"fetcher-train-0", "fetcher-train-1", "enqueuer-train"} <= names
    assert all(thread.daemon for thread in threading.enumerate() if "-train" in thread.name)
    gate.open()


def test_a_worker_gets_its_own_id_and_the_batch_size_as_a_hint(coordinator: iw.GlobalCoordinator) -> None:
    calls: set[tuple[int, int, str]] = set()

    def fetch(worker_id: int, batch_size: int) -> Any:
        calls.add((worker_id, batch_size, threading.current_thread().name))
        raise iw.EndOfData

    source = register(coordinator, fetch, 7, num_workers=3)
    coordinator.start()
    assert list(source) == []
    assert calls == {(worker, 7, f"fetcher-train-{worker}") for worker in coordinator.get_worker_ids()}
