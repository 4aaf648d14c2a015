"""Many threads at once, and calls from where nobody expects them: one winner, no deadlock, nothing half done."""

from __future__ import annotations

import collections
import itertools
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from gates import HANG_SECONDS, Gate, register
from self_certifying import CertifiedFetch, check_batch

import input_workers as iw
from input_workers.fetchers.inline import InlineFetchers


def end_of_data() -> Any:
    raise iw.EndOfData


def endless(source: int = 0) -> CertifiedFetch:
    return CertifiedFetch(lambda worker, call: 4, end_of_data, source)


def test_eight_threads_that_start_stop_read_and_register_leave_a_coordinator_that_works(
    coordinator: iw.GlobalCoordinator,
) -> None:
    together = threading.Barrier(8)

    def work(seed: int) -> collections.Counter[str]:
        random_ = random.Random(seed)
        done: collections.Counter[str] = collections.Counter()
        together.wait(HANG_SECONDS)
        for step in range(60):
            what = random_.choice(["start", "start", "stop", "read", "read", "register", "stats"])
            try:
                if what == "start":
                    coordinator.start()
                elif what == "stop":
                    assert coordinator.stop(HANG_SECONDS)
                elif what == "register":
                    register(coordinator, endless(), name=random_.choice([f"source_{seed}_{step}", f"shared_{step}"]))
                elif what == "read" and len(coordinator):
                    check_batch(random_.choice(list(coordinator)).next_batch(0.01), 4)
                else:
                    coordinator.stats()
                done[what] += 1
            except (iw.QueueClosed, iw.WaitTimeout) as error:
                done[type(error).__name__] += 1
            except iw.LifecycleError as error:
                assert "was not started" in str(error), error  # noqa: PT017
            except iw.ConfigError as error:
                assert "is registered already" in str(error), error  # noqa: PT017
        return done

    with ThreadPoolExecutor(8) as pool:
        done = sum((each.result(HANG_SECONDS * 2) for each in [pool.submit(work, seed) for seed in range(8)]),
                   collections.Counter())  # fmt: skip
    assert done["read"] > 0
    coordinator.start()
    assert all(source.next_batch().valid_rows == 4 for source in coordinator)
    assert coordinator.stop(HANG_SECONDS)
    assert coordinator.last_stop.failures == {}
    ids = coordinator.get_worker_ids()
    assert len(ids) == len(set(ids)) == len(coordinator)


def test_two_hundred_sources_registered_by_eight_threads_have_unique_workers(coordinator: iw.GlobalCoordinator) -> None:
    fetch = endless()

    def work(seed: int) -> list[int]:
        for number in range(25):
            register(coordinator, fetch, name=f"source_{seed}_{number}", num_workers=3)
        return [coordinator.get_new_worker_id() for _ in range(25)]

    with ThreadPoolExecutor(8) as pool:
        mine = [worker_id for ids in pool.map(work, range(8)) for worker_id in ids]
    ids = coordinator.get_worker_ids() + mine
    assert len(ids) == len(set(ids)) == 800


CALLS: dict[str, Callable[[iw.GlobalCoordinator], Any]] = {
    "start": lambda coordinator: coordinator.start(),
    "stop": lambda coordinator: coordinator.stop(HANG_SECONDS / 3),
    "stop of the source": lambda coordinator: coordinator["train"].stop(HANG_SECONDS / 3),
    "register": lambda coordinator: register(coordinator, endless(), name="another"),
    "nest": lambda coordinator: nested(),
    "stats": lambda coordinator: coordinator.stats(),
    "read": lambda coordinator: coordinator["train"].next_batch(0),
}


