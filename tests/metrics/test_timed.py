"""`timed`: parts of a fetch function are measured for the source that called it, and nowhere else."""

import statistics
import threading
import time

import numpy as np
import pytest
from gates import HANG_SECONDS

import input_workers as iw
from input_workers.metrics.fetcher_recorder import FetcherRecorder
from input_workers.metrics.histogram import MOST_PARTS
from input_workers.metrics.recorder import SourceRecorder
from input_workers.metrics.timed import fetcher_here


def rows(batch_size):
    return [np.zeros((batch_size, 2), np.float32)]


def test_parts_go_to_the_source_whose_fetcher_ran_them(coordinator):
    def reads(worker_id, batch_size):
        with iw.timed("read"):
            return rows(batch_size)

    def decodes(worker_id, batch_size):
        with iw.timed("decode"):
            time.sleep(0.002)
        with iw.timed("resize"):
            return rows(batch_size)

    for name, function in (("a", reads), ("b", decodes)):
        iw.init_data_input_workers("numpy", ["data"], function, 4, 3, name, coordinator=coordinator)
    with coordinator:
        for name in ("a", "b"):
            for _ in range(50):
                coordinator[name].next_batch(HANG_SECONDS)
    a, b = coordinator["a"].stats(), coordinator["b"].stats()
    assert set(a.fetch_parts) == {"read"}
    assert set(b.fetch_parts) == {"decode", "resize"}
    assert a.fetch_parts["read"].count == a.fetch.count
    assert b.fetch_parts["decode"].count == b.fetch_parts["resize"].count == b.fetch.count
    assert b.fetch_parts["decode"].seconds == pytest.approx(b.fetch.seconds, rel=0.2)


def test_counts_are_kept_over_runs(coordinator):
    def reads(worker_id, batch_size):
        with iw.timed("read"):
            return rows(batch_size)

    iw.init_data_input_workers("numpy", ["data"], reads, 4, 2, "train", coordinator=coordinator)
    for _ in range(2):
        with coordinator:
            for _ in range(30):
                coordinator["train"].next_batch(HANG_SECONDS)
    stats = coordinator["train"].stats()
    assert stats.fetch_parts["read"].count == stats.fetch.count >= 60


def test_outside_a_fetcher_nothing_happens(coordinator):
    seen = []

    def starts_a_thread(worker_id, batch_size):
        def helper():
            with iw.timed("elsewhere"):
                seen.append(1)

        thread = threading.Thread(target=helper)
        thread.start()
        thread.join()
        return rows(batch_size)

    with iw.timed("before"):
        iw.init_data_input_workers("numpy", ["data"], starts_a_thread, 4, 0, "train", coordinator=coordinator)
        coordinator.start()
        coordinator["train"].next_batch(HANG_SECONDS)
    with iw.timed("after"):
        pass
    assert seen
    assert coordinator["train"].stats().fetch_parts == {}


def test_a_source_read_inside_anothers_fetch_function_has_its_own_parts():
    inner, outer = iw.GlobalCoordinator(), iw.GlobalCoordinator()

    def in_inner(worker_id, batch_size):
        with iw.timed("inner"):
            return rows(batch_size)

    def in_outer(worker_id, batch_size):
        (data,) = inner["train"].next_batch(HANG_SECONDS)
        with iw.timed("outer"):
            return [np.array(data)]

    for coordinator, function in ((inner, in_inner), (outer, in_outer)):
        iw.init_data_input_workers("numpy", ["data"], function, 4, 0, "train", coordinator=coordinator)
    with inner, outer:
        for _ in range(3):
            outer["train"].next_batch(HANG_SECONDS)
    assert {name: part.count for name, part in outer["train"].stats().fetch_parts.items()} == {"outer": 3}
    assert {name: part.count for name, part in inner["train"].stats().fetch_parts.items()} == {"inner": 3}


def test_a_body_that_raises_is_measured_and_raises(coordinator):
    def breaks(worker_id, batch_size):
        with iw.timed("read"):
            raise OSError("no disk")

    iw.init_data_input_workers("numpy", ["data"], breaks, 4, 1, "train", coordinator=coordinator)
    coordinator.start()
    with pytest.raises(iw.FetchFailed, match="no disk"):
        coordinator["train"].next_batch(HANG_SECONDS)
    assert coordinator["train"].stats().fetch_parts["read"].count == 1


def test_names_beyond_the_bound_are_one_for_all_fetchers_of_a_source_together():
    source = SourceRecorder({})
    fetchers = [source.fetcher(number) for number in range(3)]

    def fetch(recorder):
        with fetcher_here(recorder):
            for number in range(40):
                for _ in range(10):
                    with iw.timed(f"{recorder.worker_id}-{number}"):
                        pass

    threads = [threading.Thread(target=fetch, args=(recorder,)) for recorder in fetchers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = FetcherRecorder.merged(source.fetchers()).parts
    assert len(total) == MOST_PARTS + 1
    assert sum(sum(part.read()[0]) for part in total.values()) == 3 * 40 * 10
    assert sum(total["other"].read()[0]) == (3 * 40 - MOST_PARTS) * 10


def test_samples_do_not_pile_up():
    recorder = FetcherRecorder(0)
    with fetcher_here(recorder):
        for _ in range(10_000):
            with iw.timed("read"):
                pass
    assert len(recorder.parts["read"].samples) < 1000
    assert sum(recorder.parts["read"].read()[0]) == 10_000


def test_it_takes_a_microsecond_or_so():
    recorder = FetcherRecorder(0)
    timed, took = iw.timed, []
    with fetcher_here(recorder):
        for _ in range(20):
            began = time.perf_counter()
            for _ in range(1000):
                with timed("read"):
                    pass
            took.append((time.perf_counter() - began) / 1000)
    assert min(took) < 3e-6, statistics.median(took)  # a busy machine; alone it is a quarter of this
