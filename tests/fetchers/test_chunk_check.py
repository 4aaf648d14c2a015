"""What a fetch function may return, and what the error says where it may not: object, got, wanted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from gates import register
from hypothesis import given
from hypothesis import strategies as st

import input_workers as iw
from input_workers.contracts import FetchRequest
from input_workers.fetchers.chunk_check import ChunkCheck, SpecBook


def new_check(axes: Sequence[int] = (0, 0), first: Any = None) -> ChunkCheck:
    names = ["data", "label", "more"][: len(axes)]
    check = ChunkCheck(SpecBook("train", names, axes))
    if first is not None:
        check.rows_of(first, None)
    return check


GOOD = [np.zeros((3, 2), np.float32), np.zeros(3, np.int64)]
ROWS = np.zeros(3, np.int64)
BAD: dict[str, tuple[Any, str]] = {
    "one array too few": ([GOOD[0]], r"got 1 arrays; wanted 2"),
    "one array too many": ([*GOOD, ROWS], r"got 3 arrays; wanted 2"),
    "nothing in it": ([], r"got 0 arrays; wanted 2"),
    "a bare array": (GOOD[0], r"got ndarray of shape \(3, 2\); wanted a sequence of 2 arrays"),
    "a dict": ({"data": GOOD[0], "label": ROWS}, r"got dict; wanted a sequence"),
    "a set": ({1, 2}, r"got set; wanted a sequence"),
    "a string": ("ab", r"got str; wanted a sequence"),
    "bytes": (b"ab", r"got bytes; wanted a sequence"),
    "a number": (5, r"got int; wanted a sequence"),
    "a generator": ((array for array in GOOD), r"got generator; wanted a sequence"),
    "a list of lists": ([[1, 2, 3], ROWS], r"'data': got list; wanted a NumPy array"),
    "a NumPy scalar": ([np.float32(1), ROWS], r"'data': got float32; wanted a NumPy array"),
    "None inside": ([GOOD[0], None], r"'label': got NoneType; wanted a NumPy array"),
    "no dimension": ([GOOD[0], np.array(3)], r"'label': got shape \(\); wanted rows along axis 0"),
    "objects": ([GOOD[0], np.array([1, "a", None], object)], r"'label': got dtype dtype\('O'\); wanted fixed-size"),
    "objects in a record": ([GOOD[0], np.zeros(3, [("a", "O")])], r"'label': got dtype .*'O'.*; wanted fixed-size"),
    "a dtype without length": ([GOOD[0], np.zeros(3, "V0")], r"'label': got dtype .*; wanted fixed-size"),
    "masked": ([np.ma.masked_array(GOOD[0]), ROWS], r"'data': got MaskedArray of shape .*; wanted a NumPy array"),
    "unlike rows": ([GOOD[0], np.zeros(4, np.int64)], r"data: \(3, 2\), label: \(4,\); wanted as many in each along axis 0"),
}
NOT_AS_FIRST: dict[str, tuple[Any, str]] = {
    "another dtype": ([GOOD[0].astype(np.float64), ROWS], r"'data': got rows of dtype\('float64'\).*wanted dtype\('float32'\)"),
    "another byte order": ([GOOD[0], ROWS.astype(">i8")], r"'label': got rows of dtype\('>i8'\).*wanted dtype\('int64'\)"),
    "another shape": ([np.zeros((3, 5), np.float32), ROWS], r"with shape \(5,\); wanted .*with shape \(2,\)"),
    "another rank": ([np.zeros((3, 2, 1), np.float32), ROWS], r"with shape \(2, 1\); wanted .*with shape \(2,\)"),
    "no rows of another dtype": ([np.zeros((0, 2)), ROWS[:0]], r"got rows of dtype\('float64'\)"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("known", [False, True])
def test_what_is_no_chunk_is_refused_saying_what_was_got_and_wanted(what: str, known: bool) -> None:
    result, text = BAD[what]
    if what == "a generator":
        result = (array for array in GOOD)
    with pytest.raises(iw.SpecMismatch, match=text) as caught:
        new_check(first=GOOD if known else None).rows_of(result, None)
    assert str(caught.value).startswith("source 'train': ")


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_a_matrix_is_refused() -> None:
    with pytest.raises(iw.SpecMismatch, match=r"'data': got matrix of shape .*; wanted a NumPy array"):
        new_check().rows_of([np.matrix([[1, 2]]), np.zeros(1)], None)


@pytest.mark.parametrize("what", NOT_AS_FIRST)
def test_a_chunk_unlike_the_first_is_refused_and_never_cast(what: str) -> None:
    result, text = NOT_AS_FIRST[what]
    check = new_check(first=GOOD)
    with pytest.raises(iw.SpecMismatch, match=text):
        check.rows_of(result, None)
    assert check.rows_of(GOOD, None) == 3, "the next right chunk is right"


KINDS = ["?", "i1", "<u2", ">i4", "f2", "<f4", ">f4", "f8", "c8", "c16", "S3", "<U3", ">U3", "M8[s]", "M8[ms]", "m8[s]", "V5",
         [("a", "i4")], [("b", "i4")], [("a", ">i4")]]  # fmt: skip


@pytest.mark.parametrize("index", range(len(KINDS)))
def test_a_change_between_any_two_dtypes_is_an_error(index: int) -> None:
    check = new_check([0], first=[np.zeros(3, KINDS[index])])
    assert check.rows_of([np.zeros(5, np.dtype(KINDS[index]))], None) == 5
    for other, kind in enumerate(KINDS):
        if other != index:
            with pytest.raises(iw.SpecMismatch, match="nothing is ever cast"):
                check.rows_of([np.zeros(3, kind)], None)


def test_no_data_now_teaches_nothing() -> None:
    check = new_check()
    assert check.rows_of(None, None) == 0
    assert check.rows_of([np.zeros((0, 9)), np.zeros(0, "U1")], None) == 0
    assert check.rows_of(GOOD, None) == 3
    assert check.rows_of([GOOD[0][:0], GOOD[1][:0]], None) == 0
    assert check.row_nbytes == 16


@pytest.mark.parametrize("result", [None, [GOOD[0][:2], ROWS[:2]], [GOOD[0][:0], ROWS[:0]]])
def test_a_request_wants_exactly_its_rows(result: Any) -> None:
    request = FetchRequest(0, 0, np.arange(3))
    check = new_check(first=GOOD)
    with pytest.raises(iw.SpecMismatch, match=r"got (NoneType|2 rows|0 rows); wanted"):
        check.rows_of(result, request)
    assert check.rows_of(GOOD, request) == 3


def test_fetchers_share_what_the_first_chunk_taught() -> None:
    book = SpecBook("train", ["data"], [0])
    assert ChunkCheck(book).rows_of([np.zeros((2, 3), "f4")], None) == 2
    with pytest.raises(iw.SpecMismatch):
        ChunkCheck(book).rows_of([np.zeros((2, 3), "f8")], None)
    assert book.known() == (iw.ArraySpec((3,), "f4"),)


@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=3),
    rows=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    data=st.data(),
)
def test_rows_are_counted_along_each_batch_axis(shapes: list[list[int]], rows: list[int], data: st.DataObject) -> None:
    axes = [data.draw(st.integers(0, len(shape))) for shape in shapes]
    check = new_check(axes)
    for count in rows:
        chunk = [np.zeros((*shape[:axis], count, *shape[axis:])) for shape, axis in zip(shapes, axes, strict=True)]
        assert check.rows_of(chunk, None) == count
    wrong = data.draw(st.integers(0, len(shapes) - 1))
    chunk = [
        np.zeros((*shape[:axis], 9 + (index == wrong), *shape[axis:]))
        for index, (shape, axis) in enumerate(zip(shapes, axes, strict=True))
    ]
    if len(shapes) > 1:
        with pytest.raises(iw.SpecMismatch, match="unequal numbers of rows"):
            check.rows_of(chunk, None)
    else:
        assert check.rows_of(chunk, None) == 10


junk = st.recursive(
    st.one_of(st.none(), st.integers(), st.text(max_size=3), st.binary(max_size=3), st.floats(),
              st.builds(np.zeros, st.lists(st.integers(0, 3), max_size=3), st.sampled_from(["f4", "i8", "U2"]))),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(st.text(max_size=1), inner)),
    max_leaves=6,
)  # fmt: skip


@given(result=junk)
def test_whatever_is_returned_is_right_or_a_spec_mismatch_and_changes_nothing(result: Any) -> None:
    check = new_check(first=GOOD)
    try:
        rows = check.rows_of(result, None)
    except iw.SpecMismatch as error:
        assert "; wanted " in str(error)  # noqa: PT017
    else:
        assert result is None or rows == len(result[0]) == len(result[1])
    assert check.rows_of(GOOD, None) == 3


@pytest.mark.parametrize("what", [*BAD, *NOT_AS_FIRST])
def test_a_bad_chunk_ends_the_source_after_the_good_ones_and_nothing_of_it_counts(
    coordinator: iw.GlobalCoordinator, what: str
) -> None:
    results = [GOOD, {**BAD, **NOT_AS_FIRST}[what][0]]
    source = register(coordinator, lambda worker_id, batch_size: results.pop(0), batch_size=3)
    coordinator.start()
    assert source.next_batch().valid_rows == 3
    with pytest.raises(iw.FetchFailed, match=r"source 'train', worker 0: SpecMismatch: .*; wanted ") as caught:
        source.next_batch()
    assert isinstance(caught.value.__cause__, iw.SpecMismatch)
    stats = source.stats()
    assert (stats.rows_fetched, stats.rows_delivered, dict(stats.fetch_errors)) == (3, 3, {"SpecMismatch": 1})


def test_the_checks_are_not_assertions_that_optimising_removes() -> None:
    script = """
import numpy as np
import input_workers as iw
from input_workers.fetchers.chunk_check import ChunkCheck, SpecBook
bad = [None, [], [np.zeros(3)], [np.zeros(3), np.zeros(4)], [np.zeros(3), np.array(1)], [np.zeros(3), [1, 2, 3]], {}, 3]
for result in bad[1:]:
    try:
        ChunkCheck(SpecBook("train", ["data", "label"], [0, 0])).rows_of(result, None)
    except iw.SpecMismatch:
        continue
    raise SystemExit(f"accepted {result}")
"""
    done = subprocess.run([sys.executable, "-O", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
