"""The number of workers that "auto" wants, for pipelines of known rates: no real time passes, and what is right is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
from metrics.pipeline_simulator import Pipeline, Simulator

from input_workers.metrics.verdict import HELD, Setting
from input_workers.metrics.worker_count import DECISION_SECONDS, WorkerCount

HOUR = 3600.0


class Drive:
    """Runs a pipeline as long as is said, with as many fetchers as WorkerCount wants.

    Attributes:
        changes: (second, workers), the first one included.
        batches: batches delivered by each second.
    """

    def __init__(self, pipeline: Pipeline, most: int = 128, cores: float = 16.0, least: int = 1, seed: int = 0) -> None:
        self.simulator = Simulator(pipeline, seed)
        self.count = WorkerCount(least)
        self.workers = pipeline.fetchers
        self.changes = [(0.0, self.workers)]
        self.batches: dict[float, float] = {}
        self._most, self._cores = most, cores

    def until(self, moment: float, **changes: float) -> Drive:
        """Go on until this second, after these changes of the pipeline."""
        simulator = self.simulator
        simulator.pipeline = replace(simulator.pipeline, **changes)
        while simulator.now < moment:
            simulator.run_until(simulator.now + DECISION_SECONDS)
            reading = simulator.read()
            self.batches[simulator.now] = reading.batches
            setting = Setting(workers=self.workers, cores=self._cores, held_by="")
            wanted = self.count.next(reading, self.workers, not simulator.fresh, self._most, "max_workers", setting)
            if wanted != self.workers:
                self.workers = wanted
                simulator.resize(wanted)
                self.changes.append((simulator.now, wanted))
        return self

    def rate(self, begin: float, end: float) -> float:
        """Return the batches/s between two seconds."""
        return (self.batches[end] - self.batches[begin]) / (end - begin)

    def seen(self, begin: float, end: float) -> set[int]:
        """Return which numbers there were between two seconds."""
        before = [workers for second, workers in self.changes if second <= begin]
        return {before[-1], *(workers for second, workers in self.changes if begin < second <= end)}


@pytest.mark.parametrize("fetch_s", [0.24, 0.48, 0.96])
@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_work_that_waits_gets_the_48_workers_that_it_needs_within_20_seconds(fetch_s: float, jitter: float) -> None:
    drive = Drive(Pipeline(fetch_s=fetch_s, train_s=fetch_s / 48, jitter=jitter)).until(40.0)
    assert drive.rate(20.0, 40.0) >= 0.95 * 48 / fetch_s
    assert 46 <= drive.workers <= 60


# What a trainer needs: mean of a call / mean of a step.
@pytest.mark.parametrize("needed", [0.4, 1.0, 2.5, 12.0])
@pytest.mark.parametrize("jitter", [0.0, 0.9])
@pytest.mark.parametrize("begin", [1, 30])
def test_within_an_hour_it_settles(needed: float, jitter: float, begin: int) -> None:
    train_s = 0.4
    pipeline = Pipeline(fetchers=begin, fetch_s=needed * train_s, train_s=train_s, jitter=jitter)
    drive = Drive(pipeline).until(HOUR)
    assert drive.rate(120.0, HOUR) >= 0.95 / train_s
    late = drive.seen(600.0, HOUR)
    assert min(late) >= needed - 1
    assert max(late) <= 1.25 * needed + 2
    assert len(drive.changes) <= 16, drive.changes
    assert len([second for second, _ in drive.changes if second > HOUR / 2]) <= 3, drive.changes


@pytest.mark.parametrize(
    ("what", "needed"),
    [({"train_s": 0.1}, 20.0), ({"train_s": 0.8}, 2.5), ({"fetch_s": 0.5}, 2.5), ({"fetch_s": 6.0}, 30.0)],
)
@pytest.mark.parametrize("jitter", [0.0, 0.5])
def test_after_a_step_of_either_rate_it_finds_the_new_number_and_settles(
    what: dict[str, float], needed: float, jitter: float
) -> None:
    drive = Drive(Pipeline(fetch_s=2.0, train_s=0.2, jitter=jitter)).until(300.0)
    assert 9 <= drive.workers <= 14
    drive.until(HOUR, **what)
    assert drive.rate(900.0, HOUR) >= 0.95 / drive.simulator.pipeline.train_s
    late = drive.seen(1200.0, HOUR)
    assert min(late) >= needed - 1
    assert max(late) <= 1.25 * needed + 3
    assert len([second for second, _ in drive.changes if second > HOUR / 2]) <= 5, drive.changes


@pytest.mark.parametrize("cores", [1.0, 1.5, 4.0, 16.0])
def test_work_that_computes_gets_no_more_workers_than_cores(cores: float) -> None:
    drive = Drive(Pipeline(fetchers=1, fetch_s=0.4, train_s=0.002, cpu=1.0, at_most=cores), cores=cores).until(600.0)
    assert max(drive.seen(0.0, 600.0)) <= -(-cores // 1)
    assert drive.workers >= cores // 1
    assert drive.count.held_by == "cores"


def test_work_that_computes_a_little_gets_as_many_as_keep_the_cores_busy() -> None:
    drive = Drive(Pipeline(fetch_s=0.4, train_s=0.002, cpu=0.25, at_most=8), cores=2.0).until(300.0)
    assert drive.workers == 8


@pytest.mark.parametrize("at_most", [3, 10])
def test_workers_that_fetch_no_more_are_given_up_and_tried_ever_more_rarely(at_most: int) -> None:
    drive = Drive(Pipeline(fetch_s=1.0, train_s=0.02, at_most=at_most, jitter=0.3)).until(HOUR)
    assert drive.rate(120.0, HOUR) >= 0.85 * at_most / 1.0
    assert drive.workers <= 1.5 * at_most
    assert drive.count.held_by == "gain"
    tries = [second for second, workers in drive.changes if workers > 1.8 * at_most]
    assert len(tries) <= 8, drive.changes
    assert len([second for second in tries if second > HOUR / 2]) <= 2


def test_threads_that_take_turns_at_the_interpreter_lock_stay_few() -> None:
    # A look at 50 batches is noisy, so a single run may keep a few more.
    drives = [Drive(Pipeline(fetch_s=0.2, train_s=0.05, turns=True), seed=seed).until(HOUR) for seed in range(9)]
    workers = sorted(drive.workers for drive in drives)
    assert workers[4] <= 3, workers
    assert workers[-1] <= 8, workers
    assert all(len(drive.changes) <= 16 for drive in drives)


def test_more_is_tried_at_once_when_what_is_read_from_has_become_faster() -> None:
    drive = Drive(Pipeline(fetch_s=0.5, train_s=0.02, at_most=5)).until(300.0)
    assert drive.workers <= 12
    drive.until(400.0, at_most=1000.0)
    assert drive.rate(350.0, 400.0) >= 0.95 / 0.02


def test_workers_that_are_blocked_become_fewer_but_not_fewer_than_asked() -> None:
    pipeline = Pipeline(fetchers=64, fetch_s=0.1, train_s=0.2)
    assert Drive(pipeline).until(120.0).workers == 1
    assert Drive(pipeline, least=3).until(120.0).workers == 3


def test_it_is_the_enqueuer_that_is_slow_so_fewer_fetchers_are_enough() -> None:
    drive = Drive(Pipeline(fetchers=16, fetch_s=0.1, train_s=0.02, send_s=0.04)).until(200.0)
    assert 3 <= drive.workers <= 4
    assert drive.rate(20.0, 200.0) >= 0.95 / 0.0401


def test_a_trainer_that_pauses_is_no_reason_for_fewer() -> None:
    drive = Drive(Pipeline(fetch_s=0.4, train_s=0.05)).until(60.0)
    before = drive.workers
    for second in range(120, 900, 120):  # as it does where it is evaluated, or saved
        drive.until(second, train_s=0.05)
        drive.until(second + 0.5, train_s=30.0)
    assert drive.until(1000.0, train_s=0.05).workers >= before >= 8
    assert min(drive.seen(60.0, 1000.0)) == before, drive.changes


def test_what_bounds_it_is_kept_and_said() -> None:
    drive = Drive(Pipeline(fetch_s=0.5, train_s=0.01), most=7).until(60.0)
    assert drive.workers == max(drive.seen(0.0, 60.0)) == 7
    assert drive.count.held_by == "max_workers"
    assert set(HELD) >= {"max_workers", "cores", "gain", "bytes", "start", "end"}


def test_a_bound_that_falls_below_the_number_counts_at_once() -> None:
    drive = Drive(Pipeline(fetchers=9, fetch_s=0.5, train_s=0.01), most=4).until(DECISION_SECONDS)
    assert drive.workers == 4


def test_one_row_at_a_time_is_no_reason_to_wait_for_the_first_batch() -> None:
    drive = Drive(Pipeline(rows=1, fetch_s=0.2, train_s=0.2)).until(30.0)
    assert 30 <= drive.workers <= 45


def test_new_workers_that_have_not_come_back_yet_are_waited_for() -> None:
    simulator = Simulator(Pipeline(fetch_s=0.5, train_s=0.01))
    count, asked = WorkerCount(1), []
    for _ in range(60):
        simulator.run_until(simulator.now + DECISION_SECONDS)
        asked.append(count.next(simulator.read(), 2, False, 64, "max_workers", Setting(workers=2, cores=16.0, held_by="")))
    assert set(asked) == {2}
