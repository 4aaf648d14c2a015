"""A failed call and what is made of it, without threads: what is fetched again, with which random numbers, what is skipped."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import input_workers as iw
from input_workers.contracts import FetchRequest
from input_workers.fetchers.chunk_check import ChunkCheck, SpecBook
from input_workers.fetchers.context import FetchContext
from input_workers.fetchers.fetcher import Fetcher
from input_workers.fetchers.recovery import Attempt, AttemptReport, AttemptState, Skipped, keep_rows
from input_workers.metrics.fetcher_recorder import FetcherRecorder
from input_workers.policy import Quarantine

FIRST_ROW = 100  # rows are numbered from here, so that a row is never its own index


def request_of(count: int, kept: Sequence[int] | None = None) -> FetchRequest:
    rows = np.arange(FIRST_ROW, FIRST_ROW + count)
    return FetchRequest(7, 3, rows, seed=5, kept=None if kept is None else np.array(kept))


class Bench:
    """One attempt and all that it needs; `fetch(request, calls so far)` makes the calls."""

    def __init__(self, fetch: Callable[[Any, int], Any], request: FetchRequest | None, axis: int = 0, **policy: Any) -> None:
        self.asked: list[list[int] | None] = []
        self.dropped = 0
        self.waits: list[float] = []
        self.fetcher = Fetcher(FetcherRecorder(2))
        self.check = ChunkCheck(SpecBook("train", ["row", "noise"], [axis, axis]))
        self.policy = iw.ErrorPolicy(**policy)
        self.quarantine = Quarantine("train", self.policy, lambda: (0, 0))
        self.request = request
        recorder: Any = self
        nothing: Any = None
        self.context = FetchContext(
            source="train", calls=nothing, assembly=nothing, book=nothing, policy=self.policy, quarantine=self.quarantine,
            recorder=recorder, signal=nothing, ordered=False, fetch_timeout_s=None, abandons=False,
            file_of=lambda row: f"{row}.jpg" if row % 2 else None, on_skipped=nothing,
        )  # fmt: skip

        def call(part: FetchRequest | None) -> Any:
            self.asked.append(None if part is None else part.rows.tolist())
            if part is not None:
                assert (part.index, part.epoch, part.rows.dtype) == (7, 3, np.int64)
                assert not part.rows.flags.writeable or part.rows is request.rows
                assert self.fetcher.call_started < math.inf, "it must be seen if it hangs"
            return fetch(part, len(self.asked))

        self.call = call
        self.attempt = Attempt(self.policy, request)

    @property
    def recorder(self) -> FetcherRecorder:
        return self.fetcher.recorder

    def drop(self, reason: str, rows: int) -> None:
        self.dropped += rows
        assert reason == "skipped_error"
        assert self.recorder.rows == self.dropped, "counted as fetched first"

    def pause(self, seconds: float) -> bool:
        assert self.fetcher.call_started == math.inf, "a wait is no call that takes long"
        self.waits.append(seconds)
        self.attempt._not_before = 0.0  # time flies
        return False

    def run(self, error: BaseException | None = None) -> Any:
        """Make the first call as the fetch loop does, and go on from its failure, or from this one."""
        if error is None:
            self.fetcher.begin_call(self.request)
            try:
                return self.call(self.request)
            except Exception as raised:
                error = raised
            self.fetcher.end_call(failed=True)
        self.attempt.failed(error, self.fetcher)
        return self.go_on()

    def go_on(
        self, pause: Callable[[float], bool] | None = None, go_on: Callable[[], bool] = lambda: True, check: Any = None
    ) -> Any:
        """Make the calls of the attempt, and account for what was skipped, as the fetch loop does."""
        try:
            return self.attempt.run(self.call, check or self.check, self.fetcher, pause or self.pause, go_on)
        finally:
            self.context.account_skipped(self.fetcher, self.attempt.request, self.attempt.take_skipped())


def good(part: Any) -> list[np.ndarray]:
    return [part.rows.copy(), part.rng.integers(0, 1 << 60, len(part.rows))]


def noise(count: int, *key: int) -> list[int]:
    return np.random.default_rng((5, 3, 7, *key)).integers(0, 1 << 60, count).tolist()  # type: ignore[no-any-return]


def fails_on(*bad: int, named: bool = False) -> Callable[[Any, int], Any]:
    def fetch(part: Any, calls: int) -> Any:
        here = [int(row) for row in part.rows if row - FIRST_ROW in bad]
        if here and named:
            raise iw.BadRows(here)
        if here:
            raise ValueError("bad")
        return good(part)

    return fetch


@pytest.mark.parametrize("tries", [1, 3])
def test_a_retried_call_gets_the_same_request_and_the_same_random_numbers(tries: int) -> None:
    def fetch(part: Any, calls: int) -> Any:
        arrays = good(part)  # uses the random numbers, and then fails
        if calls <= tries:
            raise ConnectionError(f"try {calls}")
        return arrays

    bench = Bench(fetch, request_of(4), retries=3, backoff_s=1.0, max_backoff_s=3.0)
    arrays = bench.run()
    assert arrays[0].tolist() == [100, 101, 102, 103]
    assert arrays[1].tolist() == noise(4)
    assert bench.asked == [[100, 101, 102, 103]] * (tries + 1)
    assert bench.recorder.errors == {"ConnectionError": tries}
    assert [low <= wait <= 2 * low for wait, low in zip(bench.waits, [0.5, 1.0, 1.5], strict=False)] == [True] * tries
    assert bench.attempt.is_over
    assert bench.request is not None
    assert bench.request.kept is None


@pytest.mark.parametrize("retries", [0, 2])
def test_without_skip_the_last_error_itself_is_raised(retries: int) -> None:
    errors = [ValueError(str(number)) for number in range(retries + 1)]

    def fetch(part: Any, calls: int) -> Any:
        raise errors[calls - 1]

    bench = Bench(fetch, request_of(2), retries=retries)
    with pytest.raises(ValueError, match=str(retries)) as caught:
        bench.run()
    assert caught.value is errors[-1]
    assert getattr(caught.value, "__notes__", []) == ([f"tried {retries + 1} times"] if retries else [])
    assert bench.recorder.errors == ({"ValueError": retries} if retries else {}), "the last one is counted by the loop"


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), iw.SpecMismatch("cast"), iw.EndOfData()])
def test_what_nobody_may_recover_from_is_raised_at_once(error: BaseException) -> None:
    bench = Bench(lambda part, calls: good(part), request_of(2), retries=5, skip=True)
    with pytest.raises(type(error)) as caught:
        bench.run(error)
    assert caught.value is error
    assert bench.asked == []


@pytest.mark.parametrize("when", [1, 2])
def test_a_wrong_result_of_a_call_made_again_is_raised(when: int) -> None:
    def fetch(part: Any, calls: int) -> Any:
        return good(part) if calls < when else [part.rows.copy()]

    with pytest.raises(iw.SpecMismatch, match="got 1 arrays"):
        Bench(fetch, request_of(2), skip=True).run(ValueError("on the whole"))


@given(
    count=st.integers(1, 8),
    bad=st.sets(st.integers(0, 7)),
    also=st.sets(st.integers(0, 7)),
    kept=st.one_of(st.none(), st.sets(st.integers(0, 7), min_size=1)),
    axis=st.integers(0, 1),
    named=st.booleans(),
)
def test_exactly_the_bad_rows_are_skipped_and_every_other_row_comes_in_its_order(
    count: int, bad: set[int], also: set[int], kept: set[int] | None, axis: int, named: bool
) -> None:
    bad = {row for row in bad if row < count} or {0}
    if kept is not None:
        kept = {row for row in kept if row < count} or {0}
    memory = [np.zeros((2, 8), int), np.zeros((2, 8), int)]

    def fetch(part: Any, calls: int) -> Any:
        """A source that names only some of its bad rows at first, names others, and uses its memory again."""
        here = [int(row) for row in part.rows if row - FIRST_ROW in bad]
        if here and named:
            raise iw.BadRows([*here[: 1 + calls % 2], *(row + FIRST_ROW + count for row in also)])
        if here:
            raise ValueError("bad")
        for array in memory:
            array[:] = -1
            array[:, : len(part.rows)] = part.rows
        return [(array[:, : len(part.rows)] if axis else array[0, : len(part.rows), None]) for array in memory]

    request = request_of(count, None if kept is None else sorted(kept))
    bench = Bench(fetch, request, axis=axis, skip=True)
    arrays = bench.run()
    wanted = set(range(count)) if kept is None else kept
    left = sorted(wanted - bad)
    if left:
        for array in arrays:
            assert (array[0] if axis else array[:, 0]).tolist() == [row + FIRST_ROW for row in left]
        assert bench.request is not None
        assert (range(count) if request.kept is None else request.kept.tolist()) == (
            left if left != [*range(count)] else range(count)
        )
    else:
        assert len(arrays) == 0
    assert bench.dropped == len(wanted & bad), "rows that an earlier run delivered are none of this one's"
    skipped = [row for each in bench.quarantine.latest for row in each.rows]
    assert sorted(skipped) == [row + FIRST_ROW for row in sorted(wanted & bad)]
    assert bench.recorder.rows == len(wanted & bad)
    assert bench.attempt.is_over


def test_a_row_fetched_alone_has_random_numbers_of_its_own_and_the_rest_of_named_ones_those_of_the_request() -> None:
    alone = Bench(fails_on(1), request_of(4), skip=True).run()
    assert alone[1].tolist() == [noise(1, offset)[0] for offset in (0, 2, 3)]
    again = Bench(fails_on(1), request_of(4), skip=True).run()
    assert again[1].tolist() == alone[1].tolist()
    rest = Bench(fails_on(1, named=True), request_of(4), skip=True).run()
    assert rest[1].tolist() == noise(3)


def test_of_named_rows_only_the_rest_is_fetched_again_and_once() -> None:
    bench = Bench(fails_on(0, 3, named=True), request_of(5), skip=True)
    assert bench.run()[0].tolist() == [101, 102, 104]
    assert bench.asked == [[100, 101, 102, 103, 104], [101, 102, 104]]
    (entry,) = bench.quarantine.latest
    assert (entry.worker_id, entry.request, entry.epoch, entry.rows, entry.files) == (2, 7, 3, (100, 103), ("103.jpg",))
    assert entry.error == "BadRows: rows [100, 103] cannot be read"
    assert bench.recorder.errors == {"BadRows": 1}


@pytest.mark.parametrize("names", [[], [0], [99, 105], [-1]])
def test_names_of_rows_that_were_not_asked_for_end_in_every_row_being_tried_alone(names: list[int]) -> None:
    def fetch(part: Any, calls: int) -> Any:
        assert calls < 50, "for ever"
        raise iw.BadRows(names)

    bench = Bench(fetch, request_of(3), skip=True)
    assert len(bench.run()) == 0
    assert bench.asked == [[100, 101, 102], [100], [101], [102]]
    assert bench.dropped == 3


def test_a_row_that_comes_twice_in_a_request_is_bad_twice() -> None:
    request = FetchRequest(7, 3, np.array([100, 101, 100, 102]), seed=5)
    bench = Bench(fails_on(0, named=True), request, skip=True)
    assert bench.run()[0].tolist() == [101, 102]
    assert bench.dropped == 2
    assert request.kept is not None
    assert request.kept.tolist() == [1, 3]


def test_retries_come_before_skipping_and_each_part_has_its_own() -> None:
    seen: dict[tuple[int, ...], int] = {}

    def fetch(part: Any, calls: int) -> Any:
        key = tuple(part.rows.tolist())
        seen[key] = seen.get(key, 0) + 1
        if len(key) > 1 or key == (101,) or seen[key] <= 2:
            raise ValueError(str(key))
        return good(part)

    bench = Bench(fetch, request_of(3), retries=2, skip=True, backoff_s=1.0)
    assert bench.run()[0].tolist() == [100, 102]
    assert seen == {(100, 101, 102): 3, (100,): 3, (101,): 3, (102,): 3}
    assert len(bench.waits) == 4 * 2
    assert bench.recorder.errors == {"ValueError": 3 + 2 + 3 + 2}


def test_every_failed_call_is_counted_also_where_each_row_alone_is_good() -> None:
    bench = Bench(lambda part, calls: good(part) if calls > 1 else 1 / 0, request_of(3), skip=True)
    assert bench.run()[0].tolist() == [100, 101, 102]
    assert bench.recorder.errors == {"ZeroDivisionError": 1}
    assert bench.quarantine.latest == ()


def test_beyond_the_limit_the_error_says_how_many_and_is_from_the_users_own() -> None:
    bench = Bench(fails_on(0, 2, 3), request_of(5), skip=True, max_errors=2)
    with pytest.raises(iw.FetchFailed, match="3 failed, more than may be skipped") as caught:
        bench.run()
    assert type(caught.value.__cause__) is ValueError
    assert bench.dropped == 2
    assert bench.recorder.errors == {"ValueError": 4}, "of the request, and of three rows"


def test_of_a_plain_function_the_call_is_skipped_and_is_no_row() -> None:
    bench = Bench(lambda part, calls: 1 / 0, None, retries=1, skip=True)
    assert bench.run() is None
    assert bench.attempt.is_over
    assert (bench.asked, bench.dropped, bench.recorder.rows) == ([None, None], 0, 0)
    (entry,) = bench.quarantine.latest
    assert (entry.request, entry.epoch, entry.rows, entry.files) == (None, None, (), ())
    assert entry.error == "ZeroDivisionError: division by zero"


def test_a_retried_plain_function_gives_what_it_returns() -> None:
    bench = Bench(lambda part, calls: 1 / 0 if calls < 3 else ["anything"], None, retries=2)
    assert bench.run() == ["anything"]
    assert bench.attempt.is_over


@pytest.mark.parametrize("what", ["the wait", "the run"])
def test_what_was_not_come_to_an_end_can_be_gone_on_with(what: str) -> None:
    bench = Bench(
        lambda part, calls: good(part) if calls > 1 else 1 / 0, request_of(3), retries=5, backoff_s=600.0, max_backoff_s=600.0
    )
    bench.attempt.failed(ZeroDivisionError(), bench.fetcher)
    ended: list[float] = []

    def idle(seconds: float) -> bool:
        ended.append(seconds)
        return True

    for _ in range(3):
        assert bench.go_on(idle, lambda: what != "the run") is None
        assert not bench.attempt.is_over
    assert bench.asked == [], "nothing is called while it waits"
    assert len(ended) == (3 if what == "the wait" else 0)
    assert all(290 < wait <= 600 for wait in ended)
    assert bench.go_on()[0].tolist() == [100, 101, 102]
    assert bench.attempt.is_over


def test_another_fetcher_can_take_over_in_the_midst_of_the_rows() -> None:
    """As when a call hangs: the rows that came stay, the one that hangs is skipped, and the chunk is weighed."""
    bench = Bench(lambda part, calls: good(part), request_of(3), skip=True)
    bench.attempt.failed(ValueError("on the whole"), bench.fetcher)
    left = [2]

    def go_on() -> bool:
        left[0] -= 1
        return left[0] >= 0

    assert bench.go_on(go_on=go_on) is None
    bench.fetcher, check = Fetcher(FetcherRecorder(2)), ChunkCheck(bench.check._book)
    bench.attempt.failed(iw.FetchTimeout("row 102 hangs"), bench.fetcher)
    arrays = bench.go_on(check=check)
    assert arrays[0].tolist() == [100, 101]
    assert check.rows_of(arrays, None) == 2
    assert check.row_nbytes == 16


class Reported(Bench):
    """An attempt in a worker process, which dies in a call: the parent has its reports, and another process its state."""

    def __init__(self, *arguments: Any, **policy: Any) -> None:
        super().__init__(*arguments, **policy)
        self.parent = Attempt(self.policy, self.request)

    def begin_call(self, request: Any) -> None:
        self.report()
        self.fetcher.begin_call(request)

    def end_call(self, failed: bool = False) -> bool:
        return self.fetcher.end_call(failed)

    def count_error(self, name: str) -> None:
        self.fetcher.count_error(name)

    def report(self) -> None:
        of, skipped = self.attempt, self.attempt.take_skipped()
        self.parent.add_report(AttemptReport(of.row, of.is_split, of.is_together, of.tries, skipped, [], True))

    def go_on(self, *arguments: Any, **more: Any) -> Any:
        return self.attempt.run(self.call, self.check, self, self.pause, lambda: True)

    def hang(self) -> None:
        """The call that was reported last hangs: the parent decides, and another process goes on."""
        self.parent.rewind()
        self.parent.failed(iw.FetchTimeout("hangs"), self.fetcher)
        if not self.parent.is_over:
            state = AttemptState(*pickle.loads(pickle.dumps(self.parent.state)))
            self.attempt = Attempt(self.policy, request_of(self.attempt._size), state)


class Hang(BaseException):
    """Stands for the end of the process."""


@given(
    count=st.integers(1, 8),
    bad=st.sets(st.integers(0, 7)),
    hangs=st.sets(st.integers(0, 7)),
    kept=st.one_of(st.none(), st.sets(st.integers(0, 7), min_size=1)),
    retries=st.integers(0, 2),
    named=st.booleans(),
)
def test_another_process_goes_on_from_the_reports_of_one_that_hung(
    count: int, bad: set[int], hangs: set[int], kept: set[int] | None, retries: int, named: bool
) -> None:
    kept = {row for row in kept if row < count} or {0} if kept is not None else None
    fails = fails_on(*bad, named=named)

    def fetch(part: Any, calls: int) -> Any:
        assert calls < 500, "for ever"
        if any(row - FIRST_ROW in hangs for row in part.rows):
            raise Hang
        return fails(part, calls)

    wanted = request_of(count, None if kept is None else sorted(kept))
    bench = Reported(fetch, wanted, retries=retries, skip=True, backoff_s=0.0)
    bench.attempt = Attempt(bench.policy, request_of(count))  # the process does not know what an earlier run has delivered
    arrays: Any = None
    for first in (True, *[False] * 60):
        try:
            arrays = bench.run() if first else bench.go_on()
            break
        except Hang:
            bench.hang()
            if bench.parent.is_over:
                break
    else:
        pytest.fail("for ever")
    if not bench.parent.is_over:
        bench.report()
    arrays = bench.parent.keep(arrays, [0, 0]) if arrays else ()
    everything = set(range(count)) if kept is None else kept
    left = sorted(everything - bad - hangs)
    assert (arrays[0].tolist() if arrays else []) == [row + FIRST_ROW for row in left]
    assert sorted(row for each in bench.parent.take_skipped() for row in each.rows) == sorted(everything & (bad | hangs))


def test_a_report_of_a_call_of_a_plain_function_that_was_skipped() -> None:
    parent = Attempt(iw.ErrorPolicy(skip=True), None)
    skipped = [((), "ValueError: bad", ValueError("bad"))]
    parent.add_report(AttemptReport(0, False, False, 0, skipped, [("ValueError", 1.0, 1.1)], False))
    assert [type(each) for each in parent.take_skipped()] == [Skipped]
    assert parent.take_skipped() == []


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [">i2", "<f4", np.dtype({"names": ["a", "b"], "formats": [">i2", "<f4"], "offsets": [0, 8]})])
def test_rows_that_are_joined_keep_their_dtype(dtype: Any, axis: int) -> None:
    def fetch(part: Any, calls: int) -> Any:
        if 101 in part.rows:
            raise ValueError("bad")
        rows = np.zeros((2, len(part.rows)) if axis else (len(part.rows), 2), dtype)
        return [rows, rows]

    arrays = Bench(fetch, request_of(4), axis=axis, skip=True).run()
    assert [(array.dtype, array.shape) for array in arrays] == [(np.dtype(dtype), (2, 3) if axis else (3, 2))] * 2


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_kept_rows_are_taken_along_each_inputs_batch_axis(axis: int) -> None:
    array = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    (kept,) = keep_rows([array], np.array([0, 2]), [axis])
    assert kept.tobytes() == np.take(array, [0, 2], axis).tobytes()
    kept[:] = -1
    assert (array >= 0).all(), "a copy"
