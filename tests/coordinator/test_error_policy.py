"""What an ErrorPolicy makes of failing calls, end to end: rows, ledger, counts, and who is told what."""

from __future__ import annotations

import collections
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gates import HANG_SECONDS, Gate, await_true, register
from hypothesis import given, settings
from hypothesis import strategies as st

import input_workers as iw

SKIP = iw.ErrorPolicy(skip=True)


class Failing:
    """A source whose rows fail for ever, or for the first so many tries; it may name them, and uses its memory again."""

    def __init__(self, rows: int, bad: Any = (), transient: dict[int, int] | None = None, names: bool = False) -> None:
        self.rows, self.bad, self.names = rows, set(bad), names
        self.transient = dict(transient or {})
        self.error: Callable[[], BaseException] = lambda: OSError("cannot be read")
        self.asked: collections.Counter[int] = collections.Counter()
        self._lock = threading.Lock()
        self._mine = threading.local()

    def __len__(self) -> int:
        return self.rows

    def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
        bad = []
        with self._lock:
            for row in rows.tolist():
                self.asked[row] += 1
                if row in self.bad:
                    bad.append(row)
                elif self.transient.get(row):
                    self.transient[row] -= 1
                    bad.append(row)
        if bad and self.names:
            raise iw.BadRows(bad) from self.error()
        if bad:
            raise self.error()
        memory = self._mine.__dict__.setdefault("memory", [np.empty(self.rows, np.int64) for _ in range(2)])
        for array in memory:
            array[: len(rows)] = rows
        return [array[: len(rows)] for array in memory]

    def file_of(self, row: int) -> str:
        return f"{row}.jpg"


def read(source: Any) -> list[int]:
    rows = []
    for batch in source:
        assert (batch.data == batch.label).all()
        rows += batch.data[: batch.valid_rows].tolist()
    return rows


def assert_ledger(stats: Any, delivered: int, skipped: int) -> None:
    assert stats.rows_delivered == delivered
    assert stats.rows_dropped["skipped_error"] == skipped
    assert stats.rows_fetched == stats.rows_delivered + sum(stats.rows_dropped.values())


@settings(max_examples=80)
@given(st.data())
def test_what_is_delivered_and_what_is_skipped_are_everything_once(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 40), "rows")
    bad = data.draw(st.sets(st.integers(0, rows - 1), max_size=rows), "bad for ever")
    retries = data.draw(st.integers(0, 2), "retries")
    transient = data.draw(st.dictionaries(st.integers(0, rows - 1), st.integers(1, 3), max_size=5), "bad at first")
    named = data.draw(st.booleans(), "named")
    ordered = data.draw(st.booleans(), "ordered")
    epochs = data.draw(st.integers(1, 2), "epochs")
    last = data.draw(st.sampled_from(["drop", "keep", "pad"]), "last_batch")
    batch = data.draw(st.integers(1, 7), "batch_size")
    epoch_end = data.draw(st.sampled_from(["run_on", "break"]), "epoch_end")
    source = Failing(rows, bad, transient, named)
    coordinator = iw.GlobalCoordinator()
    handle = register(
        coordinator,
        iw.Stream(source, data.draw(st.booleans(), "shuffle"), 3, epochs, epoch_end=epoch_end,
                  rows_per_request=data.draw(st.one_of(st.none(), st.integers(1, 9)), "rows_per_request")),
        batch, num_workers=data.draw(st.sampled_from([0, 1, 4]), "workers"), ordered=ordered, last_batch=last,
        on_error=iw.ErrorPolicy(retries=retries, backoff_s=0.0, skip=True),
        max_buffered_batches=data.draw(st.integers(1, 3), "max_buffered_batches"),
    )  # fmt: skip
    with coordinator:
        came = [row for _ in range(epochs if epoch_end == "break" else 1) for row in read(handle)]
        assert read(handle) == []
        stats = handle.stats()
    skipped = [row for each in stats.quarantine for row in each.rows]
    everything = collections.Counter([*range(rows)] * epochs)
    lost = everything - collections.Counter(came) - collections.Counter(skipped)
    assert collections.Counter(came) + collections.Counter(skipped) + lost == everything
    assert sum(lost.values()) == stats.rows_dropped["final_partial"]
    assert sum(lost.values()) < batch * (epochs if epoch_end == "break" else 1) if last == "drop" else not lost
    assert collections.Counter(skipped) >= collections.Counter(dict.fromkeys(bad, epochs))
    assert set(skipped) <= bad | set(transient)
    assert_ledger(stats, len(came), len(skipped))