def nested() -> int:
    inner = iw.GlobalCoordinator()
    source = register(inner, endless(), 4, name="inner")
    with inner:
        return source.next_batch().valid_rows


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("what", CALLS)
def test_a_fetch_function_may_call_anything_without_a_deadlock(
    coordinator: iw.GlobalCoordinator, what: str, workers: int
) -> None:
    outcomes: list[Any] = []
    first = threading.Semaphore(1)
    inner = endless()

    def fetch(worker_id: int, batch_size: int) -> Any:
        if first.acquire(blocking=False):
            try:
                outcomes.append(CALLS[what](coordinator))
            except iw.InputWorkersError as error:
                outcomes.append(error)
        return inner(worker_id, batch_size)

    source = register(coordinator, fetch, 4, num_workers=workers)
    started = time.monotonic()
    coordinator.start()
    try:
        for _ in itertools.count() if what.startswith("stop") else range(10):
            source.next_batch()
    except iw.QueueClosed:
        assert what.startswith("stop")
    assert time.monotonic() - started < HANG_SECONDS
    assert coordinator.stop(HANG_SECONDS)
    assert len(outcomes) == 1
    if what == "nest":
        assert outcomes == [4]
    if what == "read" and workers == 0:
        assert isinstance(outcomes[0], iw.LifecycleError)


@pytest.mark.parametrize("what", ["start", "stop", "register", "nest", "stats"])
def test_an_init_function_may_call_anything_without_a_deadlock(coordinator: iw.GlobalCoordinator, what: str) -> None:
    outcomes: list[Any] = []

    def init(handle: Any, everything: iw.GlobalCoordinator) -> None:
        try:
            outcomes.append(CALLS[what](everything))
        except iw.LifecycleError as error:
            outcomes.append(error)

    source = register(coordinator, endless(), init_fun=init)
    coordinator.start()
    assert source.next_batch().valid_rows == 4
    assert isinstance(outcomes[0], iw.LifecycleError) is (what in ("start", "stop"))


def test_two_stops_at_once_both_return_while_a_fetcher_hangs(coordinator: iw.GlobalCoordinator) -> None:
    gate = Gate()
    register(coordinator, gate)
    coordinator.start()
    gate.await_calls()
    with ThreadPoolExecutor(4) as pool:
        stops = [pool.submit(coordinator.stop, seconds) for seconds in (1.0, 0.2, 0.2, 0.0)]
        results = [each.result(HANG_SECONDS) for each in stops]
    assert results == [False] * 4
    gate.open()


@pytest.mark.parametrize("consumers", [2, 8])
def test_each_batch_goes_to_exactly_one_of_many_consumers(coordinator: iw.GlobalCoordinator, consumers: int) -> None:
    fetch = CertifiedFetch(lambda worker, call: 1 + call % 5 if call < 400 else None, end_of_data)
    source = register(coordinator, fetch, 8, num_workers=2, last_batch="keep")
    coordinator.start()

    def consume(_: int) -> list[tuple[int, ...]]:
        return [tuple(row) for batch in source for row in check_batch(batch).tolist()]

    with ThreadPoolExecutor(consumers) as pool:
        rows = [row for some in pool.map(consume, range(consumers)) for row in some]
    assert len(rows) == len(set(rows)) == sum(fetch.made.values())


def test_an_inline_source_that_is_stopped_from_another_thread_while_it_sends_keeps_its_ledger(
    coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    sending, go_on, waiting = threading.Event(), threading.Event(), threading.Event()
    join = InlineFetchers.join

    def announced_join(self: InlineFetchers, deadline: float) -> Any:
        waiting.set()
        return join(self, deadline)

    monkeypatch.setattr(InlineFetchers, "join", announced_join)

    class SlowFeed:
        chunk_alignment = 1

        def open(self, specs: Any, batch_size: int) -> None:
            pass

        def send(self, slot: Any) -> Any:
            sending.set()
            go_on.wait(HANG_SECONDS)
            return slot.arrays

        def receive(self, ticket: Any) -> Any:
            return ticket

        def close(self) -> None:
            pass

    source = register(coordinator, CertifiedFetch(lambda w, c: 12, end_of_data), 4, num_workers=0, feed=SlowFeed())
    coordinator.start()
    with ThreadPoolExecutor(2) as pool:
        read = pool.submit(source.next_batch)
        assert sending.wait(HANG_SECONDS)
        stop = pool.submit(coordinator.stop, 0.2)
        assert waiting.wait(HANG_SECONDS)
        go_on.set()
        stop.result(HANG_SECONDS)
        with pytest.raises(iw.QueueClosed):
            read.result(HANG_SECONDS)
    assert coordinator.stop(HANG_SECONDS)
    stats = source.stats()
    assert stats.rows_fetched == stats.rows_delivered + sum(stats.rows_dropped.values()), stats.ledger
