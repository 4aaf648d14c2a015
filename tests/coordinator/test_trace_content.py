"""What a trace shows is what happened: as many calls as were made, as long as they took, on the row of who made them."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fetchers.shared_between import HANG_SECONDS, CertifiedRows, Door, FileCounter, Knocker
from gates import Gate, await_true, register
from metrics.trace_checker import Checked, check_trace

import input_workers as iw
from input_workers.feeds import NumpyFeed
from input_workers.metrics.trace import SourceTrace, Trace

LONG = 600.0
WIDTH = 1100  # values of a row: chunks of it go through blocks
EXACT = 1e-4  # seconds: what lies between the clock of a call and that of who watches it, for all calls together


class Slow:
    """Knocks at each worker's first call; each later one takes 3 ms of `timed` parts."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.knocked: set[int] = set()

    def __call__(self, request: Any) -> None:
        if request.worker_id not in self.knocked:
            self.knocked.add(request.worker_id)
            Knocker(self.address).knock()
            return
        with iw.timed("read"):
            time.sleep(0.002)
        with iw.timed("decode"):
            time.sleep(0.001)


def traced_to_the_end(source: Any, path: Path, begun: Any = None) -> tuple[Checked, iw.SourceStats]:
    """Trace from now, when nothing moves, until the data end; return what the file and the source say."""
    trace = source.trace(path, LONG)
    if begun is not None:
        begun()
    for _ in source:
        pass
    checked = check_trace(Path(trace.wait(HANG_SECONDS)), {"read", "decode"})
    return checked, source.stats()


@pytest.mark.parametrize("fetchers", ["thread", "process"])
def test_the_calls_are_those_that_were_made(
    coordinator: iw.GlobalCoordinator, tmp_path: Path, door: Door, fetchers: Any
) -> None:
    stream = iw.Stream(CertifiedRows(160, Slow(door.address), width=WIDTH), rows_per_request=4)
    source = register(coordinator, stream, num_workers=2, fetchers=fetchers)
    coordinator.start()
    for _ in range(2):
        door.await_knock()
    recorders = source._core.recorder.fetchers()
    entered = [recorder.call_started for recorder in recorders if recorder.alive]
    assert len(entered) == 2
    before = source.stats()
    assert before.fetch.count == 0
    checked, after = traced_to_the_end(source, tmp_path / "t", door.open)
    row = ("fetcher-train-", "trainer") if fetchers == "thread" else ("fetch function", "worker ")
    calls = checked.spans("call", *row)
    assert len(calls) == after.fetch.count == 40
    assert sorted(span.args["request"] for span in calls) == list(range(40))
    # The two that were under way when the trace began are shown from then on.
    cut = [span for span in calls if span.begin == 0.0]
    whole = sum(span.seconds for span in calls if span.begin)
    assert len(cut) == 2
    if fetchers == "thread":
        unseen = sum(checked.about["began_monotonic"] - since for since in entered)
        assert whole + sum(span.seconds for span in cut) + unseen == pytest.approx(after.fetch.seconds, abs=EXACT)
    assert whole < after.fetch.seconds
    assert whole >= 38 * 0.003
    # Workers have a second call in their pipe when they are told of the trace.
    late = 0 if fetchers == "thread" else 2 * 2
    for part, seconds in (("read", 0.002), ("decode", 0.001)):
        shown = checked.spans(part, *row)
        assert 38 - late <= len(shown) <= after.fetch_parts[part].count == 38
        assert all(span.seconds >= seconds for span in shown)
        if not late:
            assert sum(span.seconds for span in shown) == pytest.approx(after.fetch_parts[part].seconds, abs=EXACT)
    assert len(checked.spans("waiting for rows", "enqueuer-train")) >= 10
    assert len(checked.spans("send")) == after.batches_delivered == 40
    # A span for each chunk, all on rows of this process: it copies what its worker processes fetched, too.
    copying = checked.spans("copying")
    assert len(copying) == len(checked.spans("copying", "fetcher-train-", "trainer")) == 40
    waits = checked.spans("waiting for room", "fetcher-train-")
    inside = [wait for wait in waits if any(span.begin <= wait.begin and wait.end <= span.end for span in copying)]
    assert inside == waits
    assert sum(span.seconds for span in copying) - sum(wait.seconds for wait in waits) == pytest.approx(
        after.fetcher_copying_seconds, abs=EXACT
    )
    assert sum(span.seconds for span in checked.spans("waiting for a batch")) == pytest.approx(
        after.consumer_wait_seconds, abs=EXACT
    )


