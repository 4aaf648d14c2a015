"""Whose turn it is: any order of coming, one order of leaving; epochs apart; ends that stand at their request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from input_workers.contracts import Chunk, FetchRequest
from input_workers.flow.turns import Turns, is_end_mark


def chunk(ordinal: int, epoch: int = 0, rows: int = 1) -> Chunk:
    return [np.full(rows, ordinal)], rows, rows * 8, FetchRequest(ordinal, epoch, np.arange(rows), ordinal=ordinal)


def come(turns: Turns, order: Sequence[Chunk]) -> list[list[Chunk]]:
    """Bring chunks in this order; return what left with each."""
    left: list[list[Chunk]] = []
    for each in order:
        if turns.is_next(each):
            left.append(turns.enter(each))
        else:
            turns.park(each)
            left.append([])
    return left


def names(chunks: Sequence[Chunk]) -> list[str]:
    """Name chunks by their ordinals, and end marks by their epochs."""
    return [f"end {each[3].epoch}" if is_end_mark(each) else str(each[3].ordinal) for each in chunks if each[3] is not None]


@given(st.data())
def test_whatever_the_order_of_coming_the_order_of_leaving_is_that_of_the_requests(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5), "requests of each epoch")
    keeps = data.draw(st.booleans(), "keeps epochs")
    epochs = [epoch for epoch, size in enumerate(sizes) for _ in range(size)]
    empty = data.draw(st.sets(st.sampled_from(range(len(epochs) or 1))), "requests without rows")
    chunks = [chunk(ordinal, epoch, 0 if ordinal in empty else 1) for ordinal, epoch in enumerate(epochs)]
    wanted = sizes.__getitem__
    turns = Turns(True, (lambda epoch: wanted(epoch) if epoch < len(sizes) else 10**9) if keeps else None, 0)
    came: set[int] = set()
    left = turns.end_marks()
    for each in data.draw(st.permutations(chunks), "order of coming"):
        assert turns.is_next(each) is (each[3].ordinal == turns.next)
        left += come(turns, [each])[0]
        came.add(each[3].ordinal)
        assert turns.next == next(ordinal for ordinal in range(len(chunks) + 1) if ordinal not in came)
    expected = []
    for epoch in range(len(sizes)):
        expected += [str(ordinal) for ordinal, each in enumerate(epochs) if each == epoch and ordinal not in empty]
        expected += [f"end {epoch}"] if keeps else []
    assert names(left) == expected
    assert turns.give_up() == []


@given(st.data())
def test_without_an_order_only_epochs_wait_for_each_other(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    turns = Turns(False, lambda epoch: sizes[epoch] if epoch < len(sizes) else 10**9, 0)
    chunks = [chunk(0, epoch, data.draw(st.integers(0, 1))) for epoch, size in enumerate(sizes) for _ in range(size)]
    waiting, left = data.draw(st.permutations(chunks)), []
    while waiting:
        may = [each for each in waiting if turns.is_next(each)]
        assert may, "nobody's turn"
        assert {each[3].epoch for each in may} == {min(each[3].epoch for each in waiting)}
        waiting = [each for each in waiting if each is not may[0]]
        left += turns.enter(may[0])
    assert [each[3].epoch for each in left if is_end_mark(each)] == list(range(len(sizes)))
    assert [each[3].epoch for each in left] == sorted(each[3].epoch for each in left)


def test_without_turns_everybody_is_next() -> None:
    turns = Turns(False, None, 0)
    assert not turns.matter
    assert all(turns.is_next(chunk(ordinal, 9)) for ordinal in (5, 0, 7))
    assert names(turns.enter(chunk(5))) == ["5"]
    assert turns.end_marks() == []


def test_what_is_parked_is_given_up_once() -> None:
    turns = Turns(True, None, 0)
    come(turns, [chunk(3), chunk(1)])
    assert sorted(names(turns.give_up())) == ["1", "3"]
    assert turns.give_up() == []


@given(order=st.permutations(range(6)), bars=st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True))
def test_bars_are_called_once_the_earliest_first_when_all_before_it_have_had_their_turn(
    order: list[int], bars: list[int]
) -> None:
    turns = Turns(True, None, 0)
    called: list[int] = []
    for bar in bars:
        turns.set_bar(bar, lambda bar=bar: called.append(bar))  # type: ignore[misc]
    first = min(bars)
    assert [turns.is_barred(chunk(ordinal)) for ordinal in range(6)] == [ordinal >= first for ordinal in range(6)]
    for ordinal in order:
        for reached in turns.reached_bars(ended=False):
            reached()
        assert bool(called) is (turns.next >= first)
        if ordinal < first:
            come(turns, [chunk(ordinal)])
    for reached in turns.reached_bars(ended=False):
        reached()
    assert called == sorted(bars)
    assert not turns.has_bars
    assert turns.is_barred(chunk(first)), "called, and still in force"


def test_an_end_calls_a_bar_that_was_not_reached() -> None:
    turns = Turns(True, None, 0)
    turns.set_bar(3, lambda: None)
    assert turns.reached_bars(ended=False) == []
    assert len(turns.reached_bars(ended=True)) == 1
    assert turns.reached_bars(ended=True) == []
