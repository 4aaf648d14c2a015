"""What worker processes time, and the processor time that they take: counted once each, whatever becomes of the worker."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fetchers.shared_between import HANG_SECONDS, CertifiedRows, FileCounter
from gates import register

import input_workers as iw
from input_workers.metrics.histogram import MOST_PARTS, Histogram
from input_workers.metrics.instruments import INSTRUMENTS

LARGE = 4096  # values of a row that goes through a block


def drain(coordinator: iw.GlobalCoordinator, source: Any) -> iw.SourceStats:
    """Train to the end of the data; return the numbers of the source after it."""
    coordinator.start()
    for _ in source:
        pass
    assert coordinator.stop(HANG_SECONDS)
    stats: iw.SourceStats = source.stats()
    return stats


def counts(stats: iw.SourceStats) -> dict[str, int]:
    return {name: part.count for name, part in stats.fetch_parts.items()}


def function(calls: int, width: int, slow_every: int = 0) -> Any:
    """Return a plain function of so many calls for each worker, then the end, which is timed too."""
    made: list[int] = []

    def fetch(worker_id: int, batch_size: int) -> Any:
        made.append(1)
        with iw.timed("read"):
            if len(made) > calls:
                raise iw.EndOfData
            if slow_every and len(made) % slow_every == 0:
                time.sleep(0.02)
        with iw.timed("decode"):
            return [np.zeros((2, width), np.float32), np.zeros(2)]

    return fetch


@pytest.mark.parametrize("width", [1, LARGE], ids=["packed", "in blocks"])
@pytest.mark.parametrize("start", ["forkserver", "spawn"])
def test_each_part_of_each_call_is_counted_once(coordinator: iw.GlobalCoordinator, start: Any, width: int) -> None:
    source = register(coordinator, function(300, width), num_workers=2, fetchers=iw.Processes(start=start))
    assert counts(drain(coordinator, source)) == {"read": 602, "decode": 600}


def test_rows_that_another_thread_sends_while_a_call_is_slow_lose_no_part(coordinator: iw.GlobalCoordinator) -> None:
    source = register(coordinator, function(200, 1, slow_every=10), fetchers="process")
    stats = drain(coordinator, source)
    assert counts(stats) == {"read": 201, "decode": 200}
    assert stats.fetch_parts["read"].seconds > 20 * 0.02


def test_counts_go_on_over_runs(coordinator: iw.GlobalCoordinator) -> None:
    source = register(coordinator, function(50, LARGE), fetchers="process")
    for run in (1, 2, 3):
        assert counts(drain(coordinator, source)) == {"read": 51 * run, "decode": 50 * run}


def test_the_slowest_part_and_the_metric_are_those_of_the_workers(coordinator: iw.GlobalCoordinator) -> None:
    def slow(worker_id: int, batch_size: int) -> Any:
        with iw.timed("decode"):
            time.sleep(0.01)
        with iw.timed("read"):
            return [np.zeros((4, LARGE), np.float32), np.zeros(4)]

    source = register(coordinator, slow, fetchers="process")
    coordinator.start()
    for _ in range(40):
        source.next_batch()
    stats = source.stats()
    assert stats.verdict == "fetch"
    assert stats.verdict_text.endswith("slowest part: decode")
    instrument = next(each for each in INSTRUMENTS if each.name == "input_workers_fetch_part_seconds")
    samples = dict(instrument.read(stats, ""))
    assert samples["decode",].seconds == pytest.approx(stats.fetch.seconds, rel=0.2)  # type: ignore[union-attr]
    assert stats.fetch_parts["decode"].count == stats.fetch_parts["read"].count >= 40


def test_a_function_that_times_nothing_has_no_parts(coordinator: iw.GlobalCoordinator) -> None:
    source = register(coordinator, iw.Stream(CertifiedRows(50, width=LARGE)), fetchers="process")
    assert counts(drain(coordinator, source)) == {}


def test_names_beyond_the_bound_are_one(coordinator: iw.GlobalCoordinator) -> None:
    def prepare(request: Any) -> None:
        for number in range(40):
            with iw.timed(f"part {number}"):
                pass

    source = register(coordinator, iw.Stream(CertifiedRows(40, prepare), rows_per_request=2), num_workers=2, fetchers="process")
    found = counts(drain(coordinator, source))
    assert len(found) == MOST_PARTS + 1
    assert sum(found.values()) == 20 * 40


@pytest.mark.parametrize("ordered", [False, True])
def test_a_worker_that_dies_takes_only_the_parts_of_the_call_that_it_had_not_answered(
    coordinator: iw.GlobalCoordinator, tmp_path: Path, ordered: bool
) -> None:
    made = FileCounter(tmp_path / "made")

    def dies(request: Any) -> None:
        with iw.timed("read"):
            number = made.add()
        if number in (7, 19):
            os.kill(os.getpid(), signal.SIGKILL)

    stream = iw.Stream(CertifiedRows(60, dies, width=LARGE), rows_per_request=2)
    source = register(coordinator, stream, num_workers=2, fetchers="process", ordered=ordered)
    stats = drain(coordinator, source)
    assert stats.fetcher_restarts == 2
    assert made.value == 32
    assert counts(stats) == {"read": 30}
    assert stats.fetch.count == 30


def test_calls_that_fail_and_those_made_in_their_place_tell_their_parts(
    coordinator: iw.GlobalCoordinator, tmp_path: Path
) -> None:
    made = FileCounter(tmp_path / "made")

    def fails(request: Any) -> None:
        with iw.timed("read"):
            if made.add() % 3 == 0:
                raise OSError("no disk")

    stream = iw.Stream(CertifiedRows(60, fails, width=LARGE), rows_per_request=2)
    policy = iw.ErrorPolicy(retries=5, backoff_s=0.001)
    source = register(coordinator, stream, num_workers=2, fetchers="process", on_error=policy)
    stats = drain(coordinator, source)
    assert stats.fetch_errors["OSError"] == made.value - 30 >= 10
    assert counts(stats) == {"read": made.value}


def test_the_processor_time_is_that_of_the_workers(coordinator: iw.GlobalCoordinator) -> None:
    def burns(request: Any) -> None:
        until = time.process_time() + 0.01
        while time.process_time() < until:
            pass

    stream = iw.Stream(CertifiedRows(80, burns, width=LARGE), rows_per_request=2)
    source = register(coordinator, stream, num_workers=2, fetchers="process")
    drain(coordinator, source)
    used = source._core.recorder.read(time.monotonic()).fetch_cpu
    assert 0.4 <= used < 0.8, "40 calls of 10 ms, and what hands their rows over"
    assert source.stats().windows["run"].fetcher_cores > 0.2


def test_a_histogram_adds_what_another_took_without_counting_it_twice() -> None:
    here, there = Histogram(), Histogram()
    total = 0
    for count in (3, 0, 300, 2000, 1):
        for _ in range(count):
            there.observe(0.002)
        total += count
        here.add(there.take())
        assert sum(here.read()[0]) == total
        assert here.read()[1] == pytest.approx(0.002 * total)
        assert sum(there.read()[0]) == 0
    assert len(here.samples) < 300