def test_in_the_trainers_own_thread_too(coordinator: iw.GlobalCoordinator, tmp_path: Path) -> None:
    def prepare(request: Any) -> None:
        with iw.timed("read"):
            time.sleep(0.002)

    stream = iw.Stream(CertifiedRows(40, prepare), rows_per_request=4)
    source = register(coordinator, stream, num_workers=0)
    coordinator.start()
    checked, stats = traced_to_the_end(source, tmp_path / "t")
    calls, reads = checked.spans("call", "fetcher-train-0"), checked.spans("read", "fetcher-train-0")
    assert len(calls) == len(reads) == stats.fetch.count == 10
    assert sum(span.seconds for span in calls) == pytest.approx(stats.fetch.seconds, abs=EXACT)
    assert sum(span.seconds for span in reads) == pytest.approx(stats.fetch_parts["read"].seconds, abs=EXACT)
    waits, gets = checked.spans("waiting for a batch"), checked.spans("next_batch")
    assert sum(span.seconds for span in waits) == pytest.approx(stats.consumer_wait_seconds, abs=EXACT)
    copying = checked.spans("copying", "fetcher-train-0")
    assert len(copying) == 10
    assert all(span.begin >= call.end - EXACT for span, call in zip(copying, calls, strict=True))  # of what it returned
    for call in calls:  # made by the trainer while it waits
        assert any(wait.begin <= call.begin and call.end <= wait.end for wait in waits)
        assert any(get.begin <= call.begin and call.end <= get.end for get in gets)


def test_a_trainer_trains_between_two_batches_and_everybody_waits_for_it(
    coordinator: iw.GlobalCoordinator, tmp_path: Path
) -> None:
    def fetch(worker_id: int, batch_size: int) -> Any:
        return [np.zeros((4, WIDTH), np.float32), np.zeros(4)]

    source = register(coordinator, fetch, max_buffered_batches=2, device_queue_depth=1)
    recorder = source._core.recorder
    coordinator.start()
    await_true(lambda: recorder.fetchers()[1].blocked[1] < float("inf") > recorder.enqueuer_blocked[1])
    before = source.stats()
    trace = source.trace(tmp_path / "t", LONG)
    for _ in range(5):
        source.next_batch()
        time.sleep(0.01)
    coordinator.stop()
    checked, after = check_trace(Path(trace.wait(HANG_SECONDS))), source.stats()
    training = checked.spans("training", "trainer MainThread")
    assert [span.is_open for span in training] == [False] * 4 + [True]
    assert all(0.01 <= span.seconds < HANG_SECONDS for span in training)
    assert len(checked.spans("next_batch")) == 5
    for row, seconds in (
        ("fetcher-train-0", after.fetcher_blocked_seconds - before.fetcher_blocked_seconds),
        ("enqueuer-train", after.enqueuer_blocked_seconds - before.enqueuer_blocked_seconds),
    ):
        waits = [span for span in checked.row(row) if span.name == "waiting for room"]
        assert len(waits) >= 3
        assert 0.02 <= sum(span.seconds for span in waits) <= seconds + EXACT
    assert max(value for _, value in checked.counters["device queue of train"]) == 1.0
    assert max(value for _, value in checked.counters["assembly of train"]) >= 2.0


def test_a_slow_feed_is_seen_on_each_of_its_devices(coordinator: iw.GlobalCoordinator, tmp_path: Path) -> None:
    class SlowFeed(NumpyFeed):
        def send(self, slot: Any) -> Any:
            time.sleep(0.002)
            return super().send(slot)

    gate = Gate()
    for scope in ("gpu_0", "gpu_1"):
        iw.init_data_input_workers(
            SlowFeed(), ["data", "label"], gate, 4, 1, "train", name_scope=scope, coordinator=coordinator
        )
    coordinator.start()
    gate.await_calls(2)
    trace = coordinator["train"].trace(tmp_path / "t", LONG)
    for number in range(6):
        if number % 2 == 0:  # a batch for each device, or none is sent
            gate.release(4)
            gate.release(4)
        coordinator[f"gpu_{number % 2}/train"].next_batch(HANG_SECONDS)
    gate.end()
    gate.end()
    coordinator.stop()
    checked = check_trace(Path(trace.wait(HANG_SECONDS)))
    sent = checked.spans("send", "enqueuer-train")
    assert Counter(span.args["device"] for span in sent) == {"gpu_0/train": 3, "gpu_1/train": 3}
    assert all(span.seconds >= 0.002 for span in sent)
    assert [span.args["device"] for span in checked.spans("next_batch")] == ["gpu_0/train", "gpu_1/train"] * 3


