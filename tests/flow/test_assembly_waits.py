"""Who waits for what in an assembly, and is woken by whom."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from flow.assembly_driver import CopyGate, Driver, Placing, pack, place, rows_of, started

from input_workers.flow.batches import Unplaced

# ---- waits


def test_fetchers_that_find_no_room_are_served_in_the_order_in_which_they_came() -> None:
    driver = Driver(max_batches=1)
    waiting = []
    for worker, rows in enumerate([3, 6, 1, 2]):
        waiting.append(Placing(driver, worker, rows))
        waiting[-1].await_blocked()
    late = Placing(driver, 9, 4)
    late.await_blocked()
    driver.run([each.thread for each in waiting], lambda: driver.rows_taken == 16)
    assert [each.await_end() for each in [*waiting, late]] == [None] * 5
    # Whoever has more rows than there is room for goes on behind the others: several copy large chunks at the same time.
    came = [(0, range(3)), (1, range(1)), (2, range(1)), (3, range(2)), (9, range(1)), (1, range(1, 5)), (9, range(1, 4)),
            (1, range(5, 6))]  # fmt: skip
    assert rows_of(driver) == [(worker, row) for worker, rows in came for row in rows]


def test_a_newcomer_does_not_overtake_one_that_waits_although_its_rows_would_fit() -> None:
    driver = Driver(max_batches=1)
    driver.lay_out()
    first = Placing(driver, 0, 6)
    first.await_blocked()
    second = Placing(driver, 1, 1)
    second.await_blocked()
    assert not pack(driver, 2, 1)
    driver.assembly.close()
    assert (first.await_end(), second.await_end()) == (Unplaced(2), Unplaced(1))
    assert driver.assembly.abort() == 4


def test_what_a_fetcher_waited_is_noted_in_its_recorder() -> None:
    driver = Driver()
    waiting = Placing(driver, 0, 4)
    waiting.await_blocked()
    driver.lay_out()
    waiting.await_end()
    assert waiting.recorder.blocked[0] > 0


@pytest.mark.parametrize("end", ["close", "abort"])
def test_every_one_that_waits_is_woken_by_the_end(end: str) -> None:
    driver = Driver(max_batches=1)
    driver.lay_out()
    waiting = [Placing(driver, worker, rows) for worker, rows in enumerate([7, 2, 3])]
    for each in waiting:
        each.await_blocked()
    aborted = getattr(driver.assembly, end)() or 0
    unplaced = [each.await_end() for each in waiting]
    assert all(each is not None and each.error is None for each in unplaced)
    driver.run()
    assert sum(each.rows for each in unplaced if each) + aborted + driver.rows_taken == 12
    assert driver.rows_taken == (4 if end == "close" else 0)
    assert driver.assembly.closed


def test_after_the_end_nothing_is_placed_packed_or_counted_twice() -> None:
    driver = Driver()
    driver.lay_out()
    place(driver, 0, 5)
    assert driver.assembly.abort() == 5
    assert driver.assembly.abort() == 0
    assert place(driver, 0, 5, call=1) == Unplaced(5)
    assert not pack(driver, 0, 1)
    assert driver.assembly.drained
    assert driver.take() is None
    assert driver.assembly.charged == (0, 0)


def test_a_copy_that_still_runs_at_an_abort_was_counted_and_harms_nothing() -> None:
    gate = CopyGate(0)
    driver = Driver(on_copy=gate)
    driver.lay_out()
    slow = Placing(driver, 0, 6)
    gate.await_arrival()
    assert driver.assembly.abort() == 6
    gate.let_through(0)
    assert slow.await_end() is None, "its rows are counted by the abort, once"
    assert driver.take() is None


# ---- wake-ups


def test_a_token_is_put_once_when_there_is_something_to_do() -> None:
    driver = Driver()
    driver.assembly.watch()
    waiting = Placing(driver, 0, 4)
    assert driver.wake.get(timeout=1) is None, "the first chunk has come: batches are needed"
    driver.lay_out()
    waiting.await_end()
    assert driver.wake.empty(), "nobody watches"
    driver.assembly.watch()
    place(driver, 0, 4, call=1)
    place(driver, 0, 4, call=2)
    assert driver.wake.get(timeout=1) is None
    assert driver.wake.empty()


def test_no_token_for_a_batch_that_is_not_the_oldest() -> None:
    gate = CopyGate(0)
    driver = Driver(max_batches=9, on_copy=gate)
    driver.lay_out()
    slow = Placing(driver, 0, 4)
    gate.await_arrival()
    driver.lay_out()
    driver.assembly.watch()
    place(driver, 1, 4)
    assert driver.wake.empty()
    gate.let_through(0)
    slow.await_end()
    assert driver.wake.get(timeout=1) is None


@pytest.mark.parametrize("end", ["close", "abort"])
def test_an_end_puts_a_token(end: str) -> None:
    driver = Driver()
    driver.assembly.watch()
    getattr(driver.assembly, end)()
    assert driver.wake.get(timeout=1) is None
    assert driver.assembly.drained


def test_await_sent_returns_when_the_enqueuer_has_found_nothing_more_to_send() -> None:
    driver = Driver()
    driver.lay_out()
    place(driver, 0, 8)
    waiting = started(driver.assembly.await_sent)
    driver.take()
    driver.take()
    assert waiting.is_alive(), "the second batch may still be on its way"
    assert driver.take() is None
    waiting.join(10)
    assert not waiting.is_alive()
    driver.assembly.await_sent()
    place(driver, 0, 4, call=1)
    waiting = started(driver.assembly.await_sent)
    waiting.join(0.01)
    assert waiting.is_alive(), "a complete batch was not sent yet"
    driver.assembly.close()
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_signal_handler_may_stop_it_anywhere_while_it_is_being_counted() -> None:
    for at in range(100):
        driver = Driver()
        driver.lay_out()
        place(driver, 0, 6)
        left = iter(range(at))
        aborted: list[int] = []

        def stop_at(frame: Any, event: str, arg: Any) -> None:
            if event in ("call", "c_return") and frame.f_code.co_filename != __file__ and next(left, None) is None:  # noqa: B023
                sys.setprofile(None)
                aborted.append(driver.assembly.abort())  # noqa: B023

        try:
            sys.setprofile(stop_at)
            rows, _ = driver.assembly.charged
        finally:
            sys.setprofile(None)
        assert 0 <= rows <= 6
        if not aborted:
            break
        assert aborted == [6]
    assert at > 3
