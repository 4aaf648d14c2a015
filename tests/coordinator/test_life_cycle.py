"""Start, stop and start again: what each call does in each state, and what a new run may not see of the old one."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import numpy as np
import pytest
from gates import HANG_SECONDS, Gate, await_true, register
from self_certifying import CertifiedFetch, Witness, make_chunk

import input_workers as iw


def end_of_data() -> Any:
    raise iw.EndOfData


def test_a_restart_has_fresh_queues_and_no_stale_chunk_and_its_counters_go_on(coordinator: iw.GlobalCoordinator) -> None:
    run = [0]
    calls = itertools.count()
    source = register(coordinator, lambda worker_id, size: make_chunk(worker_id, next(calls), 6, source=run[0]), 4)
    fetched = delivered = 0
    for run[0] in range(5):
        coordinator.start()
        await_true(lambda: source.stats().device_queue_depth == 4, "full queues")
        before = source.stats().batches_delivered
        for _ in range(3):
            assert (source.next_batch().data[:, 0] == run[0]).all(), "a row of an earlier run"
        assert coordinator.stop()
        stats = source.stats()
        assert stats.batches_delivered == before + 3
        assert stats.rows_fetched > fetched
        assert stats.rows_delivered == delivered + 12
        assert stats.rows_in_flight == 0
        assert stats.rows_fetched == stats.rows_delivered + stats.rows_dropped["stopped"]
        assert (stats.queue_depth, stats.queue_bytes, stats.device_queue_depth, stats.fetchers_alive) == (0, 0, 0, 0)
        fetched, delivered = stats.rows_fetched, stats.rows_delivered


def test_a_finished_source_starts_again_from_its_beginning(coordinator: iw.GlobalCoordinator) -> None:
    source = register(coordinator, iw.Stream(iw.sources.Arrays(np.arange(10), np.arange(10))), 5)
    for _ in range(3):
        coordinator.start()
        assert [batch.data.tolist() for batch in source] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
        assert coordinator.stop()


def test_a_chunk_that_comes_back_late_counts_as_stopped_and_never_enters_the_next_run(
    coordinator: iw.GlobalCoordinator,
) -> None:
    first, called, come_back = threading.Semaphore(1), threading.Event(), threading.Event()
    calls = itertools.count(1)
    stuck: list[threading.Thread] = []

    def fetch(worker_id: int, batch_size: int) -> Any:
        if first.acquire(blocking=False):
            stuck.append(threading.current_thread())
            called.set()
            stuck_in_here(come_back)
            return make_chunk(worker_id, 0, 4)
        return make_chunk(worker_id, next(calls), 4)

    source = register(coordinator, fetch, 4)
    coordinator.start()
    assert called.wait(HANG_SECONDS)
    assert coordinator.stop(0.05) is False
    assert [each.name for each in coordinator.last_stop.stuck] == ["fetcher-train-0"]
    assert "stuck_in_here" in coordinator.last_stop.stuck[0].stack
    coordinator.start()
    source.next_batch()
    come_back.set()
    stuck[0].join(HANG_SECONDS)
    assert not stuck[0].is_alive()
    assert source.stats().rows_dropped["stopped"] == 4, "the late chunk is accounted for"
    assert all((source.next_batch().data[:, 2] > 0).all() for _ in range(20)), "the late chunk came in"


def stuck_in_here(event: threading.Event) -> None:
    event.wait(HANG_SECONDS)


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_starting_and_stopping_are_idempotent(coordinator: iw.GlobalCoordinator, calls: int) -> None:
    fetch = CertifiedFetch(lambda worker, call: 4, end_of_data)
    source = register(coordinator, fetch)
    assert coordinator.stop(), "before the first start there is nothing to stop"
    before = threading.active_count()
    for _ in range(calls):
        coordinator.start()
    assert threading.active_count() == before + 3, "a fetcher, an enqueuer, the log"
    assert Witness().see(source.next_batch(), 4) is not None
    reports = []
    for _ in range(calls):
        assert coordinator.stop()
        reports.append(coordinator.last_stop)
    assert threading.active_count() == before
    assert all((each.ended, each.stuck, each.failures, each.ledgers) ==
               (True, (), {}, reports[0].ledgers) for each in reports)  # fmt: skip


def test_reading_before_the_start_and_after_the_stop_says_which_it_is(coordinator: iw.GlobalCoordinator) -> None:
    source = register(coordinator, CertifiedFetch(lambda worker, call: 4, end_of_data))
    for read in (source.next_batch, source.specs, lambda: next(source)):
        with pytest.raises(iw.LifecycleError, match=r"'train' was not started; call start\(\) first"):
            read()
    coordinator.start()
    source.next_batch()
    coordinator.stop()
    for read in (source.next_batch, lambda: next(source), lambda: source.next_batch(0)):
        with pytest.raises(iw.QueueClosed, match="'train' was stopped"):
            read()


def test_specs_after_a_stop_that_came_before_any_chunk_say_that_it_was_stopped(coordinator: iw.GlobalCoordinator) -> None:
    source = register(coordinator, lambda worker_id, size: None)
    coordinator.start()
    coordinator.stop()
    with pytest.raises(iw.QueueClosed):
        source.specs(1.0)


def test_a_stop_wakes_everybody_who_waits(coordinator: iw.GlobalCoordinator) -> None:
    gate = Gate()
    source = register(coordinator, gate)
    coordinator.start()
    gate.await_calls()
    ends: list[str] = []

    def read(call: Any) -> None:
        try:
            call()
        except iw.InputWorkersError as error:
            ends.append(type(error).__name__)

    readers = [threading.Thread(target=read, args=(call,)) for call in (source.next_batch, lambda: next(source), source.specs)]
    for reader in readers:
        reader.start()
    gate.open()
    coordinator.stop()
    for reader in readers:
        reader.join(HANG_SECONDS)
        assert not reader.is_alive()
    assert ends == ["QueueClosed"] * 3


def test_stopping_one_source_leaves_the_others_running(coordinator: iw.GlobalCoordinator) -> None:
    names = ("train", "test", "extra")
    sources = {
        name: register(coordinator, CertifiedFetch(lambda w, c: 4, end_of_data, source=index), name=name)
        for index, name in enumerate(names)
    }
    coordinator.start()
    witnesses = {name: Witness(index) for index, name in enumerate(names)}
    assert sources["test"].stop()
    for _ in range(50):
        for name in ("train", "extra"):
            witnesses[name].see(sources[name].next_batch(), 4)
    with pytest.raises(iw.QueueClosed):
        sources["test"].next_batch()
    coordinator.start()
    assert (sources["test"].next_batch().data[:, 0] == 1).all(), "started again, beside the others"
    witnesses["train"].see(sources["train"].next_batch(), 4)


@pytest.mark.parametrize("timeout_s", [float("inf"), 1e12, 0.0])
def test_a_stop_takes_any_number_of_seconds(coordinator: iw.GlobalCoordinator, timeout_s: float) -> None:
    register(coordinator, CertifiedFetch(lambda worker, call: 4, end_of_data))
    coordinator.start()
    assert coordinator.stop(timeout_s) in (True, False)
    assert coordinator.stop()


def test_twenty_hung_fetchers_cost_one_deadline_and_are_all_named(coordinator: iw.GlobalCoordinator) -> None:
    gate = Gate()
    source = register(coordinator, gate, num_workers=20)
    coordinator.start()
    gate.await_calls(20)
    started = time.monotonic()
    assert coordinator.stop(0.5) is False
    assert time.monotonic() - started < 0.5 + 5.0
    report = coordinator.last_stop
    assert sorted(each.name for each in report.stuck) == sorted(f"fetcher-train-{w}" for w in coordinator.get_worker_ids())
    assert all("in __call__" in each.stack for each in report.stuck)
    with pytest.raises(iw.QueueClosed):
        source.next_batch()
    gate.open()
    assert coordinator.stop()
    assert coordinator.last_stop.stuck == ()


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_init_function_that_raises_starts_nothing_and_may_be_tried_again(
    coordinator: iw.GlobalCoordinator, bad: int
) -> None:
    called: list[str] = []
    broken = [True]

    def init(handle: Any, everything: Any) -> None:
        assert everything is coordinator
        called.append(handle.name)
        assert threading.active_count() == before, "a fetcher runs before all init functions have"
        if handle.name == f"source_{bad}" and broken[0]:
            raise OSError("no such disk")

    before = threading.active_count()
    fetch = CertifiedFetch(lambda worker, call: 4, end_of_data)
    sources = [register(coordinator, fetch, name=f"source_{index}", init_fun=init) for index in range(3)]
    for _ in range(2):
        called.clear()
        with pytest.raises(OSError, match="no such disk"):
            coordinator.start()
        assert called == [f"source_{index}" for index in range(bad + 1)]
        assert threading.active_count() == before
        assert not fetch.made
    broken[0] = False
    called.clear()
    coordinator.start()
    assert called == ["source_0", "source_1", "source_2"]
    assert [source.next_batch().valid_rows for source in sources] == [4, 4, 4]
    coordinator.stop()
    coordinator.start()
    assert called == ["source_0", "source_1", "source_2"], "once, at the first start"


def test_a_with_block_starts_and_stops_and_leaves_the_users_error_as_it_is(coordinator: iw.GlobalCoordinator) -> None:
    source = register(coordinator, CertifiedFetch(lambda worker, call: 4, end_of_data))
    error = ZeroDivisionError("the trainer's own")
    with pytest.raises(ZeroDivisionError) as caught:  # noqa: PT012, SIM117
        with coordinator as entered:
            assert entered is coordinator
            source.next_batch()
            raise error
    assert caught.value is error
    assert coordinator.last_stop.ended
    with pytest.raises(iw.QueueClosed):
        source.next_batch()


def test_a_with_block_tells_the_users_error_which_source_had_failed(coordinator: iw.GlobalCoordinator) -> None:
    def fetch(worker_id: int, batch_size: int) -> Any:
        raise OSError("disk gone")

    source = register(coordinator, fetch)
    with pytest.raises(RuntimeError) as caught, coordinator:  # noqa: PT012
        with pytest.raises(iw.FetchFailed):
            source.next_batch()
        raise RuntimeError("the trainer's own")
    assert any("OSError: disk gone" in note and "'train'" in note for note in caught.value.__notes__)


def test_one_failed_source_leaves_the_others_running(coordinator: iw.GlobalCoordinator) -> None:
    def fail(worker_id: int, batch_size: int) -> Any:
        raise OSError("disk gone")

    broken = register(coordinator, fail, name="broken")
    sound = register(coordinator, CertifiedFetch(lambda worker, call: 4, end_of_data), name="sound")
    coordinator.start()
    with pytest.raises(iw.FetchFailed):
        broken.next_batch()
    witness = Witness()
    for _ in range(100):
        witness.see(sound.next_batch(), 4)
    coordinator.stop()
    assert list(coordinator.last_stop.failures) == ["broken"]
    assert sorted(coordinator.last_stop.ledgers) == ["broken", "sound"]
