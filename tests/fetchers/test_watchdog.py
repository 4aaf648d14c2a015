"""Calls that take too long are noticed in time, whatever else is busy, each once."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest
from gates import HANG_SECONDS, Gate, await_true, register
from self_certifying import Witness, make_chunk

import input_workers as iw
from input_workers.errors import Failure
from input_workers.fetchers.fetcher import Fetcher
from input_workers.fetchers.watchdog import Watchdog
from input_workers.metrics.fetcher_recorder import FetcherRecorder

TIMEOUT_SECONDS = 0.2
# A report may be late by this on a machine that is busy with other things.
LATE_SECONDS = 5.0


class BusyFeed(iw.feeds.NumpyFeed):
    """Each send takes until the test lets it go on; by default, a few milliseconds."""

    def __init__(self, is_shut: bool = False) -> None:
        self.gate = threading.Event()
        self.sending = threading.Event()
        self._seconds = HANG_SECONDS if is_shut else 0.005

    def send(self, slot: Any) -> Any:
        self.sending.set()
        self.gate.wait(self._seconds)
        return super().send(slot)


@pytest.fixture
def hang() -> Any:
    """An event on which a call hangs until the test is over."""
    event = threading.Event()
    yield event
    event.set()


def test_a_call_that_hangs_is_reported_in_time_while_the_feed_never_rests(
    coordinator: iw.GlobalCoordinator, hang: threading.Event
) -> None:
    def fetch(worker_id: int, batch_size: int) -> Any:
        if worker_id == source_ids[0]:
            hang.wait(HANG_SECONDS)
            raise iw.EndOfData
        return [np.zeros((32, 64), "float32")]

    source = register(coordinator, fetch, 32, num_workers=3, feed=BusyFeed(), fetch_timeout_s=TIMEOUT_SECONDS,
                      input_names=["data"])  # fmt: skip
    source_ids = coordinator.get_worker_ids()
    coordinator.start()
    started = time.monotonic()

    def read() -> None:
        while time.monotonic() - started < HANG_SECONDS:
            source.next_batch()

    with pytest.raises(iw.FetchTimeout, match=f"worker {source_ids[0]}: a call has run for over 0.2 s"):
        read()
    assert time.monotonic() - started < TIMEOUT_SECONDS + LATE_SECONDS
    hang.set()


def test_it_is_reported_while_the_enqueuer_is_inside_a_send_that_does_not_come_back(
    coordinator: iw.GlobalCoordinator, hang: threading.Event
) -> None:
    gate, feed = Gate(), BusyFeed(is_shut=True)
    source = register(coordinator, gate, 4, num_workers=1, feed=feed, fetch_timeout_s=TIMEOUT_SECONDS)
    coordinator.start()
    gate.release(4)
    assert feed.sending.wait(HANG_SECONDS)
    await_true(lambda: source.stats().fetch_errors == {"FetchTimeout": 1}, "the report of the next call, which hangs")
    feed.gate.set()
    Witness().see(source.next_batch(), 4)
    with pytest.raises(iw.FetchTimeout):
        source.next_batch()
    gate.open()


class HangsOnce:
    """A source in which the call for one row hangs, the first time."""

    def __init__(self, row: int, hang: threading.Event) -> None:
        self._row, self._hang = row, hang
        self._lock = threading.Lock()
        self.threads: list[str] = []

    def __len__(self) -> int:
        return 24

    def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
        if self._row in rows:
            with self._lock:
                self.threads.append(threading.current_thread().name)
                is_first = len(self.threads) == 1
            if is_first:
                self._hang.wait(HANG_SECONDS)
        return [rows.copy(), rows.copy()]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("row", [0, 9, 23])
def test_with_skip_the_call_is_given_to_another_fetcher_and_no_row_is_lost(
    coordinator: iw.GlobalCoordinator, hang: threading.Event, ordered: bool, row: int
) -> None:
    rows = HangsOnce(row, hang)
    policy = iw.ErrorPolicy(retries=1, backoff_s=0.0, skip=True)
    source = register(coordinator, iw.Stream(rows, rows_per_request=3), 4, num_workers=2, feed=BusyFeed(), ordered=ordered,
                      fetch_timeout_s=TIMEOUT_SECONDS, on_error=policy)  # fmt: skip
    coordinator.start()
    started = time.monotonic()
    seen = [label for batch in source for label in batch.label.tolist()]
    assert time.monotonic() - started < TIMEOUT_SECONDS + LATE_SECONDS
    assert sorted(seen) == list(range(24))
    assert seen == sorted(seen) or not ordered
    assert len(rows.threads) == 2
    stats = source.stats()
    assert (stats.fetcher_restarts, stats.fetch_errors) == (1, {"FetchTimeout": 1})
    hang.set()


def test_what_the_call_returns_in_the_end_is_not_used(coordinator: iw.GlobalCoordinator, hang: threading.Event) -> None:
    calls = iter(range(100))

    def fetch(worker_id: int, batch_size: int) -> Any:
        call = next(calls)
        if call == 1:
            hang.wait(HANG_SECONDS)
            return make_chunk(7, 0, 4)
        if call > 3:
            raise iw.EndOfData
        return make_chunk(0, call - (call > 1), 4)

    policy = iw.ErrorPolicy(retries=1, backoff_s=0.0, skip=True)
    source = register(coordinator, fetch, 4, fetch_timeout_s=TIMEOUT_SECONDS, on_error=policy)
    coordinator.start()
    witness = Witness()
    witness.see(source.next_batch(), 4)
    witness.see(source.next_batch(), 4)
    hang.set()
    for batch in source:
        witness.see(batch, 4)
    assert witness.rows == 12
    assert source.stats().rows_fetched == 12


# ---- the watchdog alone


class Watched:
    """A watchdog over fetchers of the test, in a thread that stays alive."""

    def __init__(self, abandons: bool, count: int = 2, timeout_s: float = 0.05) -> None:
        self.failed: list[tuple[Failure, Any]] = []
        self.given: list[Fetcher] = []
        self.fetchers = [Fetcher(FetcherRecorder(number)) for number in range(count)]
        self.ended = threading.Event()
        context: Any = SimpleNamespace(
            source="train",
            fetch_timeout_s=timeout_s,
            abandons=abandons,
            signal=SimpleNamespace(ended=self.ended),
            fail=lambda failure, request: self.failed.append((failure, request)),
        )
        self.watchdog = Watchdog(
            context,
            lambda: [(fetcher, threading.main_thread()) for fetcher in self.fetchers],
            lambda fetcher, failure: self.given.append(fetcher),
            lambda thread: f"the stack of {thread.name}",
        )

    def __enter__(self) -> Self:
        self.watchdog.thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.ended.set()
        self.watchdog.thread.join(HANG_SECONDS)
        assert not self.watchdog.thread.is_alive()


def test_each_call_is_reported_once_and_calls_that_end_are_not() -> None:
    with Watched(abandons=False, count=3) as watched:
        first, second, third = watched.fetchers
        third.begin_call(None)
        assert third.end_call()
        first.begin_call(iw.FetchRequest(5, 0, np.arange(1)))
        await_true(lambda: len(watched.failed) == 1)
        second.begin_call(None)
        await_true(lambda: len(watched.failed) == 2)  # the first was looked at again meanwhile
    (failure, request), (other, _) = watched.failed
    assert failure.message.startswith("source 'train', worker 0, request 5: a call has run for over 0.05 s")
    assert "the stack of MainThread" in failure.message
    assert request is first.request
    assert other.message.startswith("source 'train', worker 1: ")
    assert first.recorder.errors == {"FetchTimeout": 1}
    assert not watched.given


def test_a_call_that_is_taken_away_never_ends_and_one_that_has_ended_is_not_taken_away() -> None:
    with Watched(abandons=True) as watched:
        first, second = watched.fetchers
        first.begin_call(None)
        await_true(lambda: watched.given == [first])
        second.begin_call(None)
        await_true(lambda: watched.given == [first, second])
    assert first.abandoned
    assert not first.end_call()
    assert not first.abandon(time.monotonic())
    ended = Fetcher(FetcherRecorder(9))
    ended.begin_call(None)
    assert ended.end_call()
    assert not ended.abandon(time.monotonic())
    assert not watched.failed


def test_a_call_that_began_after_the_look_is_not_taken_away() -> None:
    fetcher = Fetcher(FetcherRecorder(0))
    before = time.monotonic()
    fetcher.begin_call(None)
    assert not fetcher.abandon(before - 1.0)
    assert fetcher.end_call()


def test_waiting_for_a_request_is_no_call() -> None:
    with Watched(abandons=False) as watched:
        first, second = watched.fetchers
        first.begin_call(None)
        first.begin_wait()
        second.begin_call(None)
        await_true(lambda: len(watched.failed) == 1)
        assert first.call_started == float("inf")
        first.end_wait()
        await_true(lambda: len(watched.failed) == 2)
    assert [failure.message.split(":")[0] for failure, _ in watched.failed] == [
        "source 'train', worker 1", "source 'train', worker 0",
    ]  # fmt: skip