@pytest.mark.parametrize("fetchers", ["thread", "process"])
def test_failed_calls_are_shown_as_such(coordinator: iw.GlobalCoordinator, tmp_path: Path, door: Door, fetchers: Any) -> None:
    made, knocker = FileCounter(tmp_path / "made"), Knocker(door.address)

    def fails(request: Any) -> None:
        number = made.add()
        if number == 0:
            knocker.knock()
        if number % 3 == 1:
            raise OSError("no disk")

    policy = iw.ErrorPolicy(retries=2, backoff_s=0.001)
    stream = iw.Stream(CertifiedRows(40, fails, width=WIDTH), rows_per_request=4)
    source = register(coordinator, stream, fetchers=fetchers, on_error=policy)
    coordinator.start()
    door.await_knock()
    checked, stats = traced_to_the_end(source, tmp_path / "t", door.open)
    row = ("fetcher-train-", "trainer") if fetchers == "thread" else ("fetch function", "worker ")
    assert len(checked.spans("failed call", *row)) == stats.fetch_errors["OSError"] == made.value - 10
    assert len(checked.spans("call", *row)) == 10


def test_a_worker_that_takes_anothers_place_has_a_row_of_its_own(
    coordinator: iw.GlobalCoordinator, tmp_path: Path, door: Door
) -> None:
    made, knocker = FileCounter(tmp_path / "made"), Knocker(door.address)

    def dies(request: Any) -> None:
        number = made.add()
        if number == 0:
            knocker.knock()
        if number == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    stream = iw.Stream(CertifiedRows(40, dies, width=WIDTH), rows_per_request=4)
    source = register(coordinator, stream, fetchers="process")
    coordinator.start()
    first, _ = door.await_knock()
    checked, _ = traced_to_the_end(source, tmp_path / "t", door.open)
    workers = {pid: name for pid, name in checked.pids.items() if name == "worker 0 of train"}
    assert len(workers) == 2
    assert set(workers) > {first}
    assert len(checked.spans("call", "fetch function")) == 10
    assert len(checked.spans("waiting for the worker", "fetcher-train-0")) == 10


@pytest.mark.parametrize("fetchers", ["thread", "process"])
def test_a_function_without_data_and_its_end_are_shown_as_such(
    coordinator: iw.GlobalCoordinator, tmp_path: Path, door: Door, fetchers: Any
) -> None:
    calls, knocker = itertools.count(), Knocker(door.address)

    def seldom(worker_id: int, batch_size: int) -> Any:
        number = next(calls)
        if number == 0:
            knocker.knock()
        if number == 30:
            raise iw.EndOfData
        return [np.zeros((4, WIDTH)), np.zeros(4)] if number % 3 == 0 else None

    source = register(coordinator, seldom, fetchers=fetchers)
    coordinator.start()
    door.await_knock()
    checked, stats = traced_to_the_end(source, tmp_path / "t", door.open)
    row = ("fetcher-train-", "trainer") if fetchers == "thread" else ("fetch function", "worker ")
    assert len(checked.spans("call", *row)) == stats.fetch.count == 30
    assert len(checked.spans("no data", "fetcher-train-0")) == 20
    assert not checked.spans("failed call")


def test_calls_whose_small_chunks_are_sent_as_one_are_one(
    coordinator: iw.GlobalCoordinator, tmp_path: Path, door: Door
) -> None:
    calls, knocker = itertools.count(), Knocker(door.address)

    def small(worker_id: int, batch_size: int) -> Any:
        number = next(calls)
        if number == 0:
            knocker.knock()
        if number == 300:
            raise iw.EndOfData
        time.sleep(0.02 if number % 40 == 39 else 0.0002)  # rows do not wait for the slow one: another thread sends them
        return [np.zeros((1, 2)), np.zeros(1)]

    source = register(coordinator, small, fetchers="process")
    coordinator.start()
    door.await_knock()
    checked, stats = traced_to_the_end(source, tmp_path / "t", door.open)
    shown = checked.spans("call", "fetch function")
    assert 20 <= len(shown) == stats.fetch.count <= 300
    assert sum(span.seconds for span in shown) >= 7 * 0.02


@pytest.mark.parametrize("workers", [0, 2])
def test_it_may_begin_and_end_between_any_two_steps_of_those_it_traces(
    coordinator: iw.GlobalCoordinator, workers: int, request: pytest.FixtureRequest
) -> None:
    def timed(worker_id: int, batch_size: int) -> Any:
        with iw.timed("read"):
            return [np.zeros((4, 2)), np.zeros(4)]

    source = register(coordinator, timed, num_workers=workers, max_buffered_batches=2, device_queue_depth=1)
    coordinator.start()
    interval = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(interval))
    sys.setswitchinterval(1e-6)
    done = threading.Event()
    recorder = source._core.recorder

    def toggle() -> None:
        while not done.is_set():
            recorder.begin_trace(SourceTrace(Trace("", LONG), "train", False))
            recorder.end_trace()

    thread = threading.Thread(target=toggle)
    thread.start()
    try:
        for _ in range(3000):
            source.next_batch()
    finally:
        done.set()
        thread.join()
