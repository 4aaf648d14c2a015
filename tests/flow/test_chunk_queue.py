"""The queue between fetchers and enqueuer: its bounds, the order at its door, its ends, its epochs, its packed rows."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from gates import HANG_SECONDS, await_true
from hypothesis import given, settings
from hypothesis import strategies as st

from input_workers.contracts import Chunk, FetchRequest
from input_workers.flow.chunk_queue import ChunkQueue


def new_queue(max_weight: int = 10, max_nbytes: int | None = None, **more: Any) -> tuple[ChunkQueue, queue.SimpleQueue[None]]:
    wake: queue.SimpleQueue[None] = queue.SimpleQueue()
    return ChunkQueue(max_weight, max_nbytes, wake, **more), wake


def chunk(rows: int, number: int = 0, nbytes: int | None = None, epoch: int | None = None) -> Chunk:
    request = None if epoch is None else FetchRequest(number, epoch, np.arange(rows))
    return [np.full(rows, number)], rows, rows * 8 if nbytes is None else nbytes, request


def numbers(chunks: Sequence[Chunk]) -> list[int]:
    return [int(each[0][0][0]) for each in chunks if each[1]]


def release(chunks: ChunkQueue, taken: list[Chunk]) -> None:
    """Say that these chunks were copied."""
    chunks.release(taken, sum(each[1] for each in taken), sum(each[2] for each in taken))


class Putter(threading.Thread):
    """Puts one chunk in a thread of its own; `accepted` once it is decided."""

    def __init__(self, chunks: ChunkQueue, each: Chunk, door: int) -> None:
        super().__init__(daemon=True)
        self.chunks, self.each, self.accepted = chunks, each, None
        self.start()
        await_true(lambda: self.accepted is not None or len(chunks._door) == door, "a putter at the door")

    def run(self) -> None:
        self.accepted = self.chunks.put(self.each)

    def result(self) -> bool | None:
        self.join(HANG_SECONDS)
        assert not self.is_alive(), "still at the door"
        return self.accepted


def waiting(chunks: ChunkQueue, each: Chunk, door: int) -> Putter:
    putter = Putter(chunks, each, door)
    assert putter.accepted is None, "let in where it should wait"
    return putter


def test_what_waits_comes_out_at_once_in_the_order_of_coming() -> None:
    chunks, _ = new_queue()
    assert all(chunks.offer(chunk(2, number)) for number in range(5))
    assert not chunks.offer(chunk(1, 5)), "full"
    assert numbers(chunks.take(1)) == [0, 1, 2, 3, 4]
    assert chunks.take(1) == []


def test_less_than_wanted_stays_and_a_token_follows_when_there_is_enough() -> None:
    chunks, wake = new_queue()
    chunks.offer(chunk(2))
    assert chunks.take(5) == []
    chunks.offer(chunk(2))
    assert wake.empty()
    chunks.offer(chunk(1))
    assert wake.get(timeout=HANG_SECONDS) is None
    assert len(chunks.take(5)) == 3


@pytest.mark.parametrize(("bound", "sizes"), [("rows", [5, 5]), ("bytes", [1, 1])])
def test_the_bounds_in_rows_and_bytes_hold_until_the_taker_has_copied(bound: str, sizes: list[int]) -> None:
    chunks, _ = new_queue(10, None if bound == "rows" else 100)
    nbytes = 40 if bound == "rows" else 50
    for rows in sizes:
        assert chunks.offer(chunk(rows, nbytes=nbytes))
    assert not chunks.offer(chunk(1, nbytes=1)), "full"
    taken = chunks.take(1)
    assert not chunks.offer(chunk(1, nbytes=1)), "taken, but not copied"
    assert chunks.charged == (sum(sizes), 2 * nbytes)
    release(chunks, taken)
    assert chunks.offer(chunk(1, nbytes=1))
    assert chunks.charged == (1, 1)


def test_without_rebatching_a_chunk_weighs_one() -> None:
    chunks, _ = new_queue(2, by_rows=False)
    assert [chunks.offer(chunk(rows)) for rows in (1000, 1000, 1)] == [True, True, False]


def drain(chunks: ChunkQueue, count: int) -> list[list[int]]:
    """Take and copy until so many chunks came; return which came together."""
    together: list[list[int]] = []
    while sum(map(len, together)) < count:
        taken = chunks.take(1)
        assert taken, f"only {together} came"
        together.append(numbers(taken))
        release(chunks, taken)
    return together


def test_a_chunk_larger_than_the_bound_passes_alone() -> None:
    chunks, _ = new_queue(10, 100)
    assert chunks.put(chunk(1000, 1))
    putters = [waiting(chunks, chunk(1, 2), door=1), waiting(chunks, chunk(50, 3), door=2)]
    assert drain(chunks, 3) == [[1], [2], [3]]
    assert [putter.result() for putter in putters] == [True, True]


def test_the_taker_gets_the_little_there_is_when_somebody_waits_at_the_door() -> None:
    chunks, _ = new_queue(10)
    chunks.offer(chunk(1, 1))
    large = waiting(chunks, chunk(50, 2), door=1)
    assert numbers(chunks.take(100)) == [1]
    chunks.abort()
    assert large.result() is False


def test_a_large_chunk_at_the_door_is_not_overtaken_by_small_ones() -> None:
    chunks, _ = new_queue(10)
    chunks.offer(chunk(8, 0))
    large = waiting(chunks, chunk(9, 1), door=1)
    assert not chunks.offer(chunk(1, 2)), "it would fit, and must not"
    assert not chunks.pack([np.full(1, 2)], 1, 8)
    small = waiting(chunks, chunk(1, 2), door=2)
    assert sum(drain(chunks, 3), []) == [0, 1, 2]  # noqa: RUF017
    assert large.result()
    assert small.result()


def test_whoever_waits_at_the_door_wakes_the_taker_although_no_batch_is_complete() -> None:
    chunks, wake = new_queue(10)
    chunks.offer(chunk(8, 0))
    assert chunks.take(20) == []
    putter = waiting(chunks, chunk(8, 1), door=1)
    assert wake.get(timeout=HANG_SECONDS) is None
    assert drain(chunks, 2) == [[0], [1]]
    assert putter.result()


@pytest.mark.parametrize("state", ["empty", "filled", "taken", "packed"])
@pytest.mark.parametrize("how", ["close", "abort"])
def test_an_end_refuses_those_at_the_door_and_all_who_come_later(how: str, state: str) -> None:
    chunks, wake = new_queue(10)
    putters = []
    if state == "packed":
        chunks.pack([np.zeros(10, np.int64)], 10, 80)
    elif state != "empty":
        chunks.offer(chunk(10))
    if state == "taken":
        chunks.take(1)
    if state != "empty":
        putters = [waiting(chunks, chunk(5, 1 + door), door=door) for door in (1, 2)]
    rows = getattr(chunks, how)()
    assert [putter.result() for putter in putters] == [False] * len(putters)
    assert [chunks.put(chunk(1)), chunks.offer(chunk(1)), chunks.pack([np.zeros(1)], 1, 8)] == [False] * 3
    assert wake.get(timeout=HANG_SECONDS) is None
    left = state in ("filled", "packed")
    if how == "abort":
        assert rows == (10 if left else 0)
        assert chunks.abort() == 0, "counted once"
        left = False
    assert chunks.drained is not left
    assert sum(each[1] for each in chunks.take(99)) == (10 if left else 0)
    assert chunks.drained


def test_after_an_abort_nothing_is_charged() -> None:
    chunks, _ = new_queue(100)
    chunks.offer(chunk(10))
    taken = chunks.take(1)
    chunks.offer(chunk(7))
    assert chunks.charged == (17, 136)
    chunks.abort()
    assert chunks.charged == (0, 0)
    release(chunks, taken)
    assert chunks.charged == (0, 0)


def test_epochs_are_kept_apart_by_a_mark_and_the_next_one_waits_at_the_door() -> None:
    chunks, wake = new_queue(100, requests_in=lambda epoch: 2)
    early = waiting(chunks, chunk(3, 10, epoch=1), door=1)
    assert chunks.put(chunk(3, 0, epoch=0))
    first = chunks.take(50)
    assert numbers(first) == [0], "one at the door: the taker gets what is there"
    assert early.accepted is None
    assert chunks.put(chunk(2, 1, epoch=0))
    assert early.result()
    while not wake.empty():
        wake.get()
    taken = chunks.take(50)
    assert [(each[1], each[3].epoch) for each in taken] == [(2, 0), (0, 0), (3, 1)]
    release(chunks, first + taken)
    assert chunks.take(50) == []
    assert chunks.put(chunk(1, 11, epoch=1))
    assert wake.get(timeout=HANG_SECONDS) is None, "an epoch's end is enough to be taken"
    assert [each[1] for each in chunks.take(50)] == [1, 0]


def test_packed_rows_keep_their_values_and_their_place_among_other_chunks() -> None:
    chunks, _ = new_queue(10_000, pack_below_nbytes=100)
    record = np.dtype([("a", ">f4"), ("b", "<U2")])

    def rows_from(start: int, count: int) -> list[np.ndarray]:
        numbered = np.arange(start, start + count)
        records = np.array([(number, str(number % 90)) for number in numbered], record)
        return [numbered.astype(">i2"), np.zeros((count, 0), "f4"), records[::-1][::-1]]

    wanted: list[list[np.ndarray]] = []
    for start, count in ((0, 1), (1, 3), (4, 200), (204, 5), (209, 5), (214, 1)):
        arrays = rows_from(start, count)
        wanted.append([array.copy() for array in arrays])
        if count == 5:
            assert chunks.offer((arrays, count, 0, None))
        else:
            assert chunks.pack(arrays, count, 0)
            arrays[0][:], arrays[2][:] = 0, (0, "")  # the fetch function uses its buffers again
    assert chunks.charged[0] == 215
    taken = chunks.take(1)
    for index in range(3):
        joined = np.concatenate([each[0][index] for each in taken])
        expected = np.concatenate([each[index] for each in wanted])
        assert joined.dtype == expected.dtype
        assert joined.shape == expected.shape
        assert joined.tobytes() == expected.tobytes()
    assert sum(each[1] for each in taken) == 215


steps = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12), st.sampled_from(["pack", "offer", "put"])), max_size=30)


@settings(max_examples=60)
@given(plan=steps, max_weight=st.integers(1, 20), wanted=st.integers(1, 8), by_bytes=st.booleans())
def test_no_token_is_lost_no_row_is_lost_and_each_fetchers_order_is_kept(
    plan: list[tuple[int, int, str]], max_weight: int, wanted: int, by_bytes: bool
) -> None:
    """Three real fetcher threads and a taker that only looks when it gets a token; a lost one would hang it."""
    chunks, wake = new_queue(max_weight, max_weight * 12 if by_bytes else None)
    left, lock = [3], threading.Lock()

    def fetch(worker: int) -> None:
        mine = [(rows, how) for who, rows, how in plan if who == worker]
        for number, (rows, how) in enumerate(mine):
            arrays = [np.array([[worker, number, row] for row in range(rows)])]
            if how == "pack" and chunks.pack(arrays, rows, rows * 24):
                continue
            each = (arrays, rows, rows * 24, None)
            assert (how != "put" and chunks.offer(each)) or chunks.put(each)
        with lock:
            left[0] -= 1
            if not left[0]:
                chunks.close()

    threads = [threading.Thread(target=fetch, args=(worker,), daemon=True) for worker in range(3)]
    for thread in threads:
        thread.start()
    rows = [row for each in _take_all(chunks, wake, wanted, max_weight) for row in each[0][0].tolist()]
    for thread in threads:
        thread.join(HANG_SECONDS)
        assert not thread.is_alive()
    assert sorted(rows) == sorted(_expected(plan))
    for worker in range(3):
        assert [row for row in rows if row[0] == worker] == [row for row in _expected(plan) if row[0] == worker]
    assert chunks.charged == (0, 0), "copied, and still charged"


def _take_all(chunks: ChunkQueue, wake: queue.SimpleQueue[None], wanted: int, max_weight: int) -> Iterator[Chunk]:
    held = 0
    while True:
        taken = chunks.take(max(1, wanted - held))
        if not taken:
            if chunks.drained:
                return
            wake.get(timeout=HANG_SECONDS)
            continue
        weight = sum(each[1] for each in taken)
        assert weight <= max_weight or any(each[1] > max_weight for each in taken), f"{weight} rows within {max_weight}"
        held = (held + weight) % wanted  # a taker that copies whatever comes, and needs the rest of a batch next
        yield from taken
        release(chunks, taken)


def _expected(plan: list[tuple[int, int, str]]) -> list[list[int]]:
    counts = [0, 0, 0]
    rows = []
    for worker, count, _ in plan:
        rows += [[worker, counts[worker], row] for row in range(count)]
        counts[worker] += 1
    return rows


def numbered(ordinal: int, rows: int = 1, nbytes: int | None = None) -> Chunk:
    """A chunk of the request with this ordinal."""
    request = FetchRequest(ordinal, 0, np.arange(rows), ordinal=ordinal)
    return [np.full(rows, ordinal)], rows, rows * 8 if nbytes is None else nbytes, request


@settings(max_examples=60)
@given(
    order=st.permutations(range(9)),
    sizes=st.lists(st.integers(0, 7), min_size=9, max_size=9),
    bounds=st.tuples(st.integers(1, 10), st.one_of(st.none(), st.integers(1, 80))),
    patience=st.integers(0, 9),
    by_rows=st.booleans(),
)
def test_any_order_of_finishing_leaves_in_the_order_of_the_requests_within_the_bounds(
    order: list[int], sizes: list[int], bounds: tuple[int, int | None], patience: int, by_rows: bool
) -> None:
    """Fetchers finish one after the other, each in a thread of its own; from some point on the taker takes."""
    chunks, _wake = new_queue(*bounds, ordered=True, by_rows=by_rows)
    weights = [rows if by_rows else min(rows, 1) for rows in sizes]
    most_weight, most_nbytes = bounds[0] + max(weights), (bounds[1] or 10**9) + max(sizes) * 8
    putters: list[Putter] = []
    came: list[int] = []

    def take() -> None:
        while True:
            assert chunks.charged[0] <= most_weight
            assert chunks.charged[1] <= most_nbytes
            taken = chunks.take(1)
            if not taken:
                return
            came.extend(each[3].ordinal for each in taken if each[3] is not None)
            assert chunks.charged[0] <= most_weight
            release(chunks, taken)

    for step, ordinal in enumerate(order):
        each = numbered(ordinal, sizes[ordinal])
        at_door = len(chunks._door)
        putters.append(Putter(chunks, each, at_door + 1))
        assert chunks.charged[0] <= most_weight
        assert chunks.charged[1] <= most_nbytes
        if step >= patience:
            take()
            next_up = min(set(range(9)) - set(order[: step + 1]), default=9)
            assert came == [ordinal for ordinal in range(next_up) if sizes[ordinal]], "whose turn it was did not pass"
    take()
    assert [putter.result() for putter in putters] == [True] * 9
    assert came == [ordinal for ordinal in range(9) if sizes[ordinal]]
    take()
    assert chunks.charged == (0, 0)


def test_in_order_a_taker_that_does_not_come_holds_up_the_one_whose_turn_it_is() -> None:
    chunks, _ = new_queue(4, ordered=True)
    assert all(chunks.put(numbered(ordinal, 2)) for ordinal in range(2))
    putters = [waiting(chunks, numbered(2, 2), door=1)]
    taken = chunks.take(1)
    putters.append(waiting(chunks, numbered(3, 2), door=2))
    release(chunks, taken)
    assert [each[0][0][0] for each in chunks.take(1)] == [2, 3]
    assert [putter.result() for putter in putters] == [True, True]


def test_what_is_parked_fills_the_bounds_and_the_one_whose_turn_it_is_passes() -> None:
    chunks, wake = new_queue(4, 1000, ordered=True)
    assert chunks.take(3) == []
    assert all(chunks.put(numbered(ordinal)) for ordinal in (4, 2, 3, 1))
    late = waiting(chunks, numbered(5), door=1)
    assert chunks.charged == (4, 32)
    assert chunks.take(3) == [], "parked chunks are not to be had"
    while not wake.empty():
        wake.get()
    assert chunks.put(numbered(0, 50, 10_000)), "larger than the bounds, and next"
    assert wake.get(timeout=HANG_SECONDS) is None
    taken = chunks.take(3)
    assert [each[3].ordinal for each in taken if each[3]] == [0, 1, 2, 3, 4]
    assert late.accepted is None
    release(chunks, taken)
    assert [each[3].ordinal for each in chunks.take(1) if each[3]] == [5]
    assert late.result()


def test_a_parked_chunk_is_not_yet_a_batch_for_the_taker() -> None:
    chunks, wake = new_queue(100, ordered=True)
    assert chunks.take(4) == []
    chunks.put(numbered(1, 10))
    assert wake.empty(), "it cannot be taken yet"
    chunks.put(numbered(0, 1))
    assert wake.get(timeout=HANG_SECONDS) is None
    assert numbers(chunks.take(4)) == [0, 1]


@pytest.mark.parametrize("how", ["close", "abort"])
def test_an_end_gives_up_what_is_parked(how: str) -> None:
    chunks, _ = new_queue(10, ordered=True)
    chunks.put(numbered(0, 3))
    chunks.put(numbered(2, 4))
    at_door = waiting(chunks, numbered(3, 9), door=1)
    if how == "close":
        chunks.close()
        assert numbers(chunks.take(99)) == [0]
        assert chunks.drained
        assert chunks.abort() == 4
    else:
        assert chunks.abort() == 7
    assert chunks.abort() == 0
    assert at_door.result() is False


def test_in_order_epochs_are_kept_apart_too_and_one_without_rows_ends() -> None:
    sizes = [2, 1, 0, 1]
    chunks, _ = new_queue(100, ordered=True, requests_in=lambda epoch: sizes[epoch] if epoch < 4 else 99)
    epochs = [0, 0, 1, 3]
    for ordinal in (3, 1, 2, 0):
        arrays, rows, nbytes, request = numbered(ordinal, 0 if ordinal == 2 else 1)
        assert request is not None
        request.epoch = epochs[ordinal]
        assert chunks.put((arrays, rows, nbytes, request))
    taken = chunks.take(99)
    assert [(each[3].epoch, each[1]) for each in taken if each[3]] == [(0, 1), (0, 1), (0, 0), (1, 0), (2, 0), (3, 1), (3, 0)]


class Barrier:
    """Notes in which state of the queue it was reached."""

    def __init__(self, chunks: ChunkQueue, ordinal: int) -> None:
        self.reached: list[int] = []
        self._chunks = chunks
        self._ordinal = ordinal

    def put(self) -> Barrier:
        self._chunks.put_barrier(self._ordinal, self._reach)
        return self

    def _reach(self) -> None:
        assert self._chunks._lock.acquire(timeout=HANG_SECONDS), "called with the lock held"
        self._chunks._lock.release()
        self.reached.append(self._ordinal)
        self._chunks.close()


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]])
@pytest.mark.parametrize("step", [0, 3, 6])
def test_a_barrier_lets_all_before_it_through_and_nothing_from_it_on(at: int, order: list[int], step: int) -> None:
    chunks, _ = new_queue(100, ordered=True)
    barrier = Barrier(chunks, at)
    accepted = {}
    order = [ordinal for ordinal in order if ordinal != at]
    for number, ordinal in enumerate(order):
        if number == step:
            barrier.put()
        before = set(range(at)) - set(order[:number])
        assert bool(barrier.reached) is (number >= step and not before)
        accepted[ordinal] = chunks.put(numbered(ordinal))
    if step >= len(order):
        barrier.put()
    assert barrier.reached == [at], "once"
    assert [ordinal for ordinal in order[step:] if ordinal < at and not accepted[ordinal]] == []
    assert [ordinal for ordinal in order[step:] if ordinal > at and accepted[ordinal]] == []
    assert numbers(chunks.take(1)) == list(range(at))
    assert chunks.drained
    assert chunks.abort() == len([ordinal for ordinal in order[:step] if ordinal > at])


def test_of_two_barriers_the_earlier_request_counts_even_if_it_comes_later() -> None:
    chunks, _ = new_queue(100, ordered=True)
    called: list[int] = []
    for ordinal in (4, 2, 5):
        chunks.put_barrier(ordinal, lambda ordinal=ordinal: called.append(ordinal))  # type: ignore[misc]
    assert chunks.put(numbered(1))
    assert not chunks.put(numbered(3)), "before the first of them, but not before the earliest"
    assert called == []
    assert chunks.put(numbered(0))
    assert called == [2, 4, 5]
    chunks.put_barrier(7, lambda: called.append(7))
    assert called == [2, 4, 5, 7]


def test_a_barrier_sends_away_those_at_the_door_behind_it() -> None:
    chunks, _ = new_queue(1, ordered=True)
    assert chunks.put(numbered(2))
    at_door = {ordinal: waiting(chunks, numbered(ordinal), door) for door, ordinal in ((1, 1), (2, 3), (3, 4))}
    barrier = Barrier(chunks, 3).put()
    assert at_door[3].result() is False
    assert at_door[4].result() is False
    assert at_door[1].accepted is None
    assert chunks.put(numbered(0))
    assert sum(drain(chunks, 3), []) == [0, 1, 2]  # noqa: RUF017
    assert at_door[1].result()
    assert barrier.reached == [3]


@pytest.mark.parametrize("how", ["close", "abort"])
def test_an_end_before_a_barrier_is_reached_does_not_hide_what_it_is_for(how: str) -> None:
    chunks, _ = new_queue(100, ordered=True)
    open_when_called: list[bool] = []
    chunks.put_barrier(3, lambda: open_when_called.append(chunks.closed))
    getattr(chunks, how)()
    assert open_when_called == [False], "recorded before anything is closed"
    chunks.put_barrier(4, lambda: open_when_called.append(chunks.closed))
    assert open_when_called == [False, True]


@settings(max_examples=30)
@given(st.data())
def test_in_order_real_fetchers_and_a_taker_that_only_looks_when_told_never_stand_still(data: st.DataObject) -> None:
    """Requests are dealt as a Stream does; a fetcher may finish only when the plan's order lets it."""
    fetchers = data.draw(st.sampled_from([1, 2, 7, 64]))
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=40), "sizes")
    priority = data.draw(st.permutations(range(len(sizes))), "who finishes before whom")
    max_weight = data.draw(st.integers(1, 12))
    chunks, wake = new_queue(max_weight, data.draw(st.one_of(st.none(), st.integers(1, 90))), ordered=True)
    changed = threading.Condition()
    dealt, held, left = [0], set[int](), [fetchers]

    def may_finish(ordinal: int) -> bool:
        everybody_has_one = len(held) >= min(fetchers, 4) or dealt[0] >= len(sizes)
        return everybody_has_one and priority[ordinal] == min(priority[each] for each in held)

    def fetch() -> None:
        while True:
            with changed:
                if dealt[0] >= len(sizes):
                    left[0] -= 1
                    last = not left[0]
                    changed.notify_all()
                    break
                ordinal = dealt[0]
                dealt[0] += 1
                held.add(ordinal)
                changed.notify_all()
                # One that is kept at the door does not hold a request any more, so the others go on.
                changed.wait_for(lambda ordinal=ordinal: may_finish(ordinal), 0.02)
                held.discard(ordinal)
                changed.notify_all()
            assert chunks.put(numbered(ordinal, sizes[ordinal]))
        if last:
            chunks.close()

    threads = [threading.Thread(target=fetch, daemon=True) for _ in range(fetchers)]
    for thread in threads:
        thread.start()
    came = []
    while not chunks.drained:
        taken = chunks.take(3)
        if not taken and not chunks.drained:
            wake.get(timeout=HANG_SECONDS)
        came += numbers(taken)
        assert chunks.charged[0] <= max_weight + max(sizes)
        release(chunks, taken)
    for thread in threads:
        thread.join(HANG_SECONDS)
        assert not thread.is_alive()
    assert came == [ordinal for ordinal, rows in enumerate(sizes) if rows]
