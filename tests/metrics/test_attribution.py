"""Attribution in real sources: a stage that is held up by the test is the one that is named, in stats, scrape and log."""

import threading
import time

import numpy as np
import pytest
from gates import HANG_SECONDS

import input_workers as iw
from input_workers.coordinator.reporter import log_line
from input_workers.feeds import NumpyFeed
from input_workers.metrics.instruments import INSTRUMENTS
from input_workers.metrics.snapshot import StageShares

STEP = 0.01  # what the slow stage takes for a batch; nothing else takes a tenth of it


def fetch(worker_id, batch_size):
    return [np.zeros((batch_size, 4), np.float32)]


def slow_fetch(worker_id, batch_size):
    with iw.timed("read"):
        time.sleep(STEP)
    with iw.timed("decode"):
        return fetch(worker_id, batch_size)


class SlowFeed(NumpyFeed):
    def send(self, slot):
        time.sleep(STEP)
        return super().send(slot)


class LateFeed(NumpyFeed):
    """Its copies are done no sooner than somebody needs them; it knows, by an event of its own for each."""

    chunk_alignment = None

    def send(self, slot):
        return slot.arrays, threading.Event()

    def is_ready(self, ticket):
        return ticket[1].is_set()

    def receive(self, ticket):
        arrays, copied = ticket
        copied.set()
        return arrays


def make(coordinator, function=fetch, workers=1, feed="numpy", **options):
    iw.init_data_input_workers(feed, ["data"], function, 8, workers, "train", coordinator=coordinator, **options)


def train(coordinator, batches=60, step=0.0):
    source = coordinator["train"]
    for _ in range(batches):
        source.next_batch(HANG_SECONDS)
        if step:
            time.sleep(step)
    return source.stats()


def samples(stats, name):
    instrument = next(each for each in INSTRUMENTS if each.name == name)
    return dict(instrument.read(stats, "running"))


def test_a_slow_fetch_function_is_named_with_its_slowest_part(coordinator, monkeypatch):
    monkeypatch.setattr("input_workers.metrics.windows.HISTORY_SECONDS", 20 * STEP)
    make(coordinator, slow_fetch)
    coordinator.start()
    stats = train(coordinator)
    window = stats.windows["run"]
    assert stats.verdict == "fetch", stats.verdict_text
    assert "add workers (1 -> " in stats.verdict_text or "more than 8 times" in stats.verdict_text
    assert stats.verdict_text.endswith("slowest part: read")
    assert window.fetchers.busy > 0.8
    assert window.trainer_wait > 0.8
    assert window.enqueuer.starved > 0.8
    assert window.device_queue_depth < 0.5  # a batch is taken as soon as it is there
    assert len(stats.history) > 1
    assert max(reading.device_queue_depth for reading in stats.history) < 0.5
    assert samples(stats, "input_workers_verdict") == {
        (word,): float(word == "fetch") for word in ("trainer", "fetch", "enqueue", "feed", "starting", "stopped")
    }
    shares = samples(stats, "input_workers_stage_share")
    assert shares["fetchers", "busy"] == stats.windows["10s"].fetchers.busy
    assert shares["trainer", "starved"] == stats.windows["10s"].trainer_wait
    assert samples(stats, "input_workers_fetch_part_seconds")["read",].seconds > 50 * STEP


class FailsLate:
    """A call raises after a while, and the next returns at once, in turn."""

    def __init__(self):
        self.calls = 0

    def __call__(self, worker_id, batch_size):
        self.calls += 1
        if self.calls % 2:
            time.sleep(STEP)
            raise ValueError("late")
        return fetch(worker_id, batch_size)


class MostRowsFailLate:
    """Each call raises after a while, but for one of a row that can be divided by four."""

    def __len__(self):
        return 200

    def fetch(self, rows, request):
        if len(rows) > 1 or rows[0] % 4:
            time.sleep(STEP)
            raise ValueError("late")
        return [rows.copy()]


@pytest.mark.parametrize("kind", ["function", "stream"])
@pytest.mark.parametrize(("workers", "fetchers"), [(1, "thread"), (1, "process"), (0, "thread")])
def test_the_time_of_calls_that_fail_is_busy_and_no_duration(coordinator, workers, fetchers, kind):
    function = FailsLate() if kind == "function" else iw.Stream(MostRowsFailLate(), rows_per_request=10, epochs=None)
    make(coordinator, function, workers, fetchers=fetchers, on_error=iw.ErrorPolicy(skip=True))
    coordinator.start()
    stats = train(coordinator, batches=30 if kind == "function" else 3)
    window, failed = stats.windows["run"], sum(stats.fetch_errors.values())
    assert failed >= 30
    assert window.fetchers.busy > 0.7
    assert stats.fetcher_busy_seconds > (failed - 1) * STEP
    assert stats.fetch.seconds < 0.2 * stats.fetcher_busy_seconds
    assert stats.verdict == "fetch", stats.verdict_text
    read = coordinator["train"]._core.recorder.read(time.monotonic())
    now = coordinator["train"].stats()
    assert stats.fetch.count + failed <= read.calls <= now.fetch.count + sum(now.fetch_errors.values())