def test_the_default_raises_the_first_error(coordinator: iw.GlobalCoordinator) -> None:
    source = Failing(20, [7])
    handle = register(coordinator, iw.Stream(source), 4)
    coordinator.start()
    assert handle.next_batch().data.tolist() == [0, 1, 2, 3]
    with pytest.raises(iw.FetchFailed, match="request 1: OSError: cannot be read"):
        handle.next_batch()
    assert source.asked[7] == 1
    assert handle.stats().quarantine == ()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("enough", [True, False])
def test_retries_of_a_plain_function(coordinator: iw.GlobalCoordinator, workers: int, enough: bool) -> None:
    calls = [0]

    def fetch(worker_id: int, batch_size: int) -> Any:
        calls[0] += 1
        if calls[0] > 8:
            raise iw.EndOfData
        if calls[0] in (3, 4, 7):
            raise TimeoutError(f"call {calls[0]}")
        return [np.full(4, calls[0])] * 2

    policy = iw.ErrorPolicy(retries=2 if enough else 1, backoff_s=0.001)
    handle = register(coordinator, fetch, 4, num_workers=workers, on_error=policy)
    coordinator.start()
    if enough:
        assert [batch.data[0] for batch in handle] == [1, 2, 5, 6, 8]
        assert handle.stats().fetch_errors == {"TimeoutError": 3}
    else:
        assert [handle.next_batch().data[0] for _ in range(2)] == [1, 2]
        with pytest.raises(iw.FetchFailed, match="TimeoutError: call 4") as caught:
            handle.next_batch()
        assert "tried 2 times" in caught.value.__cause__.__notes__  # type: ignore[union-attr]
        assert handle.stats().fetch_errors == {"TimeoutError": 2}


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt("in a fetcher"), iw.SpecMismatch("no chunk")])
@pytest.mark.parametrize("stream", [True, False])
def test_what_is_never_retried_or_skipped(coordinator: iw.GlobalCoordinator, error: BaseException, stream: bool) -> None:
    source = Failing(20, [5])
    source.error = lambda: error
    calls = [0]

    def fetch(worker_id: int, batch_size: int) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise error
        return [np.arange(4)] * 2

    policy = iw.ErrorPolicy(retries=3, backoff_s=0.001, skip=True)
    handle = register(coordinator, iw.Stream(source) if stream else fetch, 4, on_error=policy)
    coordinator.start()
    handle.next_batch()
    with pytest.raises(iw.FetchFailed) as caught:
        handle.next_batch()
    assert caught.value.__cause__ is error
    assert handle.stats().fetch_errors == {type(error).__name__: 1}
    assert source.asked[5] == 1 if stream else calls[0] == 2
    assert handle.stats().quarantine == ()


@pytest.mark.parametrize("policy", [SKIP, iw.ErrorPolicy(retries=2, backoff_s=0.0), iw.ErrorPolicy()])
def test_a_failure_of_a_source_that_the_function_reads_is_the_cause_like_any_other(
    coordinator: iw.GlobalCoordinator, policy: iw.ErrorPolicy
) -> None:
    inner = iw.FetchFailed("the inner source")
    inner.__cause__ = ValueError("its own")

    def fetch(worker_id: int, batch_size: int) -> Any:
        raise inner

    if policy.skip:
        policy = iw.ErrorPolicy(skip=True, max_errors=0)
    handle = register(coordinator, fetch, on_error=policy)
    coordinator.start()
    with pytest.raises(iw.FetchFailed) as caught:
        handle.next_batch()
    assert caught.value.__cause__ is inner
    assert type(caught.value) is iw.FetchFailed
    assert "FetchFailed: the inner source" in str(caught.value)
    assert set(handle.stats().fetch_errors) == {"FetchFailed"}


