"""What is changed between registering and running: states and resets in init functions, stops while starting, resets."""

from __future__ import annotations

import os
import pathlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gates import HANG_SECONDS, Gate, await_true, register
from self_certifying import CertifiedFetch

import input_workers as iw


def end_of_data() -> Any:
    raise iw.EndOfData


def stream_of(rows: int = 40, **more: Any) -> iw.Stream:
    return iw.Stream(iw.sources.Arrays(np.arange(rows)), **more)


def saved_after(batches: int) -> dict[str, Any]:
    coordinator = iw.GlobalCoordinator()
    source = register(coordinator, stream_of(), ordered=True, input_names=["data"])
    with coordinator:
        for _ in range(batches):
            source.next_batch()
        return coordinator.state_dict()


def test_a_state_loaded_in_an_init_function_is_used(coordinator: iw.GlobalCoordinator) -> None:
    state = saved_after(5)
    loads = lambda source, _: source.load_state_dict(state["sources"]["train"])  # noqa: E731
    source = register(coordinator, stream_of(), ordered=True, input_names=["data"], init_fun=loads)
    coordinator.start()
    assert source.next_batch().data.tolist() == [20, 21, 22, 23]
    assert source.state_dict()["done"] == {"0": [[0, 24]]}


def test_the_coordinators_state_loaded_in_an_init_function_is_used(coordinator: iw.GlobalCoordinator) -> None:
    state = saved_after(2)
    loads = lambda _, whole: whole.load_state_dict(state)  # noqa: E731
    source = register(coordinator, stream_of(), ordered=True, input_names=["data"], init_fun=loads)
    coordinator.start()
    assert source.next_batch().data.tolist() == [8, 9, 10, 11]


def test_a_reset_in_an_init_function_counts(coordinator: iw.GlobalCoordinator) -> None:
    resets = lambda _, whole: whole.reset_data_input("", "train", "numpy", 10)  # noqa: E731
    source = register(coordinator, stream_of(), ordered=True, input_names=["data"], init_fun=resets)
    coordinator.start()
    assert len(source.next_batch().data) == 10
    assert source.device().batch_specs().data[0] == (10,)


def test_a_state_that_was_loaded_stays_when_the_start_fails(coordinator: iw.GlobalCoordinator) -> None:
    attempts = []

    def fails_once(source: Any, whole: Any) -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise OSError("no network yet")

    source = register(coordinator, stream_of(), ordered=True, input_names=["data"], init_fun=fails_once)
    coordinator.load_state_dict(saved_after(3))
    with pytest.raises(OSError, match="no network"):
        coordinator.start()
    coordinator.start()
    assert source.next_batch().data.tolist() == [12, 13, 14, 15]


def test_a_source_stopped_by_its_own_init_function_has_a_right_ledger(coordinator: iw.GlobalCoordinator) -> None:
    fetch = CertifiedFetch(lambda worker, call: 3, end_of_data)
    source = register(coordinator, fetch, num_workers=2, init_fun=lambda handle, _: handle.stop())
    coordinator.start()
    for _ in range(20):
        source.next_batch()
    stats = source.stats()
    assert stats.rows_fetched >= stats.rows_delivered >= 80
    assert coordinator.stop()
    assert coordinator.last_stop is not None
    assert coordinator.last_stop.failures == {}


def test_a_source_stopped_by_another_thread_while_all_start_has_a_right_ledger() -> None:
    for _ in range(60):
        coordinator = iw.GlobalCoordinator()
        sources = [
            register(coordinator, CertifiedFetch(lambda worker, call: 3, end_of_data), name=f"s{number}", num_workers=2)
            for number in range(4)
        ]
        go = threading.Barrier(2)

        def stop(source: Any = sources[1], go: threading.Barrier = go) -> None:
            go.wait(HANG_SECONDS)
            source.stop()

        thread = threading.Thread(target=stop)
        thread.start()
        go.wait(HANG_SECONDS)
        coordinator.start()
        thread.join(HANG_SECONDS)
        assert coordinator.stop(HANG_SECONDS)
        assert coordinator.last_stop is not None
        assert coordinator.last_stop.failures == {}
        assert all(stats.rows_in_flight == 0 for stats in coordinator.stats().values())


