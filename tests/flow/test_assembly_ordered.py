"""Rows in the order of their requests, and epochs kept apart, whatever order the fetchers come in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flow.assembly_driver import ROW_NBYTES, CopyGate, Driver, Placing, close_after, keep_aside, make_request
from self_certifying import WORKER, check_batch

from input_workers.errors import Failure, FetchFailed
from input_workers.flow.batches import Unplaced
from input_workers.flow.turns import Turns
from input_workers.metrics.fetcher_recorder import FetcherRecorder


def ordered(batch_size: int = 4, requests_in: Callable[[int], float] | None = None, **more: Any) -> Driver:
    return Driver(batch_size, turns=Turns(True, requests_in, 0), **more)  # type: ignore[arg-type]


def place(driver: Driver, ordinal: int, rows: int, epoch: int = 0, **more: Any) -> Placing:
    """Begin to place the chunk of a request; its worker is the request's ordinal."""
    return Placing(driver, ordinal, rows, request=make_request(ordinal, rows, epoch), **more)


def parked(driver: Driver, ordinal: int, rows: int) -> None:
    """Place a chunk before its turn, which need not wait: it is kept."""
    assert place(driver, ordinal, rows).await_end() is None


def ordinals(driver: Driver) -> list[int]:
    return [int(row[WORKER]) for batch in driver.taken for row in check_batch(batch)]


def failure(number: int) -> Failure:
    return Failure(FetchFailed, f"request {number}")


RECORDER = FetcherRecorder(0)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2), (2, 3, 0, 1)])
@pytest.mark.parametrize("rows", [(4, 4, 4, 4), (1, 2, 3, 4), (9, 1, 1, 1), (1, 1, 1, 9)])
def test_rows_lie_in_the_order_of_their_requests(order: tuple[int, ...], rows: tuple[int, ...]) -> None:
    driver = ordered(max_batches=5)
    placings = [place(driver, ordinal, rows[ordinal]) for ordinal in order]
    close_after(driver, placings)
    driver.run([each.thread for each in placings])
    assert [each.await_end() for each in placings] == [None] * 4
    assert ordinals(driver) == [ordinal for ordinal in range(4) for _ in range(rows[ordinal])]


def test_a_chunk_that_comes_early_is_kept_and_copied_by_the_one_whose_turn_it_is() -> None:
    driver = ordered()
    driver.lay_out()
    early = place(driver, 1, 3)
    assert early.await_end() is None
    for array in early.chunk:
        array[:] = -5  # the fetch function uses its buffer again
    assert driver.assembly.charged == (3, 3 * ROW_NBYTES)
    assert place(driver, 0, 1).await_end() is None
    driver.take()
    assert ordinals(driver) == [0, 1, 1, 1]


def test_a_chunk_of_our_own_is_kept_without_a_copy() -> None:
    copied: list[int] = []

    def counted(arrays: Any, rows: int) -> list[np.ndarray]:
        copied.append(rows)
        return keep_aside(arrays, rows)

    driver = ordered(keep_aside=counted)
    driver.lay_out()
    assert driver.assembly.may_keep(3, make_request(1, 3))
    assert not driver.assembly.may_keep(3, make_request(0, 3))
    assert place(driver, 1, 4, ours=(True, True)).await_end() is None
    assert not copied
    assert place(driver, 2, 4, ours=(False, True)).await_end() is None
    assert copied == [4]
    place(driver, 0, 4).await_end()
    while driver.take():
        pass
    assert ordinals(driver) == [0] * 4 + [1] * 4 + [2] * 4


def test_a_chunk_that_comes_early_and_does_not_fit_within_the_bound_waits() -> None:
    driver = ordered(max_batches=2)
    driver.lay_out()
    parked(driver, 1, 8)
    waiting = place(driver, 2, 1)
    waiting.await_blocked()
    assert driver.assembly.charged[0] == 8
    first = place(driver, 0, 2)  # chunks that are kept never hold up the one they wait for
    close_after(driver, [first, waiting])
    driver.run([first.thread, waiting.thread])
    assert (first.await_end(), waiting.await_end()) == (None, None)
    assert ordinals(driver) == [0] * 2 + [1] * 8 + [2]


@pytest.mark.parametrize("nbytes", [5, 6])
def test_the_bound_on_bytes_holds_for_kept_chunks(nbytes: int) -> None:
    driver = ordered(max_nbytes=nbytes * ROW_NBYTES)
    driver.lay_out()
    parked(driver, 1, 5)
    second = place(driver, 2, 1)
    if nbytes == 6:
        assert second.await_end() is None
    else:
        second.await_blocked()
    assert driver.assembly.abort() == nbytes
    assert second.await_end() == (None if nbytes == 6 else Unplaced(1))


