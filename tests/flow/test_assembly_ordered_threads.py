"""Many fetchers bring the requests of a Stream at once: rows keep their order, and epochs never mix."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from flow.assembly_driver import Driver, hasty_threads
from flow.assembly_fetchers import Fetchers, assert_bound, deal, lengths, settings_of_an_assembly, with_threads
from hypothesis import given
from hypothesis import strategies as st
from self_certifying import WORKER, check_batch

from input_workers.errors import Failure, FetchFailed
from input_workers.flow.turns import Turns
from input_workers.metrics.fetcher_recorder import FetcherRecorder


@pytest.fixture(autouse=True, scope="module")
def _hasty_threads() -> Iterator[None]:
    with hasty_threads():
        yield


@with_threads
@given(data=st.data(), seed=st.integers(0, 999), workers=st.integers(1, 4))
def test_ordered_rows_lie_in_the_order_of_requests_with_what_was_skipped_left_out(
    data: st.DataObject, seed: int, workers: int
) -> None:
    driver = Driver(**data.draw(settings_of_an_assembly()), turns=Turns(True, None, 0))  # type: ignore[arg-type]
    rows = data.draw(st.lists(lengths(driver.batch_size), max_size=30))
    skipped = data.draw(st.sets(st.integers(0, max(0, len(rows) - 1)), max_size=5))
    fetchers = Fetchers(driver, deal(rows, [0] * len(rows), workers, seed), seed)
    driver.after_step = assert_bound(driver, driver.batch_size + fetchers.largest)
    for ordinal in skipped:
        fetchers.at_request[ordinal] = lambda request: driver.assembly.skip(request, FetcherRecorder(0)) or True  # type: ignore[func-returns-value]
    assert fetchers.run() == 0
    assert not fetchers.errors
    seen = [row for batch in driver.taken for row in check_batch(batch, axes=driver.axes)[:, (WORKER, 3)].tolist()]
    assert seen == [[ordinal, row] for ordinal, count in enumerate(rows) if ordinal not in skipped for row in range(count)]
    assert all(batch.filled == batch.rows for batch in driver.batches[:-1])


@with_threads
@given(data=st.data(), seed=st.integers(0, 999), workers=st.integers(1, 4), at=st.integers(0, 25), aborts=st.booleans())
def test_a_request_that_fails_in_turn_is_the_end_and_every_row_is_accounted_for(
    data: st.DataObject, seed: int, workers: int, at: int, aborts: bool
) -> None:
    driver = Driver(**data.draw(settings_of_an_assembly()), turns=Turns(True, None, 0))  # type: ignore[arg-type]
    rows = data.draw(st.lists(lengths(driver.batch_size), min_size=1, max_size=25))
    fails = data.draw(st.integers(0, len(rows) - 1))
    failure, aborted = Failure(FetchFailed, "request"), [0]
    fetchers = Fetchers(driver, deal(rows, [0] * len(rows), workers, seed), seed)
    fetchers.at_request[fails] = lambda request: driver.assembly.fail_in_turn(request, failure) or True  # type: ignore[func-returns-value]

    def abort(number: int) -> None:
        if aborts and number == at:
            aborted[0] += driver.assembly.abort()

    fetchers.on_chunk = abort
    rest = fetchers.run()
    assert not fetchers.errors
    fetchers.assert_ledger(aborted[0] + rest)
    seen = [row for batch in driver.taken for row in check_batch(batch, axes=driver.axes)[:, (WORKER, 3)].tolist()]
    wanted = [[ordinal, row] for ordinal, count in enumerate(rows[:fails]) for row in range(count)]
    assert seen == wanted if not aborts else seen == wanted[: len(seen)]
    assert driver.assembly.take_failures() in ([failure], [] if aborts else [failure])


@with_threads
@given(data=st.data(), seed=st.integers(0, 999), workers=st.integers(1, 4), is_ordered=st.booleans())
def test_epochs_never_mix(data: st.DataObject, seed: int, workers: int, is_ordered: bool) -> None:
    counts = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    turns = Turns(is_ordered, lambda epoch: counts[epoch] if epoch < len(counts) else math.inf, 0)  # type: ignore[arg-type, return-value]
    driver = Driver(**data.draw(settings_of_an_assembly()), turns=turns)
    epochs = [epoch for epoch, count in enumerate(counts) for _ in range(count)]
    rows = [data.draw(lengths(driver.batch_size)) for _ in epochs]
    fetchers = Fetchers(driver, deal(rows, epochs, workers, seed), seed)
    assert fetchers.run() == 0
    assert not fetchers.errors
    assert [epoch for epoch, _ in driver.epoch_ends] == list(range(len(counts)))
    first = 0
    for epoch, end in driver.epoch_ends:
        batches = driver.taken[first:end]
        seen = [row for batch in batches for row in check_batch(batch, axes=driver.axes)[:, (WORKER, 3)].tolist()]
        wanted = [[ordinal, row] for ordinal, count in enumerate(rows) if epochs[ordinal] == epoch for row in range(count)]
        assert sorted(seen) == wanted
        assert seen == wanted or not is_ordered
        assert all(batch.filled == batch.rows for batch in driver.batches[first : max(first, end - 1)])
        first = end
    assert first == len(driver.taken)
