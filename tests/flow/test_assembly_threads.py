"""Many fetchers fill batches at once: whatever they bring and whenever it ends, no row is lost, torn or out of order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from flow.assembly_driver import ROW_NBYTES, Driver, hasty_threads
from flow.assembly_fetchers import Fetchers, assert_bound, deal, lengths, settings_of_an_assembly, with_threads
from hypothesis import given
from hypothesis import strategies as st
from self_certifying import WORKER, Witness, check_batch

from input_workers.flow.turns import Turns


@pytest.fixture(autouse=True, scope="module")
def _hasty_threads() -> Iterator[None]:
    with hasty_threads():
        yield


@with_threads
@given(data=st.data(), seed=st.integers(0, 999))
def test_every_row_comes_once_in_full_batches_and_each_fetcher_keeps_its_order(data: st.DataObject, seed: int) -> None:
    more = data.draw(settings_of_an_assembly())
    driver = Driver(**more)
    driver.after_step = assert_bound(driver)
    chunks = st.lists(lengths(driver.batch_size).map(lambda rows: (rows, None)), max_size=25)
    fetchers = Fetchers(driver, data.draw(st.lists(chunks, min_size=1, max_size=4)), seed)
    aborted = fetchers.run()
    assert not fetchers.errors
    witness = Witness(axes=driver.axes)
    for number, batch in enumerate(driver.taken):
        is_last = number == len(driver.taken) - 1
        witness.see(batch, None if is_last else driver.batch_size)
    assert aborted == 0
    assert witness.rows == sum(fetchers.fetched.values())
    witness.assert_complete()


@with_threads
@given(
    data=st.data(),
    seed=st.integers(0, 999),
    how=st.sampled_from(["close", "abort"]),
    by=st.sampled_from(["fetcher", "driver"]),
)
def test_at_an_end_at_any_moment_every_row_is_taken_aborted_or_given_back(
    data: st.DataObject, seed: int, how: str, by: str
) -> None:
    driver = Driver(**data.draw(settings_of_an_assembly()))
    chunks = st.lists(lengths(driver.batch_size).map(lambda rows: (rows, None)), min_size=1, max_size=15)
    fetchers = Fetchers(driver, data.draw(st.lists(chunks, min_size=1, max_size=4)), seed)
    at = data.draw(st.integers(0, 20))
    aborted = [0]

    def end() -> None:
        aborted[0] += getattr(driver.assembly, how)() or 0

    if by == "fetcher":
        fetchers.on_chunk = lambda number: end() if number == at else None
    else:
        driver.after_step = lambda: end() if len(driver.taken) == at and not driver.assembly.closed else None
    rest = fetchers.run()
    assert not fetchers.errors
    fetchers.assert_ledger(aborted[0] + rest)
    seen = Witness(axes=driver.axes)
    for batch in driver.taken:
        seen.see(batch)


@with_threads
@given(data=st.data(), seed=st.integers(0, 999))
def test_batches_that_are_empty_may_be_laid_out_anew_at_any_moment(data: st.DataObject, seed: int) -> None:
    driver = Driver(**data.draw(settings_of_an_assembly()))
    sizes = itertools.cycle(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    chunks = st.lists(lengths(driver.batch_size).map(lambda rows: (rows, None)), max_size=15)
    fetchers = Fetchers(driver, data.draw(st.lists(chunks, min_size=1, max_size=4)), seed)

    def lay_out_anew() -> None:
        if next(numbers) % 3 == 0:
            driver.assembly.discard_empty()
            driver.batch_size = next(sizes)

    numbers = itertools.count()
    driver.before_step = lay_out_anew
    assert fetchers.run() == 0
    assert not fetchers.errors
    witness = Witness(axes=driver.axes)
    for batch, rows in zip(driver.taken, [batch.rows for batch in driver.batches[:-1]], strict=False):
        witness.see(batch, rows)
    for batch in driver.taken[-1:]:
        witness.see(batch)
    fetchers.assert_ledger(0)
    assert witness.rows == sum(fetchers.fetched.values())


@pytest.mark.parametrize("pack_below_nbytes", [0, 2 * ROW_NBYTES])
def test_no_row_is_reserved_twice_when_fetchers_that_need_not_wait_are_as_many_as_they_can(pack_below_nbytes: int) -> None:
    driver = Driver(1500, max_batches=20, pack_below_nbytes=pack_below_nbytes)
    fetchers = Fetchers(driver, [[(rows, None) for rows in (1, 2, 1, 3)] * 200 for _ in range(4)], 0)
    driver.lay_out()
    assert fetchers.run() == 0
    assert not fetchers.errors
    witness = Witness()
    for batch in driver.taken:
        witness.see(batch)
    assert witness.rows == sum(fetchers.fetched.values())
    witness.assert_complete()


@with_threads
@given(data=st.data(), seed=st.integers(0, 999), max_chunks=st.integers(1, 4), is_ordered=st.booleans())
def test_chunks_that_are_batches_come_whole_each_once(
    data: st.DataObject, seed: int, max_chunks: int, is_ordered: bool
) -> None:
    nbytes = data.draw(st.sampled_from([None, 1, 10 * ROW_NBYTES]))
    turns = Turns(True, None, 0) if is_ordered else None  # type: ignore[arg-type]
    driver = Driver(rebatch=False, max_rows=max_chunks, max_nbytes=nbytes, turns=turns)
    rows = data.draw(st.lists(lengths(4), max_size=30))
    work = deal(rows, [0] * len(rows), 3, seed)
    if not is_ordered:
        work = [[(count, None) for count, _ in chunks] for chunks in work]
    fetchers = Fetchers(driver, work, seed)
    driver.after_step = assert_bound(driver, 1)
    assert fetchers.run() == 0
    assert not fetchers.errors
    taken = [check_batch(batch) for batch in driver.taken]
    assert sorted(len(each) for each in taken) == sorted(rows)
    if is_ordered:
        assert [each[0, WORKER] for each in taken] == list(range(len(rows)))
    else:
        witness = Witness()
        for batch in driver.taken:
            witness.see(batch)