def test_the_turn_is_not_lost_while_an_early_chunk_is_being_copied_aside() -> None:
    gate = CopyGate(1)

    def held(arrays: Any, rows: int) -> list[np.ndarray]:
        gate(None, arrays[0])
        return keep_aside(arrays, rows)

    driver = ordered(keep_aside=held)
    driver.lay_out()
    early = place(driver, 1, 4)
    gate.await_arrival()
    assert driver.assembly.charged[0] == 4, "its room is taken already"
    assert place(driver, 0, 4).await_end() is None
    gate.let_through(1)
    assert early.await_end() is None
    assert driver.take() is not None
    assert driver.take() is not None
    assert ordinals(driver) == [0] * 4 + [1] * 4
    assert driver.assembly.charged == (0, 0)


def test_an_early_chunk_that_cannot_be_copied_aside_gives_its_room_back() -> None:
    def fail(arrays: Any, rows: int) -> list[np.ndarray]:
        raise MemoryError

    driver = ordered(keep_aside=fail)
    answer = place(driver, 1, 4).await_end()
    assert answer is not None
    assert (answer.rows, type(answer.error)) == (4, MemoryError)
    assert driver.assembly.charged == (0, 0)
    assert driver.assembly.abort() == 0


def test_kept_chunks_are_counted_by_an_abort_once() -> None:
    driver = ordered()
    driver.lay_out()
    parked(driver, 1, 3)
    parked(driver, 3, 2)
    assert driver.assembly.abort() == 5
    assert driver.assembly.abort() == 0
    assert driver.assembly.charged == (0, 0)


def test_a_chunk_that_was_kept_and_waits_for_room_is_counted_at_the_end() -> None:
    driver = ordered(max_batches=1)
    driver.lay_out()
    parked(driver, 1, 4)
    first = place(driver, 0, 4)
    first.await_blocked()  # its own rows are in place; it waits on behalf of the one that came early
    aborted = driver.assembly.abort()
    answer = first.await_end()
    assert answer is not None
    assert aborted + answer.rows == 8


def test_a_copy_that_fails_loses_no_chunk_that_was_kept_behind_it() -> None:
    def fail(key: Any, value: Any) -> None:
        raise MemoryError

    driver = ordered(on_copy=fail)
    driver.lay_out()
    parked(driver, 1, 3)
    answer = place(driver, 0, 1).await_end()
    assert answer is not None
    assert isinstance(answer.error, MemoryError)
    assert answer.rows + driver.assembly.abort() == 4


# ---- skipped and failed requests


@pytest.mark.parametrize("rebatch", [True, False])
@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_a_request_that_was_skipped_has_had_its_turn(rebatch: bool, skipped: int) -> None:
    def strict(arrays: Any, rows: int) -> list[np.ndarray]:
        return [array.copy() for array, _ in zip(arrays, ["data", "label"], strict=True)]

    driver = ordered(rebatch=rebatch, keep_aside=strict)
    driver.lay_out()
    placings = [place(driver, ordinal, 4) for ordinal in range(3) if ordinal != skipped]
    driver.assembly.skip(make_request(skipped, 4), RECORDER)
    assert [each.await_end() for each in placings] == [None, None]
    while driver.take():
        pass
    assert ordinals(driver) == [ordinal for ordinal in range(3) if ordinal != skipped for _ in range(4)]


def test_without_an_order_a_skipped_request_is_nothing() -> None:
    driver = Driver()
    driver.assembly.skip(make_request(0, 4), RECORDER)
    assert driver.assembly.charged == (0, 0)


def test_a_failure_waits_for_its_turn_and_nothing_behind_it_is_placed() -> None:
    driver = ordered()
    driver.lay_out()
    parked(driver, 3, 1)
    waiting = place(driver, 2, 30)
    waiting.await_blocked()
    error = failure(2)
    driver.assembly.fail_in_turn(make_request(2, 4), error)
    assert waiting.await_end() == Unplaced(30)
    assert not driver.assembly.closed
    assert driver.assembly.take_failures() == []
    assert place(driver, 5, 2).await_end() == Unplaced(2)
    parked(driver, 1, 3)
    assert place(driver, 0, 1).await_end() is None
    assert driver.assembly.closed
    assert driver.assembly.take_failures() == [error]
    assert driver.assembly.take_failures() == []
    driver.run()
    assert ordinals(driver) == [0, 1, 1, 1]
    assert driver.assembly.abort() == 1, "the one that was kept"


def test_of_several_failures_the_earliest_request_comes_first() -> None:
    driver = ordered()
    driver.assembly.watch()
    late, early = failure(1), failure(0)
    driver.assembly.fail_in_turn(make_request(1, 4), late)
    assert not driver.assembly.closed
    driver.assembly.fail_in_turn(make_request(0, 4), early)
    assert driver.assembly.closed
    assert driver.wake.get(timeout=1) is None
    assert driver.assembly.take_failures() == [early, late]