def resident_mb() -> int:
    text = pathlib.Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS")) // 1024


def test_the_memory_of_earlier_batch_sizes_is_given_back(coordinator: iw.GlobalCoordinator) -> None:
    fetch = lambda worker_id, batch_size: [np.ones((7, 125_000)), np.ones(7)]  # noqa: E731
    source = register(coordinator, fetch, max_buffered_batches=2)
    coordinator.start()
    for _ in range(10):
        source.next_batch()
    before = resident_mb()
    for turn in range(60):  # each of them would leave some 10 MB behind
        size = 4 + turn % 2
        coordinator.reset_data_input("", "train", "numpy", size)
        while len(source.next_batch().data) != size:
            pass
    assert resident_mb() - before < 200
    device = source._core.run.devices["train"]
    assert len(device._opened) <= 3, "targets whose last batch was received are closed"


def test_a_reset_that_fails_changes_nothing(coordinator: iw.GlobalCoordinator) -> None:
    source = register(coordinator, CertifiedFetch(lambda worker, call: 7, end_of_data))
    coordinator.start()

    class NoFeed:
        def __getattr__(self, name: str) -> Any:
            raise iw.ConfigError("this device does not exist")

    with pytest.raises(iw.ConfigError):
        coordinator.reset_data_input("", "train", "torch:cuda:99", 8)
    assert [len(source.next_batch().data) for _ in range(40)] == [4] * 40
    assert source.device().batch_specs().data[0][0] == 4
    coordinator.stop()
    coordinator.start()
    assert len(source.next_batch().data) == 4


@pytest.fixture
def slow_framework(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[threading.Event, threading.Event]]:
    """A framework that is being imported until the second event is set; the first says that it is."""
    begun, go_on = threading.Event(), threading.Event()
    from input_workers.coordinator import settings

    def maker(feed: Any, batch_size: int, axes: Any = (0,)) -> Any:
        def make() -> Any:
            begun.set()
            go_on.wait(HANG_SECONDS)
            raise iw.ConfigError("it cannot be imported")

        return make if feed == "torch:cpu" else real(feed, batch_size, axes)

    real = settings.feed_maker
    monkeypatch.setattr(settings, "feed_maker", maker)
    yield begun, go_on
    go_on.set()


def test_a_stop_does_not_wait_for_a_reset_that_imports_a_framework(
    coordinator: iw.GlobalCoordinator, slow_framework: tuple[threading.Event, threading.Event]
) -> None:
    begun, go_on = slow_framework
    source = register(coordinator, CertifiedFetch(lambda worker, call: 4, end_of_data))
    coordinator.start()
    source.next_batch()
    failures: list[BaseException] = []

    def reset() -> None:
        try:
            coordinator.reset_data_input("", "train", "torch:cpu", 4)
        except iw.ConfigError as error:
            failures.append(error)

    thread = threading.Thread(target=reset)
    thread.start()
    assert begun.wait(HANG_SECONDS)
    assert coordinator.stop(5.0), "while the framework is still being imported"
    go_on.set()
    thread.join(HANG_SECONDS)
    assert len(failures) == 1


def test_a_chunk_that_memory_cannot_hold_is_accounted_for(coordinator: iw.GlobalCoordinator) -> None:
    chunk = np.broadcast_to(np.float32(1), (10, 1 << 46))  # 2.5 PiB when copied
    source = register(coordinator, lambda worker_id, batch_size: [chunk[:]], input_names=["data"])
    coordinator.start()
    with pytest.raises(iw.SourceFailed, match="there is no memory for a slot of 4 rows"):
        source.next_batch()
    coordinator.stop()
    stats = source.stats()
    assert (stats.rows_fetched, stats.rows_dropped["stopped"], stats.rows_in_flight) == (10, 10, 0)


class PanicException(BaseException):
    """As native code written in Rust raises it."""