def test_a_slow_trainer_is_named_and_everybody_before_it_is_blocked(coordinator):
    make(coordinator)
    coordinator.start()
    stats = train(coordinator, step=STEP)
    window = stats.windows["run"]
    assert stats.verdict == "trainer", stats.verdict_text
    assert window.enqueuer.blocked > 0.8
    assert window.fetchers.blocked > 0.8
    assert 2 < window.device_queue_depth <= 5  # as many as wait there, and the one in hand
    assert stats.device_queue_depth >= 2


def test_a_slow_feed_is_named(coordinator):
    make(coordinator, feed=SlowFeed())
    coordinator.start()
    stats = train(coordinator)
    window = stats.windows["run"]
    assert stats.verdict == "feed", stats.verdict_text
    assert window.feed > 0.8
    assert window.enqueuer.busy >= window.feed
    assert window.fetchers.blocked > 0.8


def test_a_function_that_returns_what_it_keeps_is_said_to_be_copied(coordinator):
    kept = np.zeros((4096, 1024), np.float32)  # 16 MiB a batch: copying takes far longer than all else

    def slices(worker_id, batch_size):
        return [kept]

    iw.init_data_input_workers(
        "numpy", ["data"], slices, 4096, 1, "train", coordinator=coordinator, max_buffered_batches=2, device_queue_depth=1
    )
    coordinator.start()
    stats = train(coordinator, batches=40)
    window = stats.windows["run"]
    assert stats.verdict == "fetch", stats.verdict_text
    assert "of that copying rows into batches: return exactly one batch a call" in stats.verdict_text
    assert 0.5 * window.fetchers.busy < window.copying <= window.fetchers.busy
    assert stats.fetch.seconds + stats.fetcher_copying_seconds == pytest.approx(stats.fetcher_busy_seconds)
    assert samples(stats, "input_workers_fetcher_copying_seconds_total")[()] == stats.fetcher_copying_seconds
    assert samples(stats, "input_workers_stage_share")["copying", "busy"] == stats.windows["10s"].copying


def test_batches_of_one_row_are_too_many_for_the_enqueuer(coordinator):
    kept = np.zeros((256, 64), np.float32)
    iw.init_data_input_workers("numpy", ["data"], lambda worker_id, batch_size: [kept], 1, 1, "train", coordinator=coordinator)
    coordinator.start()
    stats = train(coordinator, batches=5000)
    assert stats.verdict == "enqueue", stats.verdict_text
    assert stats.verdict_text.endswith("use a larger batch_size")


def test_what_is_advised_fits_the_device(coordinator):
    class OwnMemory(NumpyFeed):
        chunk_alignment = None

    kept = np.zeros((4096, 1024), np.float32)
    iw.init_data_input_workers(
        OwnMemory(), ["data"], lambda worker_id, batch_size: [kept], 4096, 1, "train", coordinator=coordinator,
        max_buffered_batches=2, device_queue_depth=1,
    )  # fmt: skip
    coordinator.start()
    stats = train(coordinator, batches=20)
    assert stats.windows["run"].batches_per_call == pytest.approx(1.0, abs=0.2)
    assert "copying rows into batches: return " in stats.verdict_text
    assert "exactly one batch" not in stats.verdict_text  # it would be copied as well


def test_copies_that_are_not_done_when_the_trainer_gets_them_are_the_feeds(coordinator):
    make(coordinator, feed=LateFeed())
    coordinator.start()
    stats = train(coordinator, step=STEP)
    assert stats.verdict == "feed", stats.verdict_text
    assert "batches were not on the device when the trainer got them" in stats.verdict_text
    assert stats.batches_not_ready == stats.batches_delivered == 60


def test_in_the_trainers_own_thread_what_it_fetches_is_what_it_waits_for(coordinator):
    make(coordinator, slow_fetch, workers=0)
    coordinator.start()
    stats = train(coordinator, batches=30, step=STEP)
    window = stats.windows["run"]
    assert stats.verdict == "fetch", stats.verdict_text
    assert "num_workers=1" in stats.verdict_text
    assert 0.3 < window.trainer_wait < 0.7
    assert window.fetchers.busy == pytest.approx(window.trainer_wait, abs=0.1)
    assert window.copying < 0.05  # by a thread of its own, after the call
    assert window.enqueuer.busy < 0.1
    assert window.enqueuer.starved > 0.9
    assert stats.fetch_parts["read"].count >= 30


def test_threads_that_hold_the_interpreter_lock_are_told_to_be_processes(coordinator):
    def spin(worker_id, batch_size):
        for _ in range(40_000):
            pass
        return fetch(worker_id, batch_size)

    make(coordinator, spin, workers=4)
    coordinator.start()
    began = time.monotonic()
    stats = train(coordinator, 1)
    while time.monotonic() - began < HANG_SECONDS and "GIL" not in stats.verdict_text:
        stats = train(coordinator, 20)
    assert "fetchers='process'" in stats.verdict_text


