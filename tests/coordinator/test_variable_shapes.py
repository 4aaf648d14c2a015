"""Inputs with sides of any length: each chunk is delivered as it came, from threads, processes and the trainer's own thread."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gates import Gate, await_true, register

import input_workers as iw
from input_workers.feeds import NumpyFeed

SPECS = (iw.ArraySpec((None, 3), np.float32), iw.ArraySpec((None,), np.int64), iw.ArraySpec((), np.int16))
NAMES = ["boxes", "tokens", "label"]


def sides(index: int) -> tuple[int, int, int]:
    """Rows, boxes and tokens of a chunk: small ones, none, and some that fill blocks of memory."""
    return index % 4 + 1, (index * 7919) % 5000 if index % 3 else 0, index * 13 % 50


def make(index: int) -> list[np.ndarray[Any, Any]]:
    rows, boxes, tokens = sides(index)
    rng = np.random.default_rng(index)
    return [
        rng.random((rows, boxes, 3), np.float32),
        rng.integers(0, 99, (rows, tokens)),
        np.full(rows, index, np.int16),
    ]


class Chunks:
    """Row i is chunk i's number; the chunk of the request's only row is one row of any shape."""

    def __len__(self) -> int:
        return 40

    def fetch(self, rows: Any, request: iw.FetchRequest) -> list[np.ndarray[Any, Any]]:
        assert request.out is None
        return [array[:1] for array in make(int(rows[0]))]


class Copying(NumpyFeed):
    """Reads slots of its own, as a GPU's feed does."""

    chunk_alignment = None


def calls(worker_id: int, batch_size: int, left: list[int] = [40]) -> Any:  # noqa: B006
    if not left[0]:
        raise iw.EndOfData
    left[0] -= 1
    return make(left[0])


@pytest.mark.parametrize("feed", ["numpy", Copying()], ids=["adopted", "copied"])
@pytest.mark.parametrize(("fetchers", "workers"), [("thread", 3), ("process", 2), ("thread", 0)])
def test_chunks_of_any_shape_come_whole_and_in_order(coordinator, feed, fetchers, workers) -> None:
    stream = iw.Stream(Chunks(), rows_per_request=1)
    source = register(
        coordinator,
        stream,
        1,
        feed=feed,
        num_workers=workers,
        fetchers=fetchers,
        input_names=NAMES,
        specs=SPECS,
        rebatch=False,
        ordered=True,
    )
    with coordinator:
        came = [[np.array(array) for array in batch] for batch in source]
        assert source.specs() == SPECS
        stats = source.stats()
    for index, arrays in enumerate(came):
        for got, wanted in zip(arrays, make(index), strict=True):
            assert got.dtype == wanted.dtype
            np.testing.assert_array_equal(got, wanted[:1])
    assert (len(came), stats.rows_delivered, stats.queue_bytes) == (40, 40, 0)


@pytest.mark.parametrize("fetchers", ["thread", "process"])
def test_a_plain_function_may_return_any_number_of_rows_of_any_length(coordinator, fetchers) -> None:
    source = register(coordinator, calls, 8, num_workers=1, fetchers=fetchers, input_names=NAMES, specs=SPECS, rebatch=False)
    with coordinator:
        came = [[np.array(array) for array in batch] for batch in source]
        stats = source.stats()
    for index, arrays in zip(range(39, -1, -1), came, strict=True):
        for got, wanted in zip(arrays, make(index), strict=True):
            np.testing.assert_array_equal(got, wanted)
    assert stats.rows_delivered == sum(sides(index)[0] for index in range(40))


def test_what_waits_is_charged_with_the_bytes_that_it_has(coordinator) -> None:
    gate = Gate()
    source = register(
        coordinator,
        gate,
        1,
        input_names=["data"],
        specs=[iw.ArraySpec((None,), np.uint8)],
        rebatch=False,
        device_queue_depth=1,
    )
    with coordinator:
        for kilobytes in (1, 2, 3):
            gate.tell(lambda worker_id, size=kilobytes: [np.zeros((1, 1000 * size), np.uint8)])
            gate.await_calls()
            if kilobytes == 2:  # the first lies on the device, and this one waits for room there, uncharged
                await_true(lambda: source.stats().enqueuer_blocked_seconds > 0)
        charged = source.stats().queue_bytes
        gate.end()
        assert [batch.data.shape for batch in source] == [(1, 1000), (1, 2000), (1, 3000)]
        assert (charged, source.stats().queue_bytes) == (3000, 0)


