"""Any DataFlow as a source: each worker's own, or one shared by all, in which each data point comes exactly once."""

from __future__ import annotations

import collections
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from fetchers.shared_between import FileCounter, certified_rows, rows_seen
from gates import await_true, register

import input_workers as iw
from input_workers.adapters import dataflow


class Certified:
    """A DataFlow of self-certifying data points, rows or batches; `reset_state` gives it random numbers, once."""

    def __init__(self, size: int, rows: int = 0, counter: FileCounter | None = None, at: Any = None) -> None:
        self.size, self.rows, self.counter, self.at = size, rows, counter, at or {}
        self.resets: list[int] = []
        self.rng: Any = None

    def reset_state(self) -> None:
        assert self.rng is None, "reset_state was called twice"
        self.rng = np.random.default_rng()
        self.resets.append(threading.get_ident())
        if self.counter is not None:
            self.counter.add()

    def __iter__(self) -> Iterator[Any]:
        assert self.rng is not None, "reset_state was not called"
        for number in range(self.size):
            if number in self.at:
                point = self.at[number]
                if isinstance(point, BaseException):
                    raise point
                yield point
            else:
                rows = np.arange(number * self.rows, (number + 1) * self.rows) if self.rows else [number]
                data, label = certified_rows(rows)
                yield [data, label] if self.rows else [data[0], label[0]]


def all_of(source: Any) -> list[int]:
    return [row for batch in source for row in rows_seen(batch)]


def run(
    coordinator: iw.GlobalCoordinator, fetch: Any, num_workers: int = 1, batch_size: int = 7, fetchers: Any = "thread"
) -> list[int]:
    source = register(coordinator, fetch, batch_size, num_workers=num_workers, last_batch="keep", fetchers=fetchers)
    coordinator.start()
    return all_of(source)


@pytest.mark.parametrize("fetchers", ["thread", "process"])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_each_worker_iterates_a_copy_of_its_own_that_was_reset_once(
    coordinator: iw.GlobalCoordinator, tmp_path: pathlib.Path, fetchers: str, workers: int, rows: int
) -> None:
    counter = FileCounter(tmp_path / "resets")
    df = Certified(75, rows, counter)
    seen = run(coordinator, dataflow.fetch(df, batched=rows > 0), workers, fetchers=fetchers)
    count = 75 * max(rows, 1)
    if workers == 1:
        assert seen == [*range(count)]
    assert collections.Counter(seen) == dict.fromkeys(range(count), workers)
    assert counter.value == workers
    assert df.rng is None, "the one that was given is not touched"


def test_workers_end_at_different_times_and_the_next_run_iterates_again_without_a_reset(
    coordinator: iw.GlobalCoordinator,
) -> None:
    lengths = [3, 40, 0]
    made: list[Certified] = []

    def make(worker_id: int) -> Certified:
        made.append(Certified(lengths[len(made)]))
        return made[-1]

    source = register(coordinator, dataflow.fetch(make, rows_per_chunk=4), 5, num_workers=3, last_batch="keep")
    for _ in range(2):
        coordinator.start()
        assert sorted(all_of(source)) == sorted([*range(3), *range(40)])
        coordinator.stop()
    assert [len(df.resets) for df in made] == [1, 1, 1]


def test_random_numbers_differ_between_workers(coordinator: iw.GlobalCoordinator) -> None:
    class Random(Certified):
        def __iter__(self) -> Iterator[Any]:
            for _ in range(50):
                yield (self.rng.integers(1 << 62), 0)

    source = register(coordinator, dataflow.fetch(Random(0)), 50, num_workers=4)
    coordinator.start()
    numbers = np.concatenate([batch.data for batch in source])
    assert len(set(numbers.tolist())) == 200


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("rows_per_chunk", [1, 3, 100])
def test_mapped_gives_each_data_point_once_whoever_maps_it(
    coordinator: iw.GlobalCoordinator, workers: int, rows_per_chunk: int
) -> None:

    def double(point: Any) -> Any:
        number = int(point[1]) * 2
        return [each[0] for each in certified_rows([number])]

    df = Certified(203)
    fetch = dataflow.mapped(df, double, rows_per_chunk=rows_per_chunk)
    source = register(coordinator, fetch, 7, num_workers=workers, last_batch="keep")
    for _ in range(3):  # each run is an epoch
        coordinator.start()
        seen = all_of(source)
        assert (seen if workers == 1 else sorted(seen)) == [*range(0, 406, 2)]
        coordinator.stop()
    assert len(df.resets) == 1