def test_a_failure_whose_turn_never_comes_is_told_after_the_end() -> None:
    driver = ordered()
    error = failure(7)
    driver.assembly.fail_in_turn(make_request(7, 4), error)
    assert driver.assembly.take_failures() == []
    driver.assembly.close()
    assert driver.assembly.take_failures() == [error]
    assert Driver().assembly.take_failures() == []


# ---- epochs


def by_epoch(*counts: int) -> Callable[[int], float]:
    return lambda epoch: counts[epoch] if epoch < len(counts) else math.inf


@pytest.mark.parametrize("is_ordered", [False, True])
def test_epochs_are_kept_apart(is_ordered: bool) -> None:
    driver = Driver(turns=Turns(is_ordered, by_epoch(2, 1, 0, 2), 0))  # type: ignore[arg-type]
    rows = [3, 2, 5, 1, 1]
    epochs = [0, 0, 1, 3, 3]
    placings = [place(driver, ordinal, rows[ordinal], epochs[ordinal]) for ordinal in (4, 2, 3, 1, 0)]
    driver.run([each.thread for each in placings], lambda: len(driver.epoch_ends) == 4)
    assert [each.await_end() for each in placings] == [None] * 5
    assert driver.epoch_ends == [(0, 2), (1, 4), (2, 4), (3, 5)]
    assert driver.assembly.epoch_ends == 4
    assert [(batch.epoch, batch.filled) for batch in driver.batches] == [(0, 4), (0, 1), (1, 4), (1, 1), (3, 2)]
    assert [{epochs[ordinal] for ordinal in check_batch(batch)[:, WORKER].tolist()} for batch in driver.taken] == [
        {0}, {0}, {1}, {1}, {3},
    ]  # fmt: skip


def test_a_chunk_of_the_next_epoch_waits_until_every_request_of_this_one_has_had_its_turn() -> None:
    driver = Driver(turns=Turns(False, by_epoch(2), 0))  # type: ignore[arg-type]
    driver.lay_out()
    assert place(driver, 0, 4, 0).await_end() is None
    next_epoch = place(driver, 2, 4, 1)
    next_epoch.await_blocked()
    driver.assembly.skip(make_request(1, 4), RECORDER)
    driver.run([next_epoch.thread], lambda: driver.rows_taken == 8)
    assert next_epoch.await_end() is None
    assert driver.epoch_ends == [(0, 1)]


def test_a_chunk_of_the_next_epoch_is_woken_when_the_last_request_of_this_one_was_skipped_and_nothing_is_to_be_taken() -> None:
    driver = Driver(rebatch=False, turns=Turns(False, by_epoch(1), 0))  # type: ignore[arg-type]
    next_epoch = place(driver, 1, 4, 1)
    next_epoch.await_blocked()
    driver.assembly.skip(make_request(0, 4), RECORDER)
    assert next_epoch.await_end() is None
    driver.run(until=lambda: driver.rows_taken == 4)
    assert driver.epoch_ends == [(0, 0)]


def test_epochs_without_a_request_end_at_once() -> None:
    driver = Driver(turns=Turns(False, by_epoch(0, 0), 0))  # type: ignore[arg-type]
    driver.run(until=lambda: len(driver.epoch_ends) == 2)
    assert driver.epoch_ends == [(0, 0), (1, 0)]


def test_a_batch_that_was_made_before_an_epoch_ended_is_not_laid_out_after_it() -> None:
    driver = Driver(turns=Turns(False, by_epoch(1), 0))  # type: ignore[arg-type]
    driver.lay_out()
    before = driver.assembly.epoch_ends
    assert place(driver, 0, 1, 0).await_end() is None
    assert not driver.assembly.lay_out(driver.make_batch(), before)
    assert driver.assembly.lay_out(driver.make_batch(), driver.assembly.epoch_ends)
    batch = driver.take()
    assert batch is not None
    assert driver.batches[0].is_closed


def test_the_parts_of_a_batch_say_which_rows_of_the_stream_it_has() -> None:
    driver = Driver(turns=Turns(True, by_epoch(3), 0))  # type: ignore[arg-type]
    driver.lay_out()
    for ordinal, begin in ((0, 0), (2, 6), (1, 3)):
        Placing(driver, ordinal, 3, request=make_request(ordinal, 3, 0, begin)).await_end()
    while driver.take():
        pass
    assert [batch.parts for batch in driver.batches] == [[(0, 0, 4)], [(0, 4, 8)], [(0, 8, 9)]]
