"""Fetchers that are added and released while they work: nothing is lost, nothing comes twice, and every end is clean."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
from fetchers.backend_conformance import Scatter, Scattered
from fetchers.wandering import wander
from gates import HANG_SECONDS, register

import input_workers as iw
from input_workers.fetchers.fetcher import Fetcher
from input_workers.fetchers.threads import ThreadFetchers
from input_workers.metrics.fetcher_recorder import FetcherRecorder


class Slow:
    """A source of numbered rows whose calls take a little."""

    def __init__(self, rows: int, seconds: float = 0.0005) -> None:
        self.rows, self.seconds = rows, seconds

    def __len__(self) -> int:
        return self.rows

    def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
        time.sleep(self.seconds)
        return [rows.copy(), request.rng.normal(size=(len(rows), 2))]


class ChangingNumber:
    """What holds for every backend. `most` workers, `rows` of a stream."""

    fetchers: ClassVar[Any]
    most = 12
    rows = 6000
    seconds = 0.001

    def wander(self, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> list[int]:
        return wander(monkeypatch, self.most, seed, self.seconds)

    def register(self, coordinator: iw.GlobalCoordinator, fetch: Any, batch_size: int = 4, **more: Any) -> Any:
        return register(coordinator, fetch, batch_size, fetchers=self.fetchers, num_workers="auto", **more)

    @pytest.mark.parametrize("ordered", [False, True])
    @pytest.mark.parametrize("epoch_end", ["run_on", "break"])
    def test_every_row_of_a_stream_comes_exactly_once_in_each_epoch(
        self, coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch, ordered: bool, epoch_end: str
    ) -> None:
        wanted = self.wander(monkeypatch)
        stream = iw.Stream(Slow(self.rows), shuffle=True, epochs=2, rows_per_request=7, epoch_end=epoch_end)
        source = self.register(coordinator, stream, 16, ordered=ordered, last_batch="keep")
        coordinator.start()
        epochs: list[list[int]] = [[], []]
        for batch in (batch for _ in range(3) for batch in source):
            epochs[batch.epoch] += batch.data.tolist()
        rows = epochs[0] + epochs[1]
        assert sorted(rows) == sorted(2 * [*range(self.rows)])
        if epoch_end == "break":
            assert [sorted(each) for each in epochs] == 2 * [[*range(self.rows)]]
        assert len(set(wanted)) >= 3, "hardly anything changed, so hardly anything was shown"
        assert source.stats().fetchers_alive == 0

    def test_ordered_the_bits_are_those_of_one_worker(self, monkeypatch: pytest.MonkeyPatch) -> None:
        streams = []
        for workers in (1, "auto"):
            coordinator = iw.GlobalCoordinator()
            self.wander(monkeypatch)
            with Scatter(0, 1) as scatter:
                stream = iw.Stream(Scattered(400, scatter.address), True, 5, 1, rows_per_request=7)
                source = register(
                    coordinator, stream, 8, ordered=True, num_workers=workers, fetchers=self.fetchers, last_batch="keep"
                )
                with coordinator:
                    streams.append([(batch.data.tobytes(), batch.label.tobytes()) for batch in source])
        assert streams[0] == streams[1]

    def test_data_that_a_worker_has_begun_are_read_to_their_end(
        self, coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of plain functions, each worker has data of its own: whoever rests goes on with them."""
        self.wander(monkeypatch)
        source = self.register(coordinator, Own(), 8, last_batch="keep")
        coordinator.start()
        rows = np.concatenate([batch.data for batch in source])
        begun = set(rows[:, 0].tolist())
        assert 1 < len(begun) <= self.most
        assert begun <= set(coordinator.get_worker_ids())
        assert sorted(map(tuple, rows.tolist())) == [(worker, row) for worker in sorted(begun) for row in range(Own.ROWS)]

    def test_a_stop_at_any_moment_is_clean(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for seed in range(5):
            self.wander(monkeypatch, seed)
            coordinator = iw.GlobalCoordinator()
            source = self.register(coordinator, iw.Stream(Slow(10**9), epochs=None, rows_per_request=7), 16)
            coordinator.start()
            for _ in range(5 * seed):
                source.next_batch()
            assert coordinator.stop(HANG_SECONDS)
            stats = source.stats()
            assert stats.rows_in_flight == stats.fetchers_alive == 0
            assert coordinator.last_stop.failures == {}

    def test_a_failure_at_any_moment_is_the_failure(
        self, coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.wander(monkeypatch)
        source = self.register(coordinator, iw.Stream(Fails(self.rows), rows_per_request=7), 7, ordered=True)
        coordinator.start()
        rows: list[int] = []
        with pytest.raises(iw.FetchFailed, match="at 100"):  # noqa: PT012
            while True:
                rows += source.next_batch().data.tolist()
        assert rows == [*range(700)]

    def test_a_second_run_begins_with_as_many_as_the_first_had_and_all_of_its_data_come(
        self, coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.wander(monkeypatch)
        source = self.register(coordinator, iw.Stream(Slow(self.rows // 2), rows_per_request=7), 16, last_batch="keep")
        for _ in range(2):
            coordinator.start()
            assert sorted(row for batch in source for row in batch.data.tolist()) == [*range(self.rows // 2)]
            assert coordinator.stop(HANG_SECONDS)
        assert len(coordinator.get_worker_ids()) <= self.most

    def test_calls_that_fail_are_tried_again_by_whoever_made_them(
        self, coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.wander(monkeypatch)
        policy = iw.ErrorPolicy(retries=1, backoff_s=0.001, skip=True)
        source = self.register(
            coordinator, iw.Stream(BadRow(self.rows), rows_per_request=7), 16, on_error=policy, last_batch="keep"
        )
        coordinator.start()
        rows = sorted(row for batch in source for row in batch.data.tolist())
        assert rows == [row for row in range(self.rows) if row % 700]
        assert source.stats().rows_dropped["skipped_error"] == len(range(0, self.rows, 700))


class TestThreads(ChangingNumber):
    fetchers = iw.Threads(max_workers=12)


class TestProcesses(ChangingNumber):
    fetchers = iw.Processes(max_workers=3)
    most, rows, seconds = 3, 1050, 0.05


class Own:
    """A plain function: every worker has rows of its own, and whoever runs it knows how far it is."""

    ROWS = 200

    def __init__(self) -> None:
        self.at: dict[int, int] = {}

    def __call__(self, worker_id: int, batch_size: int) -> Any:
        row = self.at.get(worker_id, 0)
        if row == self.ROWS:
            raise iw.EndOfData
        self.at[worker_id] = row + 1
        time.sleep(0.0005)
        return [np.array([[worker_id, row]]), np.zeros(1)]


class Fails(Slow):
    def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
        if request.index >= 100:
            raise ValueError(f"at {request.index}")
        return super().fetch(rows, request)


class BadRow(Slow):
    def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
        if any(row % 700 == 0 for row in rows.tolist()):
            raise ValueError("a bad row")
        return super().fetch(rows, request)


class Context:
    """Of the fetchers of a run, the little that their threads look at themselves."""

    source = "train"
    fetch_timeout_s = None

    def __init__(self, told: list[str], has_pending_work: Callable[[], bool]) -> None:
        self._told, self._has_pending_work = told, has_pending_work

    @property
    def has_pending_work(self) -> bool:
        return self._has_pending_work()

    def fail(self, failure: Any, request: Any = None) -> None:
        self._told.append(failure.message)


def fetchers_of(
    recorders: list[FetcherRecorder], resting: list[FetcherRecorder], told: list[str], has_pending_work: Callable[[], bool],
    serve: Callable[[Fetcher], bool], prepare: Callable[[Fetcher], object] = id,
) -> ThreadFetchers:  # fmt: skip
    """Fetchers whose loop is `serve`, which returns whether one is through."""

    class Scripted(ThreadFetchers):
        def serve(self, fetcher: Fetcher) -> bool:
            return serve(fetcher)

        def prepare(self, fetcher: Fetcher) -> None:
            prepare(fetcher)

    return Scripted(Context(told, has_pending_work), recorders, resting, lambda: told.append("end"))  # type: ignore[arg-type]


def no_more_processes(fetcher: Fetcher) -> None:
    raise OSError(11, "no more processes")


@pytest.mark.parametrize("rests", [True, False])
def test_when_no_one_is_left_to_go_on_and_none_can_be_started_the_source_fails_and_ends_once(rests: bool) -> None:
    """The last one ends while another is being started, which fails: one that rests has data that no one would fetch."""
    go_on = threading.Event()
    told: list[str] = []

    def serve(fetcher: Fetcher) -> bool:
        assert go_on.wait(HANG_SECONDS)
        return True

    def prepare(fetcher: Fetcher) -> None:
        go_on.set()
        thread.join(HANG_SECONDS)
        no_more_processes(fetcher)

    resting = [FetcherRecorder(1)] if rests else []
    # A failure closes the assembly, and nothing is left to fetch then.
    fetchers = fetchers_of([FetcherRecorder(0)], resting, told, lambda: not told, serve, prepare)
    fetchers.start()
    ((_, thread),) = fetchers._fetchers.values()
    with pytest.raises(OSError, match="no more processes"):
        fetchers.add(lambda: FetcherRecorder(2))
    assert fetchers.join(time.monotonic() + HANG_SECONDS) == []
    assert told == (["source 'train': no worker can be started", "end"] if rests else ["end"])
    assert not fetchers.add(lambda: FetcherRecorder(3))


def test_one_that_rested_and_cannot_be_started_again_when_it_must_fails_the_source() -> None:
    told: list[str] = []
    recorders, resting = [FetcherRecorder(0)], [FetcherRecorder(1)]
    fetchers = fetchers_of(recorders, resting, told, lambda: not told, lambda fetcher: True, no_more_processes)
    fetchers.start()
    assert fetchers.join(time.monotonic() + HANG_SECONDS) == []
    assert told == ["source 'train', worker 1: it has rested, and cannot be started again", "end"]


def test_the_last_one_is_never_asked_to_rest() -> None:
    go_on = threading.Event()
    recorders = [FetcherRecorder(number) for number in range(3)]
    fetchers = fetchers_of(recorders, [], [], lambda: False, lambda fetcher: go_on.wait(HANG_SECONDS))
    fetchers.start()
    fetchers.release(7)
    assert [each.released for each in fetchers.at_work()] == [False, True, True]
    go_on.set()
    assert fetchers.join(time.monotonic() + HANG_SECONDS) == []


def test_a_thread_that_goes_on_as_another_fetcher_counts_once() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def serve(fetcher: Fetcher) -> bool:
        if fetcher.worker_id == 1:
            begun.set()
            assert go_on.wait(HANG_SECONDS)
        return True

    fetchers = fetchers_of([FetcherRecorder(0)], [FetcherRecorder(1)], [], lambda: not go_on.is_set(), serve)
    fetchers.start()
    assert begun.wait(HANG_SECONDS)
    (second,) = fetchers.at_work()
    assert second.worker_id == 1
    fetchers.release(1)
    assert not second.released, "it is the last one"
    go_on.set()
    assert fetchers.join(time.monotonic() + HANG_SECONDS) == []