def test_threads_map_at_the_same_time(coordinator: iw.GlobalCoordinator) -> None:
    together = threading.Barrier(3)

    def meet(point: Any) -> Any:
        together.wait(30)  # fails if only one at a time comes here
        return point

    assert sorted(run(coordinator, dataflow.mapped(Certified(12), meet, rows_per_chunk=1), 3)) == [*range(12)]


def test_a_data_point_mapped_to_none_is_left_out_and_in_no_account(coordinator: iw.GlobalCoordinator) -> None:
    fetch = dataflow.mapped(Certified(100), lambda point: point if point[1] % 10 == 3 else None, rows_per_chunk=4)
    assert sorted(run(coordinator, fetch, 2)) == [*range(3, 100, 10)]
    assert coordinator["train"].stats().rows_fetched == 10


def test_batches_are_mapped_too(coordinator: iw.GlobalCoordinator) -> None:
    fetch = dataflow.mapped(Certified(10, rows=6), lambda point: [each[:3] for each in point], batched=True)
    assert sorted(run(coordinator, fetch, 2)) == [number for number in range(60) if number % 6 < 3]


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("way", [dataflow.fetch, dataflow.mapped])
def test_a_dataflow_that_fails_is_never_an_end_and_its_error_is_the_cause(
    coordinator: iw.GlobalCoordinator, way: Callable[..., Any], workers: int
) -> None:
    error = OSError("disk gone")
    source = register(coordinator, way(Certified(50, at={20: error}), rows_per_chunk=8), 1, num_workers=workers)
    coordinator.start()
    seen: list[int] = []
    with pytest.raises(iw.FetchFailed) as caught:
        seen.extend(row for batch in source for row in rows_seen(batch))
    assert isinstance(caught.value.__cause__, OSError)
    if workers == 1:
        assert seen == [*range(20)], "what came before is delivered"


def test_one_error_of_a_shared_dataflow_is_what_every_worker_gets() -> None:
    error = OSError("disk gone")
    fetch = dataflow.mapped(Certified(50, at={20: error}), rows_per_chunk=8)
    for rows in (8, 8, 4):
        assert len(fetch(0, 1)[0]) == rows
    for worker in (1, 0, 1):  # also where it comes after another's rows
        with pytest.raises(OSError, match="disk gone"):
            fetch(worker, 1)
    fetch.close()
    assert rows_of(fetch(1, 1)) == [*range(8)]


def rows_of(chunk: Any) -> list[int]:
    return [int(number) for number in chunk[1]]


def test_what_a_function_fails_for_is_skipped_alone(coordinator: iw.GlobalCoordinator) -> None:
    def picky(point: Any) -> Any:
        if point[1] % 10 == 3:
            raise KeyError(int(point[1]))
        return point

    policy = iw.ErrorPolicy(skip=True)
    fetch = dataflow.mapped(Certified(100), picky, rows_per_chunk=16)
    source = register(coordinator, fetch, 7, num_workers=3, last_batch="keep", on_error=policy)
    coordinator.start()
    assert sorted(all_of(source)) == [number for number in range(100) if number % 10 != 3]
    assert dict(source.stats().fetch_errors) == {"KeyError": 10}


def test_all_workers_hear_of_the_end_and_a_run_after_a_stop_goes_on() -> None:
    fetch = dataflow.mapped(Certified(10), rows_per_chunk=4)
    assert rows_of(fetch(0, 1)) == [0, 1, 2, 3]
    assert rows_of(fetch(1, 1)) == [4, 5, 6, 7]
    assert rows_of(fetch(0, 1)) == [8, 9]
    for worker in (1, 0, 2):
        with pytest.raises(iw.EndOfData):
            fetch(worker, 1)
    assert rows_of(fetch(1, 1)) == [0, 1, 2, 3]
    assert rows_of(fetch(2, 1)) == [4, 5, 6, 7]


class Odd:
    """Not a value of a row."""