def test_a_stop_wakes_who_waits_before_a_retry(coordinator: iw.GlobalCoordinator) -> None:
    policy = iw.ErrorPolicy(retries=3, backoff_s=100.0, max_backoff_s=100.0)
    handle = register(coordinator, iw.Stream(Failing(20, [5])), 4, num_workers=3, on_error=policy, fetch_timeout_s=0.05)
    coordinator.start()
    handle.next_batch()
    await_true(lambda: handle.stats().fetch_errors == {"OSError": 1}, "it waits")
    with pytest.raises(iw.WaitTimeout):  # noqa: PT012
        while True:  # four times as long as a call may take: a wait is no call
            handle.next_batch(0.2)
    started = time.monotonic()
    assert coordinator.stop()
    assert time.monotonic() - started < 5 * 0.5
    assert coordinator.last_stop.failures == {}
    stats = handle.stats()
    assert stats.fetch_errors == {"OSError": 1}
    assert stats.fetcher_busy_seconds < 1.0, "waiting is not fetching"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_without_workers_a_timeout_amid_the_retries_loses_nothing(
    coordinator: iw.GlobalCoordinator, stream: bool, ordered: bool
) -> None:
    source = Failing(12, (), {3: 2, 8: 1})
    calls = [0]

    def fetch(worker_id: int, batch_size: int) -> Any:
        calls[0] += 1
        if calls[0] in (2, 3, 6):
            raise OSError("not now")
        if calls[0] > 6:
            raise iw.EndOfData
        return [np.full(4, calls[0])] * 2

    policy = iw.ErrorPolicy(retries=2, backoff_s=0.02)
    more = {"ordered": ordered} if stream else {}
    handle = register(coordinator, iw.Stream(source, rows_per_request=2, epoch_end="break") if stream else fetch, 4,
                      num_workers=0, on_error=policy, **more)  # fmt: skip
    coordinator.start()
    rows, timeouts, deadline = [], 0, time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline:
        try:
            rows += handle.next_batch(0.001).data.tolist()
        except iw.WaitTimeout:
            timeouts += 1
        except iw.EndOfData:
            break
    assert rows == ([*range(12)] if stream else [1] * 4 + [4] * 4 + [5] * 4)
    assert timeouts > 0
    assert handle.stats().fetch_errors == {"OSError": 3}


def test_without_workers_ctrl_c_amid_the_retries_loses_nothing(coordinator: iw.GlobalCoordinator) -> None:
    source = Failing(12)
    calls = [0]

    def fetch(rows: Any, request: iw.FetchRequest) -> Any:
        calls[0] += 1
        if calls[0] in (2, 3, 5):
            raise KeyboardInterrupt if calls[0] == 3 else OSError("not now")
        return [rows.copy(), rows.copy()]

    source.fetch = fetch  # type: ignore[method-assign]
    handle = register(coordinator, iw.Stream(source), 4, num_workers=0, on_error=iw.ErrorPolicy(retries=1, backoff_s=0.0))
    coordinator.start()
    assert handle.next_batch().data.tolist() == [0, 1, 2, 3]
    with pytest.raises(KeyboardInterrupt):
        handle.next_batch()
    assert read(handle) == [*range(4, 12)]


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("most", [0, 3])
def test_exactly_as_many_rows_as_the_limit_says_are_skipped(
    coordinator: iw.GlobalCoordinator, most: int, named: bool, workers: int
) -> None:
    for bad in (most, most + 1):
        source = Failing(64, [*range(9, 60, 13)][:bad], names=named)
        handle = register(coordinator, iw.Stream(source, rows_per_request=8), 4, name=f"with {bad}", num_workers=workers,
                          last_batch="keep", on_error=iw.ErrorPolicy(skip=True, max_errors=most))  # fmt: skip
        coordinator.start()
        if bad == most:
            assert sorted(read(handle)) == sorted(set(range(64)) - source.bad)
            assert_ledger(handle.stats(), 64 - most, most)
        else:
            with pytest.raises(
                iw.FetchFailed, match=rf"{bad} failed, more than may be skipped \(max_errors: {most}\)"
            ) as caught:
                read(handle)
            cause = caught.value.__cause__
            assert type(cause) is (iw.BadRows if named else OSError)
            assert type(cause.__cause__ if named and cause else cause) is OSError
            assert handle.stats().rows_dropped["skipped_error"] == most
            assert any(note.startswith("request: ") for note in caught.value.__notes__)


