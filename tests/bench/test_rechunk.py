"""The benchmarks run, count every row and say when a target is missed; their figures are for people to read."""

import collections

import pytest

from input_workers.bench import measure, rechunk


def test_a_ratio_is_the_median_of_ratios_within_a_round():
    rates = {"ours": [1.0, 20.0, 3.0], "limit": [2.0, 20.0, 30.0]}
    assert measure.median_ratio(rates, "ours", "limit") == 0.5


def test_sides_take_turns():
    order = []
    sides = {name: lambda name=name: order.append(name) or 1.0 for name in ("a", "b")}
    assert measure.compare(sides, rounds=2) == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert order == ["a", "b", "a", "b"]


@pytest.mark.parametrize(
    ("value", "target", "at_most", "met"),
    [
        (0.6, 0.6, False, True),
        (0.5, 0.6, False, False),
        (0.5, 0.6, True, True),
        (0.7, 0.6, True, False),
        (1, None, False, True),
    ],
)
def test_a_target_is_met_or_not(value, target, at_most, met):
    assert measure.Result("x", value, target, "", "", at_most).met is met


def test_what_could_not_be_measured_is_not_met_and_says_so():
    result = measure.Result("x", None, 0.6, "", "pip install something")
    assert not result.met
    assert "not measured" in measure.table([result])


def test_a_missed_target_is_marked():
    assert measure.table([measure.Result("x", 0.1, 0.6, "", "")]).startswith("NO")
    assert measure.table([measure.Result("x", 0.7, 0.6, "", "")]).startswith("ok")


def test_chunks_are_handed_over_without_a_reference_left_behind():
    chunks = rechunk.make_chunks([2, 3], (4,))
    assert isinstance(chunks, collections.deque)
    fetch = rechunk.hand_over(chunks)
    assert [len(fetch(0, 1)[1]) for _ in range(2)] == [2, 3]
    assert not chunks
    with pytest.raises(rechunk.iw.EndOfData):
        fetch(0, 1)


def test_every_row_of_a_rechunk_comes_out():
    results = rechunk.rechunk("tiny", lambda: rechunk.make_chunks([1, 5, 200, 3] * 20, (3,)), 2, 0.0)
    assert all(result.value > 0 for result in results)


def test_rows_that_stay_are_rechunked_too():
    (result,) = rechunk.rechunk("tiny", lambda: rechunk.resident_rows(2000, (16,)), 1, 0.0)
    assert result.value > 0
    assert "rows/s" in result.note


def test_a_benchmark_that_loses_rows_fails(monkeypatch):
    monkeypatch.setattr(rechunk, "drain", lambda *args, **options: (1, 1.0))
    with pytest.raises(RuntimeError, match="1 of 10 rows"):
        rechunk.rechunk("tiny", lambda: rechunk.make_chunks([10], (3,)), 1, 0.0)