@pytest.mark.parametrize("fetchers", ["thread", "process"])
@pytest.mark.parametrize(
    ("chunk", "match"),
    [
        (np.zeros((1, 5, 4), np.float32), r"'data': got rows of dtype\('float32'\) with shape \(5, 4\); wanted .*\(None, 3\)"),
        (np.zeros((1, 3), np.float32), r"with shape \(3,\); wanted dtype\('float32'\) with shape \(None, 3\)"),
        (np.zeros((1, 5, 3)), r"got rows of dtype\('float64'\) with shape \(5, 3\)"),
    ],
)
def test_other_sides_and_dtypes_stay_errors(coordinator, fetchers, chunk, match) -> None:
    source = register(
        coordinator,
        lambda worker_id, batch_size: [chunk],
        1,
        num_workers=1,
        fetchers=fetchers,
        input_names=["data"],
        specs=[iw.ArraySpec((None, 3), np.float32)],
        rebatch=False,
    )
    with coordinator, pytest.raises(iw.FetchFailed, match=match):
        source.next_batch()


def test_sides_of_any_length_need_rebatch_false(coordinator) -> None:
    with pytest.raises(iw.ConfigError, match=r"input 'data': got shape \(None,\).*rebatch=False.*pad_ragged="):
        register(coordinator, calls, 8, input_names=["data"], specs=[iw.ArraySpec((None,), np.uint8)])


def test_a_spec_knows_whether_it_is_fixed() -> None:
    spec = iw.ArraySpec((None, 3), np.uint8)
    assert not spec.is_fixed
    assert spec.admits((7, 3))
    assert not spec.admits((7, 4))
    assert not spec.admits((7,))
    with pytest.raises(iw.ConfigError, match="wanted one without a side of any length"):
        spec.row_nbytes  # noqa: B018
    with pytest.raises(iw.ConfigError, match="a side is negative"):
        iw.ArraySpec((None, -1), np.uint8)


class ToTheLongest:
    """Row i is i numbers, filled up to the longest row of the call. One row is bad, and the source does not say which."""

    def __init__(self, bad: int, most: int = 10) -> None:
        self.bad, self.most = bad, most

    def __len__(self) -> int:
        return 12

    def fetch(self, rows: Any, request: iw.FetchRequest) -> list[np.ndarray[Any, Any]]:
        if (rows == self.bad).any() or len(rows) > self.most:
            raise ValueError("a bad row")
        found = np.full((len(rows), max(rows)), -1)
        for target, row in zip(found, rows, strict=True):
            target[:row] = row
        return [found]


@pytest.mark.parametrize(("fetchers", "workers"), [("thread", 2), ("process", 1), ("thread", 0)])
@pytest.mark.parametrize("bad", [4, 5, 7])
def test_of_a_request_with_a_bad_row_the_others_are_one_chunk_again(coordinator, fetchers, workers, bad) -> None:
    source = register(
        coordinator, iw.Stream(ToTheLongest(bad), rows_per_request=4), 1, input_names=["tokens"], num_workers=workers,
        fetchers=fetchers, specs=[iw.ArraySpec((None,), np.int64)], rebatch=False, ordered=True,
        on_error=iw.ErrorPolicy(skip=True),
    )  # fmt: skip
    with coordinator:
        came = [batch.tokens.tolist() for batch in source]
    good = [row for row in range(4, 8) if row != bad]
    assert came[1] == [[row] * row + [-1] * (good[-1] - row) for row in good]
    assert [len(chunk) for chunk in came] == [4, 3, 4]
    assert source.stats().rows_dropped["skipped_error"] == 1


def test_rows_that_come_only_one_by_one_and_make_no_chunk_are_an_error(coordinator) -> None:
    source = register(
        coordinator, iw.Stream(ToTheLongest(5, most=1), rows_per_request=4), 1, input_names=["tokens"], rebatch=False,
        specs=[iw.ArraySpec((None,), np.int64)], on_error=iw.ErrorPolicy(skip=True),
    )  # fmt: skip
    coordinator.start()
    with pytest.raises(iw.FetchFailed, match="shapes that make no chunk, and failed in one") as failed:
        source.next_batch()
    assert isinstance(failed.value.__cause__, iw.SpecMismatch)
