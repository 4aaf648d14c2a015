"""Batches that are being filled: what is laid out, and which rows go where, one known step after the other."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from flow.assembly_driver import ROW_NBYTES, CopyGate, Driver, Placing, pack, place, rows_of, spin_until, started
from self_certifying import Witness, make_chunk

from input_workers.feeds.numpy_feed import NumpyFeed
from input_workers.flow import window
from input_workers.flow.batches import OpenBatch, Unplaced
from input_workers.flow.device import Device, Target
from input_workers.metrics.fetcher_recorder import FetcherRecorder


def failing(key: Any, value: Any) -> None:
    raise MemoryError("no memory for the copy")


# ---- layout


def test_batches_are_laid_out_ahead_and_no_more_than_the_bound_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "REFILL_SECONDS", 0.0)
    driver = Driver(max_batches=5)
    assert driver.lay_out() == 3
    place(driver, 0, 4)
    assert driver.lay_out() == 1, "one full, three empty"
    place(driver, 0, 9, call=1)
    assert driver.lay_out() == 1, "five in all"
    assert not driver.assembly.wants_batch(4, 4 * ROW_NBYTES)
    driver.take()
    assert driver.lay_out() == 1
    assert driver.assembly.charged == (9, 9 * ROW_NBYTES)


def test_a_window_that_was_full_is_refilled_when_it_is_a_quarter_full_or_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(window.time, "monotonic", lambda: now[0])
    driver = Driver(max_batches=4)
    driver.lay_out()
    place(driver, 0, 8)
    driver.lay_out()
    place(driver, 0, 8, call=1)
    assert driver.lay_out() == 0, "full"
    driver.take()
    assert driver.lay_out() == 0, "three of four are full"
    now[0] += window.REFILL_SECONDS
    assert driver.lay_out() == 1
    place(driver, 0, 4, call=2)
    assert driver.lay_out() == 0
    for left in (3, 2):
        driver.take()
        assert driver.lay_out() == 0, f"{left} of four are full"
    driver.take()
    assert driver.lay_out() == 3


def test_batches_that_get_their_memory_later_are_laid_out_as_far_as_the_bound_allows() -> None:
    driver = Driver(max_batches=9)
    laid_out = 0
    while driver.assembly.wants_batch(4, 4 * ROW_NBYTES, has_memory=False):
        laid_out += driver.assembly.lay_out(OpenBatch((), 4, None, driver.target, 4 * ROW_NBYTES), 0)
    assert laid_out == 9


@pytest.mark.parametrize(("max_batches", "laid_out"), [(0.5, 1), (1, 1), (1.75, 1), (2, 2), (2.5, 2), (3, 3), (9, 3)])
def test_the_bound_on_rows_counts_whole_batches_and_one_always_passes(max_batches: float, laid_out: int) -> None:
    assert Driver(max_batches=max_batches).lay_out() == laid_out


@pytest.mark.parametrize(("nbytes", "laid_out"), [(1, 1), (8 * ROW_NBYTES - 1, 1), (8 * ROW_NBYTES, 2), (10**9, 3)])
def test_the_bound_on_bytes_too(nbytes: int, laid_out: int) -> None:
    assert Driver(max_nbytes=nbytes).lay_out() == laid_out


def test_the_bound_may_be_changed_at_any_time() -> None:
    driver = Driver(max_batches=1)
    assert driver.lay_out() == 1
    driver.assembly.set_max_rows(8)
    assert driver.lay_out() == 1


def test_nothing_is_laid_out_after_the_close_or_where_chunks_are_batches() -> None:
    whole = Driver(rebatch=False)
    assert whole.lay_out() == 0
    driver = Driver()
    driver.assembly.close()
    assert driver.lay_out() == 0
    assert not driver.assembly.lay_out(driver.make_batch(), driver.assembly.epoch_ends)


def test_empty_batches_can_be_taken_back_and_laid_out_anew() -> None:
    driver = Driver()
    driver.lay_out()
    place(driver, 0, 2)
    assert driver.assembly.discard_empty() == 2
    assert [batch.filled for batch in driver.assembly.take_discarded()] == [0, 0]
    assert driver.assembly.discard_empty() == 0
    assert driver.assembly.take_discarded() == []
    driver.batch_size = 3
    driver.lay_out()
    place(driver, 0, 5, call=1)
    while driver.take():
        pass
    assert [batch.rows for batch in driver.batches] == [4, 3]


def test_a_batch_that_was_taken_back_gets_no_rows() -> None:
    driver = Driver()
    driver.lay_out()
    driver.assembly.discard_empty()
    discarded = driver.assembly.take_discarded()
    waiting = Placing(driver, 0, 4)
    waiting.await_blocked()
    assert driver.assembly.has_waiters
    assert driver.lay_out() == 3
    assert waiting.await_end() is None
    assert not driver.assembly.has_waiters
    assert all(batch.filled == batch.copied == 0 for batch in discarded)


def shrinkable(axes: tuple[int, int] = (0, 0), filled: int = 3) -> tuple[Driver, Device, OpenBatch]:
    driver = Driver(8, axes=axes)
    device = Device("train", 0, None, driver.target, list, lambda failure, rows: None)  # type: ignore[arg-type]
    batch = driver.make_batch()
    batch.device = device
    assert driver.assembly.lay_out(batch, 0)
    place(driver, 0, filled)
    return driver, device, batch


@pytest.mark.parametrize(("filled", "batch_size"), [(3, 3), (3, 4), (3, 7)])
def test_the_batch_that_is_being_filled_can_be_made_smaller(filled: int, batch_size: int) -> None:
    driver, device, batch = shrinkable(filled=filled)
    target = Target(NumpyFeed(), batch_size, (0, 0), 0)
    assert driver.assembly.shrink(target, device)
    assert (batch.rows, batch.target) == (batch_size, target)
    assert driver.assembly.charged[0] == filled
    if batch_size > filled:
        assert driver.take() is None
        place(driver, 0, batch_size - filled, call=1)
    assert driver.take() is batch
    assert len(rows_of(driver)) == batch_size


@pytest.mark.parametrize(("filled", "batch_size"), [(3, 2), (3, 8), (3, 9)])
def test_it_is_not_made_smaller_than_its_rows_or_larger(filled: int, batch_size: int) -> None:
    driver, device, batch = shrinkable(filled=filled)
    assert not driver.assembly.shrink(Target(NumpyFeed(), batch_size, (0, 0), 0), device)
    assert batch.rows == 8


def test_neither_is_a_batch_for_another_device_or_with_rows_along_another_axis() -> None:
    driver, device, _ = shrinkable()
    other = Device("test", 1, None, driver.target, list, lambda failure, rows: None)  # type: ignore[arg-type]
    assert not driver.assembly.shrink(Target(NumpyFeed(), 4, (0, 0), 0), other)
    driver, device, _ = shrinkable(axes=(0, 1))
    assert not driver.assembly.shrink(Target(NumpyFeed(), 4, (0, 1), 0), device)


def test_packed_rows_are_in_a_batch_that_was_made_smaller_and_is_full_by_that() -> None:
    driver = Driver(8)
    device = Device("train", 0, None, driver.target, list, lambda failure, rows: None)  # type: ignore[arg-type]
    batch = driver.make_batch()
    batch.device = device
    assert driver.assembly.lay_out(batch, 0)
    assert pack(driver, 0, 4)
    assert driver.assembly.shrink(Target(NumpyFeed(), 4, (0, 0), 0), device)
    driver.batch_size = 4
    driver.lay_out()
    assert driver.take() is batch, "it is full, but its rows were not copied"
    assert pack(driver, 0, 4, call=1)
    driver.take()
    assert rows_of(driver) == [(0, row) for row in range(4)] * 2


# ---- rows


@pytest.mark.parametrize("axes", [(0, 0), (0, 1), (1, 1)])
def test_chunks_of_any_length_fill_batches_in_their_order(axes: tuple[int, int]) -> None:
    driver, witness = Driver(axes=axes), Witness(axes=axes)

    def fetch() -> None:
        for call, rows in enumerate([1, 3, 4, 5, 2, 9, 1, 7]):
            assert place(driver, 0, rows, call) is None
        driver.assembly.close()

    driver.run([started(fetch)])
    for batch in driver.taken:
        witness.see(batch, 4)
    assert witness.rows == 32
    witness.assert_complete()


def test_the_last_batch_is_short_and_comes_after_the_close() -> None:
    driver = Driver()
    driver.lay_out()
    place(driver, 0, 6)
    assert driver.take() is not None
    assert driver.take() is None
    assert not driver.assembly.drained
    driver.assembly.close()
    assert not driver.assembly.drained
    last = driver.take()
    assert isinstance(last, OpenBatch)
    assert (last.rows, last.filled, last.is_closed) == (4, 2, True)
    assert driver.assembly.drained
    assert len(rows_of(driver)) == 6


def test_a_batch_is_taken_only_when_all_its_rows_are_copied_and_later_rows_may_be_copied_earlier() -> None:
    gate = CopyGate(0)
    driver = Driver(on_copy=gate)
    driver.lay_out()
    slow = Placing(driver, 0, 3)
    assert gate.await_arrival() == 0
    assert place(driver, 1, 5) is None  # the last row of the first batch, and all of the second
    assert driver.assembly.charged[0] == 8
    assert driver.take() is None, "three of its rows are still being copied"
    driver.assembly.watch()
    assert driver.wake.empty()
    gate.let_through(0)
    assert slow.await_end() is None
    assert driver.wake.get(timeout=1) is None
    assert driver.take() is not None
    assert driver.take() is not None
    assert rows_of(driver) == [(0, 0), (0, 1), (0, 2), *((1, row) for row in range(5))]


def test_a_closed_batch_too_is_taken_only_when_its_rows_are_copied() -> None:
    gate = CopyGate(0)
    driver = Driver(on_copy=gate)
    driver.lay_out()
    slow = Placing(driver, 0, 3)
    gate.await_arrival()
    driver.assembly.close()
    assert driver.take() is None
    assert not driver.assembly.drained
    gate.let_through(0)
    assert slow.await_end() is None
    driver.run()
    assert rows_of(driver) == [(0, 0), (0, 1), (0, 2)]


def test_a_copy_that_fails_breaks_its_batch_and_those_before_it_are_delivered() -> None:
    driver = Driver()
    driver.lay_out()
    place(driver, 0, 6)
    driver.on_copy = failing
    broken = driver.make_batch()
    driver.assembly.discard_empty()
    driver.assembly.lay_out(broken, 0)
    driver.on_copy = None
    driver.lay_out()
    driver.assembly.watch()
    answer = place(driver, 1, 5)
    assert isinstance(answer, Unplaced)
    assert isinstance(answer.error, MemoryError)
    assert answer.rows == 0, "all were reserved"
    assert driver.wake.get(timeout=1) is None
    assert driver.take() is not None
    assert driver.take() is not None
    assert driver.take() is None
    assert not driver.assembly.drained
    driver.assembly.close()
    assert driver.assembly.drained
    assert driver.rows_taken + driver.assembly.abort() == 11
    assert rows_of(driver) == [*((0, row) for row in range(6)), (1, 0), (1, 1)]


def test_of_a_chunk_that_waited_when_its_copy_failed_the_rest_is_not_placed_and_nobody_waits_for_it() -> None:
    gate = threading.Event()

    def fail_then(key: Any, value: Any) -> None:
        assert gate.wait(10)
        raise MemoryError

    driver = Driver(max_batches=1, on_copy=fail_then)
    driver.lay_out()
    first = Placing(driver, 0, 10)
    spin_until(lambda: driver.assembly.has_waiters)
    second = Placing(driver, 1, 2)
    second.await_blocked()
    gate.set()
    answer = first.await_end()
    assert answer is not None
    assert (answer.rows, type(answer.error)) == (6, MemoryError)
    driver.assembly.close()
    assert second.await_end() == Unplaced(2)
    assert driver.assembly.abort() == 4
    assert not driver.assembly.has_waiters


# ---- what the fetchers are told


def test_where_chunks_are_batches_each_is_kept_and_bounds_count_chunks() -> None:
    driver = Driver(rebatch=False, max_rows=2)
    recorder = FetcherRecorder(0)
    mine, other = make_chunk(0, 0, 3), make_chunk(0, 1, 7)
    assert driver.assembly.may_keep(3, None)
    assert driver.assembly.place(mine, 3, 3 * ROW_NBYTES, None, (True, True), recorder) is None
    assert driver.assembly.place(other, 7, 7 * ROW_NBYTES, None, (False, True), recorder) is None
    assert driver.assembly.charged == (2, 10 * ROW_NBYTES)
    third = Placing(driver, 0, 1, call=2)
    third.await_blocked()
    first, second = driver.take(), driver.take()
    assert isinstance(first, OpenBatch)
    assert isinstance(second, OpenBatch)
    assert all(array is kept for array, kept in zip(first.arrays, mine, strict=True))
    assert not np.shares_memory(second.arrays[0], other[0])
    assert second.arrays[1] is other[1]
    assert third.await_end() is None
    third.chunk[0][:] = 0
    driver.take()
    assert len(rows_of(driver)) == 11
    assert driver.assembly.abort() == 0


def test_a_chunk_that_is_larger_than_the_bound_on_bytes_passes_alone() -> None:
    driver = Driver(rebatch=False, max_rows=9, max_nbytes=5 * ROW_NBYTES)
    assert place(driver, 0, 50) is None
    second = Placing(driver, 0, 1, call=1)
    second.await_blocked()
    driver.take()
    assert second.await_end() is None
    assert driver.assembly.abort() == 1
