"""Delivery in the order of the requests, whoever fetches and however long each takes; a failure stands at its request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from gates import HANG_SECONDS, await_true, register
from hypothesis import given, settings
from hypothesis import strategies as st

import input_workers as iw


class Held:
    """A source whose requests each wait until the test lets them go, or raise what the test says."""

    def __init__(self, rows: int, row_nbytes: int = 8) -> None:
        self.rows = rows
        self._row_values = row_nbytes // 8
        self._changed = threading.Condition()
        self._free: set[int] = set()
        self._all_free = False
        self._errors: dict[int, BaseException] = {}
        self.waiting: set[int] = set()

    def __len__(self) -> int:
        return self.rows

    def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
        index = request.index
        with self._changed:
            self.waiting.add(index)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._all_free or index in self._free or index in self._errors, HANG_SECONDS)
            self.waiting.discard(index)
            error = self._errors.get(index)
        if error is not None:
            raise error
        return [rows.copy(), np.repeat(rows[:, None], self._row_values, axis=1)]

    def free(self, *indices: int) -> None:
        with self._changed:
            self._free |= set(indices)
            self._changed.notify_all()

    def free_all(self) -> None:
        with self._changed:
            self._all_free = True
            self._changed.notify_all()

    def fail(self, index: int, error: BaseException | None = None) -> None:
        with self._changed:
            self._errors[index] = error or ValueError(f"request {index}")
            self._changed.notify_all()

    def await_waiting(self, *indices: int) -> None:
        with self._changed:
            came = self._changed.wait_for(lambda: self.waiting >= set(indices), HANG_SECONDS)
        assert came, f"{sorted(self.waiting)} came, waited for {indices}"


@pytest.fixture
def held() -> Iterator[Callable[..., Held]]:
    """Make sources; let all their requests go in the end, whatever happened."""
    made: list[Held] = []

    def make(*arguments: int) -> Held:
        made.append(Held(*arguments))
        return made[-1]

    yield make
    for source in made:
        source.free_all()


def read(source: Any) -> list[int]:
    return [row for batch in source for row in batch.data[: batch.valid_rows].tolist()]


def read_until_failed(source: Any) -> tuple[list[int], iw.FetchFailed]:
    rows: list[int] = []
    with pytest.raises(iw.FetchFailed) as caught:  # noqa: PT012
        while True:
            rows += source.next_batch().data.tolist()
    return rows, caught.value


@settings(max_examples=40)
@given(st.data())
def test_whatever_the_bounds_and_the_order_of_finishing_rows_come_in_order(data: st.DataObject) -> None:
    workers = data.draw(st.sampled_from([0, 1, 2, 7, 64]), "workers")
    per_request = data.draw(st.sampled_from([1, 2, 5, 13]), "rows_per_request")
    requests = data.draw(st.integers(1, 12), "requests")
    order = data.draw(st.permutations(range(requests)), "who goes first, if he is there")
    epochs = data.draw(st.integers(1, 3), "epochs")
    epoch_end = data.draw(st.sampled_from(["run_on", "break"]), "epoch_end")
    rows = requests * per_request
    source = Held(rows)
    coordinator = iw.GlobalCoordinator()
    handle = register(
        coordinator, iw.Stream(source, epochs=epochs, rows_per_request=per_request, epoch_end=epoch_end), 3,
        num_workers=workers, ordered=True, last_batch="keep", max_buffered_batches=data.draw(st.integers(1, 3), "batches"),
        max_buffered_bytes=data.draw(st.sampled_from([None, 1, 100]), "bytes"), device_queue_depth=2,
    )  # fmt: skip
    if workers == 0:
        source.free_all()
    with coordinator:
        for index in order:
            if index in source.waiting:
                source.free(index)
        source.free_all()
        came = [read(handle) for _ in range(epochs if epoch_end == "break" else 1)]
        assert read(handle) == []
    assert came == ([[*range(rows)]] * epochs if epoch_end == "break" else [[*range(rows)] * epochs])
    assert handle.stats().rows_delivered == rows * epochs


@pytest.mark.parametrize("slow", [0, 3])
@pytest.mark.parametrize("bound", ["rows", "bytes"])
def test_a_slow_request_holds_back_what_the_bounds_allow_and_no_more(
    coordinator: iw.GlobalCoordinator, held: Callable[..., Held], bound: str, slow: int
) -> None:
    workers, row_nbytes = 4, 72  # of both inputs
    source = held(4000, row_nbytes - 8)
    more: dict[str, Any] = {"max_buffered_batches": 2} if bound == "rows" else {"max_buffered_bytes": 20 * row_nbytes}
    stream = iw.Stream(source, rows_per_request=5)
    handle = register(coordinator, stream, 10, num_workers=workers, ordered=True, **more)
    for index in range(800):
        if index != slow:
            source.free(index)
    coordinator.start()
    source.await_waiting(slow)
    most = slow * 5 + 20 + (workers + 1) * 5
    before = slow * 5 // 10
    assert [handle.next_batch().data.tolist() for _ in range(before)] == [[*range(10)]] * before
    await_true(lambda: handle.stats().rows_fetched >= slow * 5 + 20 + (workers - 1) * 5, "the bounds are full")
    waits = threading.Event()
    for _ in range(20):
        stats = handle.stats()
        assert stats.rows_fetched <= most
        assert stats.queue_depth * 10 <= 20 + 5
        assert stats.queue_bytes <= (20 + 5) * row_nbytes
        waits.wait(0.002)
    with pytest.raises(iw.WaitTimeout):
        handle.next_batch(0)
    source.free(slow)
    assert read(handle) == [*range(before * 10, 4000)]


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_a_trainer_that_does_not_read_is_not_run_ahead_of(coordinator: iw.GlobalCoordinator, workers: int) -> None:
    class Endless:
        def __len__(self) -> int:
            return 100

        def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
            if request.index > 200:
                far_ahead.set()
            return [rows.copy(), rows.copy()]

    far_ahead = threading.Event()
    stream = iw.Stream(Endless(), epochs=None, rows_per_request=2)
    source = register(coordinator, stream, 4, num_workers=workers, ordered=True, max_buffered_batches=3, device_queue_depth=2)
    coordinator.start()
    await_true(lambda: source.stats().fetcher_blocked_seconds > 0, "the queues are full")
    assert not far_ahead.wait(0.2)
    # The queue, what the enqueuer took before, a chunk at each fetcher's hand, the device queue and the batch in the making.
    assert source.stats().rows_fetched <= 3 * 4 + 2 * (workers + 1) + (2 + 2) * 4


@pytest.mark.parametrize("workers", [1, 3, 8])
@pytest.mark.parametrize("at", [0, 1, 4, 9])
def test_every_row_before_a_failure_is_delivered_and_none_after(
    coordinator: iw.GlobalCoordinator, held: Callable[..., Held], at: int, workers: int
) -> None:
    source = held(10 * 4)
    source.free(*range(10))
    source.fail(at)
    handle = register(coordinator, iw.Stream(source, rows_per_request=4), 4, num_workers=workers, ordered=True)
    coordinator.start()
    rows, error = read_until_failed(handle)
    assert rows == [*range(4 * at)]
    assert f"request {at}: ValueError: request {at}" in str(error)
    assert f"request: {at} (epoch 0)" in error.__notes__
    for _ in range(2):
        with pytest.raises(iw.FetchFailed):
            handle.next_batch()
    stats = handle.stats()
    assert stats.fetch_errors == {"ValueError": 1}
    assert stats.rows_dropped["stopped"] == stats.rows_fetched - stats.rows_delivered


def test_a_failure_waits_for_the_requests_before_it_while_later_ones_are_done(
    coordinator: iw.GlobalCoordinator, held: Callable[..., Held]
) -> None:
    source = held(40)
    handle = register(coordinator, iw.Stream(source, rows_per_request=4), 4, num_workers=5, ordered=True)
    coordinator.start()
    source.await_waiting(0, 1, 2, 3, 4)
    source.free(3, 4)
    await_true(lambda: handle.stats().rows_fetched >= 8, "two later ones are done")
    source.fail(2)
    await_true(lambda: handle.stats().fetch_errors == {"ValueError": 1}, "the failure is there")
    with pytest.raises(iw.WaitTimeout):
        handle.next_batch(0)
    source.free(0)
    assert handle.next_batch().data.tolist() == [0, 1, 2, 3]
    with pytest.raises(iw.WaitTimeout):
        handle.next_batch(0)
    source.free(1)
    rows, error = read_until_failed(handle)
    assert rows == [4, 5, 6, 7]
    assert str(error).endswith("request 2: ValueError: request 2")


def test_of_two_failures_the_earlier_request_wins_even_if_it_fails_later(
    coordinator: iw.GlobalCoordinator, held: Callable[..., Held]
) -> None:
    source = held(40)
    handle = register(coordinator, iw.Stream(source, rows_per_request=4), 4, num_workers=5, ordered=True)
    coordinator.start()
    source.await_waiting(0, 1, 2, 3, 4)
    for count, index in enumerate((3, 1, 4), 1):
        source.fail(index)
        await_true(lambda count=count: handle.stats().fetch_errors == {"ValueError": count}, "it has failed")  # type: ignore[misc]
    source.free(0, 2)
    rows, error = read_until_failed(handle)
    assert rows == [0, 1, 2, 3]
    assert "request 1: " in str(error)
    assert coordinator.stop()
    with pytest.raises(iw.QueueClosed) as closed:
        handle.next_batch()
    final = closed.value.__cause__
    assert str(final) == str(error)
    later = [note for note in getattr(final, "__notes__", []) if note.startswith("later: ")]
    assert [f"request {index}:" in note for index, note in zip((3, 4), later, strict=True)] == [True, True], later


def test_a_failure_sends_away_who_waits_at_the_door(coordinator: iw.GlobalCoordinator, held: Callable[..., Held]) -> None:
    source = held(400)
    handle = register(
        coordinator, iw.Stream(source, rows_per_request=4), 4, num_workers=6, ordered=True, max_buffered_batches=1
    )
    coordinator.start()
    source.await_waiting(0, 1, 2, 3, 4, 5)
    source.free(*range(2, 90))
    await_true(lambda: handle.stats().rows_fetched >= 4 * 4, "one is parked, three are at the door")
    source.fail(1)
    await_true(lambda: handle.stats().fetchers_alive <= 2, "those at the door went away")
    source.free(0)
    rows, error = read_until_failed(handle)
    assert rows == [0, 1, 2, 3]
    assert "request 1: " in str(error)


@pytest.mark.parametrize("state", ["waiting for its turn", "failed and not reached", "at the door"])
def test_a_stop_ends_everything_and_accounts_for_it(
    coordinator: iw.GlobalCoordinator, held: Callable[..., Held], state: str
) -> None:
    source = held(400)
    handle = register(
        coordinator, iw.Stream(source, rows_per_request=4), 4, num_workers=4, ordered=True, max_buffered_batches=2
    )
    coordinator.start()
    source.await_waiting(0, 1, 2, 3)
    if state == "failed and not reached":
        source.free(2)
        source.fail(3)
        await_true(lambda: handle.stats().fetch_errors == {"ValueError": 1}, "it has failed")
    else:
        source.free(*range(1, 3 if state == "waiting for its turn" else 90))
        await_true(lambda: handle.stats().rows_fetched >= (8 if state == "waiting for its turn" else 16), "later ones are done")
    assert coordinator.stop(0.05) is False, "request 0 is still being fetched"
    with pytest.raises(iw.QueueClosed) as closed:
        handle.next_batch()
    source.free_all()
    assert coordinator.stop(HANG_SECONDS)
    failures = coordinator.last_stop.failures
    if state == "failed and not reached":
        assert isinstance(closed.value.__cause__, iw.FetchFailed), "a failure is never hidden by a stop"
        assert "request 3" in failures["train"]
    else:
        assert failures == {}
    stats = handle.stats()
    assert stats.rows_in_flight == 0
    assert stats.rows_fetched == stats.rows_dropped["stopped"]
    assert stats.rows_delivered == 0
    # And it goes on from the beginning.
    source._errors.clear()
    with coordinator:
        assert handle.next_batch().data.tolist() == [0, 1, 2, 3]


def test_num_workers_0_delivers_what_comes_before_a_failure(
    coordinator: iw.GlobalCoordinator, held: Callable[..., Held]
) -> None:
    source = held(40)
    source.free(*range(10))
    source.fail(3)
    handle = register(coordinator, iw.Stream(source, rows_per_request=4), 3, num_workers=0, ordered=True)
    coordinator.start()
    rows, _ = read_until_failed(handle)
    assert rows == [*range(12)]


@pytest.mark.parametrize("epoch_end", ["run_on", "break"])
def test_a_failure_in_a_later_epoch_leaves_the_epochs_before_it_whole(
    coordinator: iw.GlobalCoordinator, held: Callable[..., Held], epoch_end: str
) -> None:
    source = held(12)
    source.free(*range(9))
    source.fail(7)  # the second of the third epoch
    stream = iw.Stream(source, epochs=3, rows_per_request=4, epoch_end=epoch_end)
    handle = register(coordinator, stream, 4, num_workers=3, ordered=True, last_batch="keep")
    coordinator.start()
    if epoch_end == "break":
        assert [read(handle) for _ in range(2)] == [[*range(12)]] * 2
        assert read_until_failed(handle)[0] == [*range(4)]
    else:
        assert read_until_failed(handle)[0] == [*range(12), *range(12), *range(4)]


def test_a_call_that_hangs_stands_at_its_request(coordinator: iw.GlobalCoordinator, held: Callable[..., Held]) -> None:
    source = held(40)
    source.free(0, 1, *range(3, 10))
    stream = iw.Stream(source, rows_per_request=4)
    handle = register(coordinator, stream, 4, num_workers=3, ordered=True, fetch_timeout_s=0.1)
    coordinator.start()
    rows = []
    with pytest.raises(iw.FetchTimeout, match="request 2: a call has run"):  # noqa: PT012
        while True:
            rows += handle.next_batch().data.tolist()
    assert rows == [*range(8)]
    source.free_all()