@pytest.mark.parametrize(("every", "passes"), [(101, True), (100, True), (99, False)])
@pytest.mark.parametrize("stream", [True, False])
def test_a_share_just_under_at_and_over(coordinator: iw.GlobalCoordinator, every: int, passes: bool, stream: bool) -> None:
    """One worker; row, or call, number every - 1 of each `every` fails; a hundredth may."""
    count = 20 * every
    source = Failing(count, range(every - 1, count, every))
    calls = [0]

    def fetch(worker_id: int, batch_size: int) -> Any:
        calls[0] += 1
        if calls[0] > count:
            raise iw.EndOfData
        if calls[0] % every == 0:
            raise OSError("cannot be read")
        return [np.full(1, calls[0] - 1)] * 2

    policy = iw.ErrorPolicy(skip=True, max_errors=0.01)
    handle = register(coordinator, iw.Stream(source, rows_per_request=1) if stream else fetch, 1, on_error=policy)
    coordinator.start()
    if passes:
        assert read(handle) == [row for row in range(count) if row not in source.bad]
        assert len(handle.stats().quarantine) == 20
    else:
        with pytest.raises(iw.FetchFailed, match=r"2 failed, more than may be skipped \(max_errors: 1\.00% of 198 tried\)"):
            read(handle)


def test_the_first_hundred_calls_are_on_probation(coordinator: iw.GlobalCoordinator) -> None:
    source = Failing(1000, [*range(60), 300])
    policy = iw.ErrorPolicy(skip=True, max_errors=0.01)
    handle = register(coordinator, iw.Stream(source, rows_per_request=1), 1, on_error=policy)
    coordinator.start()
    assert handle.next_batch().data.tolist() == [60]
    with pytest.raises(iw.FetchFailed, match=r"61 failed, more than may be skipped \(max_errors: 1\.00% of 301 tried\)"):
        read(handle)


BAD_REQUESTS: dict[str, tuple[set[int], list[list[int]]]] = {
    "all of one": ({4, 5, 6, 7}, [[0, 1, 2, 3, 8, 9]] * 2),
    "the first": ({0, 1, 2, 3}, [[4, 5, 6, 7, 8, 9]] * 2),
    "the last": ({8, 9}, [[0, 1, 2, 3, 4, 5, 6, 7]] * 2),
    "first and last": ({0, 1, 2, 3, 8, 9}, [[4, 5, 6, 7]] * 2),
    "all of all": (set(range(10)), [[]] * 2),
    "all but one": (set(range(10)) - {6}, [[6]] * 2),
}


@pytest.mark.parametrize("workers", [0, 1, 5])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("what", BAD_REQUESTS)
def test_requests_that_are_wholly_bad_have_had_their_turn(
    coordinator: iw.GlobalCoordinator, what: str, named: bool, ordered: bool, workers: int
) -> None:
    bad, wanted = BAD_REQUESTS[what]
    source = Failing(10, bad, names=named)
    stream = iw.Stream(source, epochs=2, rows_per_request=4, epoch_end="break")
    handle = register(coordinator, stream, 3, num_workers=workers, ordered=ordered, last_batch="keep", on_error=SKIP,
                      max_buffered_batches=1)  # fmt: skip
    coordinator.start()
    came = [read(handle) for _ in range(3)]
    assert [rows if ordered else sorted(rows) for rows in came] == [*wanted, []]
    assert_ledger(handle.stats(), sum(map(len, wanted)), 2 * len(bad))


def test_a_failed_call_of_a_plain_function_is_no_row(coordinator: iw.GlobalCoordinator) -> None:
    gate = Gate()
    handle = register(coordinator, gate, 4, on_error=iw.ErrorPolicy(skip=True, max_errors=2))
    coordinator.start()
    for number in range(2):
        gate.release(4)
        gate.raise_in(ValueError(f"number {number}"))
        assert handle.next_batch().valid_rows == 4
    gate.await_calls()
    stats = handle.stats()
    assert (stats.rows_fetched, stats.rows_dropped["skipped_error"]) == (8, 0)
    assert stats.fetch_errors == {"ValueError": 2}
    assert [(each.request, each.rows, each.error) for each in stats.quarantine] == [
        (None, (), "ValueError: number 0"), (None, (), "ValueError: number 1"),
    ]  # fmt: skip
    error = ValueError("number 2")
    gate.raise_in(error)
    with pytest.raises(iw.FetchFailed, match=r"3 failed, more than may be skipped .*: ValueError: number 2") as caught:
        handle.next_batch()
    assert caught.value.__cause__ is error
    assert handle.stats().fetch_errors == {"ValueError": 3}


