"""Any DataFlow as a source: each worker's own, or one shared by all, in which each data point comes exactly once."""

from __future__ import annotations

import collections
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from adapters.certified_flow import Certified
from fetchers.shared_between import FileCounter, rows_seen
from gates import await_true, register

import input_workers as iw
from input_workers.adapters import dataflow


def same(point: Any) -> Any:
    return point


def fetch_mapped(df: Any, **more: Any) -> Any:
    """Return a fetch function over a DataFlow that workers of its own map."""
    return dataflow.fetch(dataflow.map(df, same, 3), **more)


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


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("way", [dataflow.fetch, fetch_mapped])
def test_a_dataflow_that_fails_is_never_an_end_and_its_error_is_the_cause(
    coordinator: iw.GlobalCoordinator, way: Callable[..., Any], workers: int
) -> None:
    error = OSError("disk gone")
    fetch = way(Certified(50, at={20: error}), rows_per_chunk=8)
    source = register(coordinator, fetch, 1, num_workers=workers)
    coordinator.start()
    seen: list[int] = []
    with pytest.raises(iw.FetchFailed) as caught:
        seen.extend(row for batch in source for row in rows_seen(batch))
    assert isinstance(caught.value.__cause__, OSError)
    if workers == 1:
        assert seen == [*range(20)], "what came before is delivered"
    assert coordinator.stop()
    fetch.close()


def test_what_is_mapped_by_many_is_a_source_of_one_worker(coordinator: iw.GlobalCoordinator) -> None:
    together = threading.Barrier(3)

    def meet(point: Any) -> Any:
        if point[1] < 3:
            together.wait(30)  # fails if only one at a time comes here
        return point if point[1] % 10 else None

    df = Certified(203)
    source = register(coordinator, dataflow.fetch(dataflow.map(df, meet, 3)), 7, num_workers=1, last_batch="keep")
    for _ in range(3):  # each run is an epoch
        coordinator.start()
        assert all_of(source) == [number for number in range(203) if number % 10]
        coordinator.stop()
        together.reset()
    assert source.stats().rows_fetched == 3 * 182, "what is left out is no row of any account"
    assert df.rng is None, "a copy is iterated"


def test_the_workers_of_a_source_in_processes_may_have_workers_of_their_own(coordinator: iw.GlobalCoordinator) -> None:
    seen = run(coordinator, fetch_mapped(Certified(50)), 2, fetchers="process")
    assert collections.Counter(seen) == dict.fromkeys(range(50), 2)


def test_a_run_after_a_stop_goes_on_where_it_was(coordinator: iw.GlobalCoordinator) -> None:
    fetch = fetch_mapped(Certified(100), rows_per_chunk=5)
    source = register(coordinator, fetch, 5, num_workers=1, last_batch="keep")
    coordinator.start()
    next(iter(source))
    coordinator.stop()
    coordinator.start()
    rest = all_of(source)
    assert rest == [*range(100 - len(rest), 100)]
    assert len(rest) < 100
    fetch.close()


@pytest.mark.parametrize("way", [dataflow.fetch, fetch_mapped])
@pytest.mark.parametrize("length", [6, (9, -1), "longest"])
def test_rows_of_unequal_length_are_padded(coordinator: iw.GlobalCoordinator, way: Callable[..., Any], length: Any) -> None:
    points = [[np.full((number % 5, 2), number, np.int16), number] for number in range(23)]
    fetch = way(Certified(23, at=dict(enumerate(points))), pad_ragged={0: length}, rows_per_chunk=8)
    size, value = length if isinstance(length, tuple) else (length, 0)
    more: dict[str, Any] = {"input_names": ["text", "number", "text_length"]}
    if length == "longest":
        specs = [iw.ArraySpec((None, 2), np.int16), iw.ArraySpec((), np.int64), iw.ArraySpec((), np.int64)]
        more |= {"rebatch": False, "specs": specs}
    else:
        more["last_batch"] = "keep"
    source = register(coordinator, fetch, 8, **more)
    coordinator.start()
    numbers: list[int] = []
    for text, number, lengths in source:
        assert text.shape[1] == (max(lengths) if length == "longest" else size)
        for row, own, width in zip(text, number, lengths, strict=True):
            assert width == own % 5
            assert (row[:width] == own).all()
            assert (row[width:] == value).all()
        numbers += number.tolist()
    assert numbers == [*range(23)]


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
def test_a_data_point_unlike_the_others_is_an_error_that_names_the_component(
    coordinator: iw.GlobalCoordinator, kind: str
) -> None:
    point, message = WRONG[kind]
    source = register(coordinator, dataflow.fetch(Certified(50, at={9: point}), rows_per_chunk=16), 1, num_workers=1)
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

    fetch = fetch_mapped(Endless(10))
    source = register(coordinator, fetch, 5, num_workers=2)
    coordinator.start()
    for _, batch in zip(range(100), source, strict=False):
        rows_seen(batch)
    await_true(lambda: source.stats().rows_fetched > 500)
    assert coordinator.stop()
    fetch.close()  # what was stopped in between would go on


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
        (lambda: dataflow.fetch(Certified(1), "ab"), "columns: got 'ab'"),
        (lambda: dataflow.fetch(Certified(1), ["a", "a"]), "each once"),
        (lambda: dataflow.fetch(Certified(1), pad_ragged={0: 0}), "pad_ragged: 0: got 0"),
        (lambda: dataflow.fetch(Certified(1), pad_ragged={0: 5}, batched=True), "with batched=True"),
        (lambda: dataflow.fetch(Certified(1), rows_per_chunk=0), "rows_per_chunk: got 0"),
    ],
)
def test_wrong_arguments_are_config_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(iw.ConfigError, match=message):
        make()