def test_a_wait_that_goes_on_is_in_the_numbers(coordinator):
    gate = threading.Event()
    calls = iter(range(100))

    def stuck(worker_id, batch_size):
        if next(calls) > 1:
            gate.wait(HANG_SECONDS)
        return fetch(worker_id, batch_size)

    make(coordinator, stuck)
    coordinator.start()
    source = coordinator["train"]
    source.next_batch(HANG_SECONDS)
    source.next_batch(HANG_SECONDS)
    trainer = threading.Thread(target=source.next_batch, args=(HANG_SECONDS,))
    trainer.start()
    deadline = time.monotonic() + HANG_SECONDS / 3  # before the wait could end
    try:
        while time.monotonic() < deadline and source.stats().windows["run"].trainer_wait < 0.5:
            threading.Event().wait(0.01)
        stats = source.stats()
    finally:
        gate.set()
        trainer.join()
    window = stats.windows["10s"]
    assert window.trainer_wait >= 0.5
    assert window.fetchers.busy > 0.5
    assert stats.consumer_wait_seconds > 0.4 * window.seconds
    assert stats.verdict == "fetch"
    assert source.stats().consumer_wait_seconds >= stats.consumer_wait_seconds


def test_a_reader_that_comes_once_finds_readings_all_along(coordinator, monkeypatch):
    monkeypatch.setattr("input_workers.metrics.windows.MARK_SECONDS", 0.0)
    monkeypatch.setattr("input_workers.metrics.device_recorder.RATE_MARK_SECONDS", 1e-6)
    make(coordinator, slow_fetch)
    coordinator.start()
    began = time.monotonic()
    source = coordinator["train"]
    for _ in range(40):
        source.next_batch(HANG_SECONDS)
    times = [mark.at for mark in source._core.recorder.marks._recent]
    assert len(times) > 30
    assert all(began <= at <= time.monotonic() for at in times)


def test_before_the_first_batch_a_source_is_starting_and_after_its_end_it_is_stopped(coordinator):
    left = iter(range(30))

    def finite(worker_id, batch_size):
        if next(left, None) is None:
            raise iw.EndOfData
        return slow_fetch(worker_id, batch_size)

    make(coordinator, finite)
    assert coordinator["train"].stats().verdict == "starting"
    coordinator.start()
    stats = coordinator["train"].stats()
    assert (stats.verdict, stats.windows["run"].batches) == ("starting", 0)
    assert "no batch yet" in stats.verdict_text
    for _ in coordinator["train"]:
        pass
    ended = coordinator["train"].stats()
    assert ended.verdict == "stopped"
    assert "fetch): trainer waits" in ended.verdict_text
    coordinator.stop()
    assert coordinator["train"].stats().windows["run"] == ended.windows["run"]


def test_the_windows_of_a_second_run_show_nothing_of_the_first(coordinator):
    make(coordinator, slow_fetch)
    coordinator.start()
    first = train(coordinator, 30)
    coordinator.stop()
    coordinator.start()
    stats = train(coordinator, 5)
    assert stats.verdict == "fetch"
    assert stats.windows["run"].batches < 5
    assert stats.windows["run"].seconds < first.windows["run"].seconds
    assert stats.batches_delivered >= 35


def test_an_abandoned_fetcher_is_not_counted_as_one_that_works(coordinator):
    gate, calls = threading.Event(), iter(range(1000))

    def hangs_once(worker_id, batch_size):
        if next(calls) == 1:
            gate.wait(HANG_SECONDS)
        return slow_fetch(worker_id, batch_size)

    make(coordinator, hangs_once, fetch_timeout_s=0.2, on_error=iw.ErrorPolicy(skip=True))
    coordinator.start()
    try:
        train(coordinator, 2)
        begin = coordinator["train"]._core.recorder.read(time.monotonic())
        train(coordinator, 40)
        end = coordinator["train"]._core.recorder.read(time.monotonic())
    finally:
        gate.set()
    assert end.fetchers - begin.fetchers <= 1.1 * (end.at - begin.at)
    assert end.fetch_busy - begin.fetch_busy <= 1.1 * (end.at - begin.at)


def test_the_log_line_has_the_verdict(coordinator, caplog):
    make(coordinator, slow_fetch)
    coordinator.start()
    train(coordinator, 20)
    with caplog.at_level("INFO", "input_workers"):
        log_line(coordinator["train"]._core)
    assert "fetch: trainer waits" in caplog.records[-1].getMessage()


def test_shares_of_a_stage_add_up(coordinator):
    make(coordinator, slow_fetch, workers=2)
    coordinator.start()
    window = train(coordinator).windows["run"]
    for shares in (window.fetchers, window.enqueuer):
        assert isinstance(shares, StageShares)
        assert shares.busy + shares.starved + shares.blocked == pytest.approx(1.0, abs=0.05)
    assert window.fetchers_alive == pytest.approx(2.0, abs=0.1)