def test_a_feed_that_raises_no_ordinary_exception_loses_no_row_from_the_ledger(coordinator: iw.GlobalCoordinator) -> None:
    class Panics:
        chunk_alignment = None
        sent = 0

        def open(self, specs: Any, batch_size: int) -> None:
            pass

        def send(self, slot: Any) -> Any:
            self.sent += 1
            if self.sent == 3:
                raise PanicException("unwrap on None")
            return [array.copy() for array in slot.arrays]

        def receive(self, ticket: Any) -> Any:
            return ticket

        def close(self) -> None:
            pass

    source = register(coordinator, CertifiedFetch(lambda worker, call: 6, end_of_data), feed=Panics())
    coordinator.start()
    with pytest.raises(iw.FeedFailed, match="a batch of 4 rows") as caught:  # noqa: PT012
        while True:
            source.next_batch()
    assert isinstance(caught.value.__cause__, PanicException)
    coordinator.stop()
    stats = source.stats()
    assert stats.rows_dropped["device_error"] == 4
    assert stats.rows_in_flight == 0


def test_a_coordinator_is_true_without_a_source() -> None:
    coordinator = iw.GlobalCoordinator()
    assert (coordinator or iw.GlobalCoordinator()) is coordinator
    assert len(coordinator) == 0


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"fetch_timeout_s": 1.0}, "fetch_timeout_s"),
        ({"fetchers": iw.Processes(worker_init_fun=print)}, "worker_init_fun"),
        ({"fetchers": iw.Threads(keep_freed_memory=True)}, "keep_freed_memory"),
    ],
)
def test_without_workers_an_option_that_cannot_be_kept_is_refused(more: dict[str, Any], name: str) -> None:
    with pytest.raises(iw.ConfigError, match=f"{name} cannot be kept with num_workers=0"):
        register(iw.GlobalCoordinator(), Gate(), num_workers=0, **more)
    register(iw.GlobalCoordinator(), Gate(), num_workers=0, fetchers="process")


def test_without_workers_a_timeout_says_how_long_it_was(coordinator: iw.GlobalCoordinator) -> None:
    source = register(coordinator, lambda worker_id, batch_size: None, num_workers=0)
    coordinator.start()
    with pytest.raises(iw.WaitTimeout, match=r"no batch within 0\.05 s"):
        source.next_batch(0.05)


def test_a_device_that_has_had_the_end_of_an_epoch_is_not_given_another_on_resume() -> None:
    def make() -> iw.GlobalCoordinator:
        coordinator = iw.GlobalCoordinator()
        stream = stream_of(8, epochs=2, epoch_end="break", rows_per_request=2)
        for scope in ("d0", "d1"):
            register(coordinator, stream, 2, name_scope=scope, ordered=True, input_names=["data"])
        return coordinator

    def rest(coordinator: iw.GlobalCoordinator) -> list[Any]:
        order = ("d0/train", "d1/train", "d1/train")
        return [[batch.data.tolist() for batch in coordinator[name]] for name in order]

    coordinator = make()
    with coordinator:
        assert [batch.data.tolist() for batch in coordinator["d0/train"]] == [[0, 1], [4, 5]]
        for _ in range(2):
            coordinator["d1/train"].next_batch()
        state = coordinator.state_dict()
        expected = rest(coordinator)
    coordinator = make()
    coordinator.load_state_dict(state)
    with coordinator:
        assert rest(coordinator) == expected


def test_a_forked_child_stops_what_it_has_started_itself(coordinator: iw.GlobalCoordinator) -> None:
    parent = register(coordinator, CertifiedFetch(lambda worker, call: 4, end_of_data), name="parent", num_workers=2)
    coordinator.start()
    parent.next_batch()
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(20)
            own = register(coordinator, CertifiedFetch(lambda worker, call: 4, end_of_data), name="child", num_workers=2)
            coordinator.start()
            own.next_batch()
            stopped = coordinator.stop(5.0)
            left = threading.active_count() - 1
            try:
                own.next_batch()
            except iw.QueueClosed:
                code = 0 if stopped and not left else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    await_true(lambda: parent.next_batch().valid_rows == 4, "the parent goes on")