def test_the_quarantine_says_who_what_and_why_in_stats_and_in_the_file(
    coordinator: iw.GlobalCoordinator, tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    source = Failing(40, [5, 6, 21])
    handle = register(coordinator, iw.Stream(source, epochs=2, rows_per_request=8), 4,
                      on_error=iw.ErrorPolicy(skip=True, quarantine=path))  # fmt: skip
    coordinator.start()
    read(handle)
    wanted = [(index, index // 5, (row,), (f"{row}.jpg",)) for index, row in ((0, 5), (0, 6), (2, 21), (5, 5), (5, 6), (7, 21))]
    entries = handle.stats().quarantine
    assert [(each.request, each.epoch, each.rows, each.files) for each in entries] == wanted
    assert {each.error for each in entries} == {"OSError: cannot be read"}
    assert handle.stats().fetch_errors == {"OSError": 4 + 6}, "each failed call: of the request, and of the row alone"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(each["request"], each["epoch"], tuple(each["rows"]), tuple(each["files"])) for each in lines] == wanted
    assert {each["source"] for each in lines} == {"train"}


def test_many_fetchers_write_whole_lines(coordinator: iw.GlobalCoordinator, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    source = Failing(2000, range(0, 2000, 3), names=True)
    handle = register(coordinator, iw.Stream(source, rows_per_request=5), 10, num_workers=8, last_batch="keep",
                      on_error=iw.ErrorPolicy(skip=True, quarantine=str(path)))  # fmt: skip
    coordinator.start()
    assert sorted(read(handle)) == sorted(set(range(2000)) - source.bad)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(row for line in lines for row in line["rows"]) == sorted(source.bad)


@pytest.mark.parametrize("path", ["/nowhere/at/all.jsonl", "/"])
def test_a_quarantine_that_cannot_be_written_is_refused_at_the_start(coordinator: iw.GlobalCoordinator, path: str) -> None:
    register(coordinator, iw.Stream(Failing(8)), on_error=iw.ErrorPolicy(skip=True, quarantine=path))
    with pytest.raises(iw.ConfigError, match=r"quarantine: .*wanted a file that can be written"):
        coordinator.start()


def test_an_error_storm_does_not_flood_the_log(coordinator: iw.GlobalCoordinator, caplog: pytest.LogCaptureFixture) -> None:
    source = Failing(3000, range(2990))
    handle = register(coordinator, iw.Stream(source, rows_per_request=10), 10, num_workers=4, last_batch="keep",
                      on_error=iw.ErrorPolicy(skip=True, quarantine="/dev/full"))  # fmt: skip
    with caplog.at_level(logging.DEBUG, "input_workers"):
        coordinator.start()
        assert sorted(read(handle)) == [*range(2990, 3000)]
    assert len(caplog.records) <= 10
    assert len(handle.stats().quarantine) == 1000
    assert handle.stats().rows_dropped["skipped_error"] == 2990


class Hanging(Failing):
    """Its calls for some rows hang until they are let go; then each does what it is told."""

    def __init__(self, rows: int, hang: Any, times: int = 10**9) -> None:
        super().__init__(rows)
        self.hang, self.times = set(hang), times
        self.release = threading.Event()
        self.late: Callable[[], object] = lambda: None
        self.hung: list[threading.Thread] = []

    def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
        with self._lock:
            hangs = bool(self.hang & set(rows.tolist())) and len(self.hung) < self.times
            if hangs:
                self.hung.append(threading.current_thread())
        if hangs:
            self.release.wait(HANG_SECONDS)
            self.late()
            if request.out is not None:
                for array in request.out:
                    array[:] = -1
                return request.out
        return super().fetch(rows, request)


@pytest.fixture
def hanging() -> Iterator[Callable[..., Hanging]]:
    """Make sources; let go whoever hangs in them in the end."""
    made: list[Hanging] = []

    def make(*arguments: Any) -> Hanging:
        made.append(Hanging(*arguments))
        return made[-1]

    yield make
    for source in made:
        source.release.set()


def raise_exit() -> None:
    raise SystemExit("late")


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("late", ["returns", "raises", "exits"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_thread_that_hangs_is_abandoned_and_its_late_result_discarded(
    coordinator: iw.GlobalCoordinator, hanging: Callable[..., Hanging], workers: int, late: str, ordered: bool
) -> None:
    source = hanging(400, [9])
    if late != "returns":
        source.late = raise_exit if late == "exits" else lambda: 1 / 0
    stream = iw.Stream(source, rows_per_request=4)
    handle = register(coordinator, stream, 4, num_workers=workers, ordered=ordered, last_batch="keep", on_error=SKIP,
                      fetch_timeout_s=0.25, max_buffered_batches=1, device_queue_depth=1)  # fmt: skip
    coordinator.start()
    rows = [row for _ in range(3) for row in handle.next_batch().data.tolist()]
    await_true(lambda: handle.stats().fetcher_restarts == 2, "the call of the request, and of the row alone")
    source.release.set()  # while there is much to come yet, for the trainer does not read
    for thread in source.hung:
        thread.join(HANG_SECONDS)
        assert not thread.is_alive()
    rows += read(handle)
    assert (rows if ordered else sorted(rows)) == [row for row in range(400) if row != 9]
    stats = handle.stats()
    assert_ledger(stats, 399, 1)
    assert stats.rows_fetched == 400, "the late result is not counted"
    assert stats.fetch_errors == {"FetchTimeout": 2}
    (entry,) = stats.quarantine
    assert (entry.rows, entry.error[:13]) == ((9,), "FetchTimeout:")
    assert coordinator.stop()
    assert coordinator.last_stop.failures == {}


def test_rows_that_an_abandoned_fetcher_had_before_the_last_one_hung_are_charged_to_the_bounds(
    coordinator: iw.GlobalCoordinator, hanging: Callable[..., Hanging]
) -> None:
    source = hanging(400, [3])
    handle = register(coordinator, iw.Stream(source, rows_per_request=4), 4, on_error=SKIP, fetch_timeout_s=0.25,
                      max_buffered_batches=4, device_queue_depth=1)  # fmt: skip
    coordinator.start()
    assert handle.next_batch().data.tolist() == [0, 1, 2, 4]
    await_true(lambda: handle.stats().fetcher_blocked_seconds > 0, "the queues are full")
    stats = handle.stats()
    assert stats.queue_depth > 0
    assert stats.queue_bytes == stats.queue_depth * 4 * 16
    source.release.set()


def test_a_hung_call_is_made_again_where_that_is_the_policy(
    coordinator: iw.GlobalCoordinator, hanging: Callable[..., Hanging]
) -> None:
    source = hanging(24, [9], 1)
    policy = iw.ErrorPolicy(retries=1, backoff_s=0.001, skip=True)
    handle = register(coordinator, iw.Stream(source), 4, on_error=policy, fetch_timeout_s=0.25)
    coordinator.start()
    assert read(handle) == [*range(24)]
    assert handle.stats().fetcher_restarts == 1
    assert handle.stats().quarantine == ()


def test_a_stop_names_the_thread_that_was_abandoned(coordinator: iw.GlobalCoordinator, hanging: Callable[..., Hanging]) -> None:
    source = hanging(24, [9])
    handle = register(coordinator, iw.Stream(source), 4, on_error=SKIP, fetch_timeout_s=0.25, last_batch="keep")
    coordinator.start()
    assert sorted(read(handle)) == [row for row in range(24) if row != 9]
    assert handle.stats().fetchers_alive == 0
    assert coordinator.stop(0.1) is False
    assert [each.name for each in coordinator.last_stop.stuck] == ["fetcher-train-0"] * 2
    assert all("self.release.wait" in each.stack for each in coordinator.last_stop.stuck)
    source.release.set()
    assert coordinator.stop(HANG_SECONDS)
    assert coordinator.last_stop.stuck == ()


def test_a_hung_call_of_a_plain_function_is_skipped(coordinator: iw.GlobalCoordinator) -> None:
    release, calls = threading.Event(), [0]
    lock = threading.Lock()

    def fetch(worker_id: int, batch_size: int) -> Any:
        with lock:
            calls[0] += 1
            mine = calls[0]
        if mine == 2:
            release.wait(HANG_SECONDS)
        if mine > 5:
            raise iw.EndOfData
        return [np.full(4, mine)] * 2

    handle = register(coordinator, fetch, 4, on_error=SKIP, fetch_timeout_s=0.25)
    coordinator.start()
    try:
        assert [int(batch.data[0]) for batch in handle] == [1, 3, 4, 5]
    finally:
        release.set()
    assert handle.stats().rows_fetched == 16
    assert (handle.stats().fetcher_restarts, handle.stats().fetch_errors) == (1, {"FetchTimeout": 1})


@pytest.mark.parametrize("policy", [iw.ErrorPolicy(), iw.ErrorPolicy(retries=5, backoff_s=0.0)])
def test_without_skip_a_hung_call_fails_the_source(
    coordinator: iw.GlobalCoordinator, hanging: Callable[..., Hanging], policy: iw.ErrorPolicy
) -> None:
    source = hanging(24, [9])
    handle = register(coordinator, iw.Stream(source), 4, on_error=policy, fetch_timeout_s=0.25)
    coordinator.start()
    with pytest.raises(iw.FetchTimeout, match="request 2: a call has run for over"):
        read(handle)
    assert handle.stats().fetcher_restarts == 0
    source.release.set()


def test_too_many_hung_calls_are_a_failure(coordinator: iw.GlobalCoordinator, hanging: Callable[..., Hanging]) -> None:
    source = hanging(24, [9, 17])
    handle = register(coordinator, iw.Stream(source, rows_per_request=1), 4, on_error=iw.ErrorPolicy(skip=True, max_errors=1),
                      fetch_timeout_s=0.25)  # fmt: skip
    coordinator.start()
    with pytest.raises(iw.FetchFailed, match="2 failed, more than may be skipped") as caught:
        read(handle)
    assert type(caught.value.__cause__) is iw.FetchTimeout
    source.release.set()


@settings(max_examples=40)
@given(st.data())
def test_rows_that_were_skipped_do_not_come_back_and_all_others_come(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 40), "rows")
    bad = data.draw(st.sets(st.integers(0, rows - 1), max_size=12), "bad")
    named, ordered = data.draw(st.booleans(), "named"), data.draw(st.booleans(), "ordered")
    per_request = data.draw(st.integers(1, 9), "rows_per_request")
    came: list[int] = []
    state: Any = None
    source = Failing(rows, bad, names=named)
    for part in range(4):
        coordinator = iw.GlobalCoordinator()
        handle = register(
            coordinator, iw.Stream(source, True, 5, 2, rows_per_request=per_request), data.draw(st.integers(1, 5), "batch"),
            num_workers=data.draw(st.sampled_from([0, 1, 3]), "workers"), ordered=ordered, last_batch="keep", on_error=SKIP,
        )  # fmt: skip
        if state is not None:
            handle.load_state_dict(state)
        with coordinator:
            for _ in range(data.draw(st.integers(0, 6), "batches") if part < 3 else 10**9):
                try:
                    came += handle.next_batch().data.tolist()
                except iw.EndOfData:
                    break
            state = json.loads(json.dumps(handle.state_dict()))
    assert collections.Counter(came) == collections.Counter({row: 2 for row in range(rows) if row not in bad})
    source.bad = set()  # the data are repaired: what was skipped stays skipped
    coordinator = iw.GlobalCoordinator()
    handle = register(
        coordinator, iw.Stream(source, True, 5, 2, rows_per_request=per_request), on_error=SKIP, last_batch="keep"
    )
    handle.load_state_dict(state)
    with coordinator:
        assert read(handle) == []


def test_rows_skipped_in_a_request_that_was_delivered_in_part_stay_skipped(coordinator: iw.GlobalCoordinator) -> None:
    source = Failing(16, [1, 2, 6])
    handle = register(coordinator, iw.Stream(source, rows_per_request=8), 3, on_error=SKIP, last_batch="keep")
    coordinator.start()
    assert handle.next_batch().data.tolist() == [0, 3, 4]
    state = handle.state_dict()
    coordinator.stop()
    source.bad = {6}
    again = iw.GlobalCoordinator()
    handle = register(again, iw.Stream(source, rows_per_request=8), 3, on_error=SKIP, last_batch="keep")
    handle.load_state_dict(state)
    with again:
        assert read(handle) == [5, *range(7, 16)]
        assert_ledger(handle.stats(), 10, 1)


def test_memory_is_not_lent_for_parts_of_every_size(coordinator: iw.GlobalCoordinator) -> None:
    """What each size keeps would add up to many times a request."""
    lent: set[int] = set()

    class Parts(Failing):
        def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
            if request.out is not None:
                lent.add(len(rows))
            return super().fetch(rows, request)

    bad = [row for request in range(1, 20) for row in range(20 * request, 20 * request + request)]
    source = Parts(400, bad, names=True)
    handle = register(coordinator, iw.Stream(source, rows_per_request=20), on_error=SKIP, last_batch="keep")
    coordinator.start()
    assert read(handle) == [row for row in range(400) if row not in source.bad]
    assert 20 in lent, "the usual size"
    assert len(lent) <= 4
