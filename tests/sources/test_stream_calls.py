"""The requests of a run: what is left to deliver, no more and no less, numbered as if nothing had been delivered before."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import input_workers as iw
from input_workers.fetchers.fetcher import Fetcher
from input_workers.metrics.fetcher_recorder import FetcherRecorder
from input_workers.progress import Spans, add_span
from input_workers.sources.stream_calls import StreamCalls


class Rows:
    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.error: BaseException | None = None

    def __len__(self) -> int:
        return self.rows

    def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return [rows.copy()]


def calls_of(stream: iw.Stream, size: int, first: int = 0, done: Any = (), left: Any = (), last: str = "keep") -> StreamCalls:
    return StreamCalls(
        stream.plan(last, (0,), dict(left)), rows_per_request=size, batch_size=4, seed=stream.seed, first=first,
        done=dict(done), lend=lambda rows: None,
    )  # fmt: skip


def all_of(calls: StreamCalls) -> list[iw.FetchRequest]:
    requests = []
    fetcher = Fetcher(FetcherRecorder(3))
    while True:
        try:
            arrays, request = calls.next(fetcher)
        except iw.EndOfData:
            return requests
        assert arrays[0].tolist() == request.rows.tolist()
        assert request.worker_id == 3
        assert request.batch_size == 4
        requests.append(request)


def kept(request: iw.FetchRequest) -> list[int]:
    return (request.rows if request.kept is None else request.rows[request.kept]).tolist()


@settings(max_examples=300)
@given(data=st.data())
def test_what_is_left_is_dealt_once_in_order_and_numbered_as_ever(data: st.DataObject) -> None:
    rows, epochs, size = (data.draw(st.integers(1, most), name) for most, name in ((40, "rows"), (3, "epochs"), (12, "size")))
    stream = iw.Stream(Rows(rows), True, 5, epochs)
    first = data.draw(st.integers(0, epochs), "first")
    done: dict[int, Spans] = {}
    for epoch in range(first, epochs):
        for begin, stop in data.draw(st.lists(st.tuples(st.integers(0, rows), st.integers(0, rows)), max_size=5)):
            add_span(done.setdefault(epoch, []), begin, stop)
    full = {(request.epoch, request.begin): request for request in all_of(calls_of(stream, size))}
    assert [request.index for request in full.values()] == list(range(len(full)))
    calls = calls_of(stream, size, first, done)
    promised = {epoch: calls.requests_in(epoch) for epoch in range(epochs + 1)}
    requests = all_of(calls)
    assert [request.ordinal for request in requests] == list(range(len(requests)))
    for epoch in range(first, epochs):
        mine = [request for request in requests if request.epoch == epoch]
        assert promised[epoch] == len(mine)
        offsets = [at for request in mine for at in range(request.begin, request.begin + len(request.rows))]
        assert offsets == sorted(set(offsets))
        delivered = {at for begin, stop in done.get(epoch, []) for at in range(begin, stop)}
        order = stream.plan("keep", (0,)).rows(epoch, 0, rows).tolist()
        assert [row for request in mine for row in kept(request)] == [order[at] for at in range(rows) if at not in delivered]
    assert promised[epochs] == sys.maxsize
    for request in requests:
        same = full[request.epoch, request.begin]
        assert request.index == same.index
        assert request.rows.tolist() == same.rows.tolist(), "fetched whole again"
        assert request.rng.integers(1 << 60) == same.rng.integers(1 << 60), "with the same random numbers"


def test_random_numbers_are_those_of_seed_epoch_and_index_alone() -> None:
    def numbers(size: int, seed: int = 5, first: int = 0) -> dict[tuple[int, int], int]:
        calls = calls_of(iw.Stream(Rows(20), True, seed, 3), size, first)
        return {(each.epoch, each.index): int(each.rng.integers(1 << 60)) for each in all_of(calls)}

    whole = numbers(4)
    assert len(set(whole.values())) == 15
    assert numbers(4, first=2).items() <= whole.items()
    assert not set(numbers(4, seed=6).values()) & set(whole.values())


@pytest.mark.parametrize("left", [[], [(3, 7)], [(0, 2), (8, 10), (0, 1)]])
def test_an_epoch_that_was_dealt_anew_has_the_rows_that_were_left(left: Spans) -> None:
    stream = iw.Stream(Rows(10), True, 5, 2)
    order = stream.plan("keep", (0,)).rows(0, 0, 10).tolist()
    wanted = [order[at] for begin, stop in left for at in range(begin, stop)]
    calls = calls_of(stream, 3, left={0: left})
    assert calls.requests_in(0) == -(-len(wanted) // 3)
    requests = all_of(calls)
    assert [row for request in requests if request.epoch == 0 for row in kept(request)] == wanted
    assert len([request for request in requests if request.epoch == 1]) == 4


def test_a_request_whose_thread_was_ended_is_not_dealt_to_another() -> None:
    source = Rows(12)
    calls = calls_of(iw.Stream(source), 5)
    fetcher = Fetcher(FetcherRecorder(0))
    source.error = SystemExit()
    with pytest.raises(SystemExit):
        calls.next(fetcher)
    assert [request.begin for request in all_of_from(calls, fetcher)] == [5, 10]


def all_of_from(calls: StreamCalls, fetcher: Fetcher) -> list[iw.FetchRequest]:
    requests = []
    while True:
        try:
            requests.append(calls.next(fetcher)[1])
        except iw.EndOfData:
            return requests


def test_a_source_that_says_end_of_data_has_failed() -> None:
    source = Rows(12)
    source.error = iw.EndOfData()
    with pytest.raises(iw.InputWorkersError, match="a Stream ends by the length of its source") as caught:
        calls_of(iw.Stream(source), 5).next(Fetcher(FetcherRecorder(0)))
    assert not isinstance(caught.value, iw.EndOfData)


def test_threads_share_the_requests() -> None:
    calls = calls_of(iw.Stream(Rows(900), epochs=2), 1)
    seen: list[list[iw.FetchRequest]] = [[] for _ in range(4)]
    together = threading.Barrier(4)

    def deal(mine: list[iw.FetchRequest]) -> None:
        together.wait()
        mine += all_of_from(calls, Fetcher(FetcherRecorder(0)))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=deal, args=(mine,)) for mine in seen]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert sorted(request.ordinal for mine in seen for request in mine) == list(range(1800))
    assert all(np.diff([request.ordinal for request in mine]).min(initial=1) > 0 for mine in seen)