ARRAY = np.zeros(1, np.int64)
WRONG: dict[str, tuple[Any, str]] = {
    "too few": ([ARRAY], "data point 9: got 1 components; wanted 2: component 1 is missing"),
    "too many": ([ARRAY, 0, 0], "data point 9: got 3 components; wanted 2: component 2 is one too many"),
    "another dtype": ([ARRAY.astype("f4"), 0], r"'component 0', row 9: got dtype\('float32'\)"),
    "another shape": ([np.zeros(2, np.int64), 0], r"'component 0', row 9: got dtype\('int64'\) of shape \(2,\)"),
    "objects": ([np.array([Odd()]), 0], r"'component 0', row 9: got dtype dtype\('O'\)"),
    "no value": ([ARRAY, Odd()], "'component 1', row 9: got Odd"),
    "none": (None, "data point 9: got NoneType; wanted a list, tuple or dict"),
    "an array": (ARRAY, "data point 9: got ndarray; wanted a list"),
    "a dict": ({"a": 1}, r"columns: not given, but data point 9 is a dict with the keys \['a'\]"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("way", [dataflow.fetch, dataflow.mapped])
def test_a_data_point_unlike_the_others_is_an_error_that_names_the_component(
    coordinator: iw.GlobalCoordinator, way: Callable[..., Any], kind: str
) -> None:
    point, message = WRONG[kind]
    source = register(coordinator, way(Certified(50, at={9: point}), rows_per_chunk=16), 1, num_workers=1)
    coordinator.start()
    seen: list[int] = []
    with pytest.raises(iw.FetchFailed) as caught:
        seen.extend(row for batch in source for row in rows_seen(batch))
    assert seen == [*range(9)]
    with pytest.raises((iw.SpecMismatch, iw.ConfigError), match=message):
        raise caught.value.__cause__  # type: ignore[misc]


def test_dicts_are_taken_apart_by_their_columns(coordinator: iw.GlobalCoordinator) -> None:
    class Dicts(Certified):
        def __iter__(self) -> Iterator[Any]:
            for data, label in super().__iter__():
                yield {"l": label, "more": "text", "d": data}

    assert run(coordinator, dataflow.fetch(Dicts(20), ["d", "l"])) == [*range(20)]
    with pytest.raises(iw.SpecMismatch, match=r"wanted \['x'\] too"):
        dataflow.fetch(Dicts(20), ["d", "x"])(0, 1)
    with pytest.raises(iw.SpecMismatch, match="got 2 components; wanted 1"):
        dataflow.fetch(Certified(20), ["d"])(0, 1)


def test_python_numbers_are_not_cast_and_chunks_are_cut_to_batches(coordinator: iw.GlobalCoordinator) -> None:
    class Numbers(Certified):
        def __iter__(self) -> Iterator[Any]:
            yield from [(1, 0.5)] * 40

    source = register(coordinator, dataflow.fetch(Numbers(0)), 20, num_workers=1)
    coordinator.start()
    batches = list(source)
    assert [(batch.data.dtype.str, batch.label.dtype.str, len(batch.data)) for batch in batches] == [("<i8", "<f8", 20)] * 2


def test_an_endless_dataflow_ends_with_its_source(coordinator: iw.GlobalCoordinator) -> None:
    class Endless(Certified):
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield from super().__iter__()

    source = register(coordinator, dataflow.mapped(Endless(10)), 5, num_workers=4)
    coordinator.start()
    for _, batch in zip(range(100), source, strict=False):
        rows_seen(batch)
    await_true(lambda: source.stats().rows_fetched > 500)
    assert coordinator.stop()


def test_processes_cannot_share_one_dataflow(coordinator: iw.GlobalCoordinator) -> None:
    register(coordinator, dataflow.mapped(Certified(10)), 5, fetchers="process")
    with pytest.raises(iw.ConfigError, match="workers share one DataFlow, and processes cannot"):
        coordinator.start()


def test_a_dataflow_that_cannot_be_copied_is_a_config_error_that_knows_what_to_do() -> None:
    df = Certified(10)
    df.at = {0: threading.Lock()}
    with pytest.raises(iw.ConfigError, match=r"cannot be copied for worker 3; .* fetch"):
        dataflow.fetch(df)(3, 1)
    with pytest.raises(iw.ConfigError, match=r"df\(3\) returned int"):
        dataflow.fetch(lambda worker_id: 5)(3, 1)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dataflow.fetch([1, 2]), "fetch: got"),  # type: ignore[arg-type]
        (lambda: dataflow.fetch(Certified), "fetch: got"),  # type: ignore[arg-type]
        (lambda: dataflow.mapped(lambda worker_id: Certified(1)), "mapped: got"),  # type: ignore[arg-type]
        (lambda: dataflow.mapped(Certified(1), 5), "function: got 5"),  # type: ignore[arg-type]
        (lambda: dataflow.fetch(Certified(1), "ab"), "columns: got 'ab'"),
        (lambda: dataflow.fetch(Certified(1), ["a", "a"]), "each once"),
        (lambda: dataflow.mapped(Certified(1), rows_per_chunk=0), "rows_per_chunk: got 0"),
    ],
)
def test_wrong_arguments_are_config_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(iw.ConfigError, match=message):
        make()
