"""A DataFlow mapped by several workers: each data point exactly once in an epoch, in threads or processes, in order or not."""

from __future__ import annotations

import collections
import dataclasses
import os
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from adapters.certified_flow import Certified, certified_point, number_of
from fetchers.shared_between import Barrier, FileCounter
from hypothesis import given, settings
from hypothesis import strategies as st

import input_workers as iw
from input_workers.adapters import dataflow

FETCHERS = ["thread", "process"]


def ready(df: Any, function: Any, *more: Any, **settings: Any) -> Any:
    mapped = dataflow.map(df, function, *more, **settings)
    mapped.reset_state()
    return mapped


def doubled(point: Any) -> Any:
    return certified_point(2 * number_of(point))


def odd_doubled(point: Any) -> Any:
    return certified_point(2 * number_of(point)) if number_of(point) % 2 else None


@settings(max_examples=30)
@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 50), st.booleans(), st.sets(st.integers(0, 40)))
def test_each_data_point_comes_once_in_each_epoch(size, workers, buffer_size, ordered, dropped) -> None:
    def function(point: Any) -> Any:
        return None if number_of(point) in dropped else doubled(point)

    df = ready(Certified(size), function, workers, ordered=ordered, buffer_size=buffer_size)
    for _ in range(2):
        seen = [number_of(point) for point in df]
        assert (seen if ordered else sorted(seen)) == [2 * number for number in range(size) if number not in dropped]
    assert len(df) == size


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("workers", [1, 3])
def test_processes_do_what_threads_do(workers: int, ordered: bool) -> None:
    df = ready(Certified(101), odd_doubled, workers, True, fetchers="process", ordered=ordered)
    for _ in range(2):
        seen = [number_of(point) for point in df]
        assert (seen if ordered else sorted(seen)) == [2 * number for number in range(1, 101, 2)]


_here: set[tuple[int, int]] = set()


@dataclasses.dataclass
class Meet:
    """Workers wait for each other at their first data point; each says where it was mapped."""

    together: Any

    def __call__(self, point: Any) -> Any:
        place = os.getpid(), threading.get_ident()
        if place not in _here:
            _here.add(place)
            self.together.wait(30)  # fails if not all come here
        return place


@pytest.mark.parametrize("fetchers", FETCHERS)
def test_all_workers_map_at_the_same_time_and_who_iterates_reads(fetchers: str) -> None:
    read_by = set()
    _here.clear()

    class Reads(Certified):
        def __iter__(self) -> Iterator[Any]:
            for point in super().__iter__():
                read_by.add(threading.get_ident())
                yield point

    together: Any = Barrier(3) if fetchers == "process" else threading.Barrier(3)
    places = set(ready(Reads(20), Meet(together), 3, fetchers=fetchers, buffer_size=20))
    assert len(places) == 3
    assert read_by == {threading.get_ident()}
    assert len({process for process, _ in places} - {os.getpid()}) == (3 if fetchers == "process" else 0)


def test_out_of_order_nothing_waits_for_a_data_point_that_takes_long() -> None:
    for ordered in (False, True):
        gate = threading.Event()

        def slow(point: Any, gate: Any = gate) -> Any:
            assert point[1] or gate.wait(30)
            return point

        points = iter(ready(Certified(20), slow, 2, ordered=ordered, buffer_size=20, timeout_s=30 if not ordered else 0.05))
        if ordered:
            with pytest.raises(iw.WaitTimeout):
                next(points)
            gate.set()
            assert [number_of(point) for point in points] == [*range(20)], "after a WaitTimeout it goes on"
        else:
            assert {number_of(next(points)) for _ in range(19)} == {*range(1, 20)}
            gate.set()
            assert [number_of(point) for point in points] == [0]


@pytest.mark.parametrize("buffer_size", [1, 2, 7, None])
def test_no_more_is_read_ahead_than_the_buffer_holds(buffer_size: int | None) -> None:
    read: list[int] = []

    class Reads(Certified):
        def __iter__(self) -> Iterator[Any]:
            for point in super().__iter__():
                read.append(point[1])
                yield point

    points = iter(ready(Reads(60), doubled, 2, buffer_size=buffer_size))
    for taken, _ in enumerate(points):
        assert len(read) <= taken + (buffer_size or 8)
    assert len(read) == 60


Pair = collections.namedtuple("Pair", ["first", "second"])  # noqa: PYI024  as users have them


@dataclasses.dataclass
class Own:
    """A component of a class of the user's."""

    values: Any


def nested(size: int) -> list[Any]:
    return [
        np.random.default_rng(size).random((size, 3), np.float32),
        {"text": "näme", "none": None, "raw": b"\0x", 3: (1, 2.5, True, 2**80)},
        Pair(np.int16(4), [np.arange(size * 10)[::-2], np.asfortranarray(np.ones((2, size), ">f8"))]),
        (np.array(7, np.uint8), np.zeros((0, 3)), np.array(["a", "bcd"]), np.array([Own, None], object)),
        Own(np.array([(1, 2.0)] * size, [("a", "i4"), ("b", "f8")])),
        np.array(["2024-01-01", "NaT"], "M8[D]"),
    ]


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes() if not one.dtype.hasobject else (one == other).all()
        assert one.flags.writeable
    elif isinstance(one, dict):
        assert_same([*one.items()], [*other.items()])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    else:
        assert one == other if not isinstance(one, Own) else assert_same(one.values, other.values) is None


def same(point: Any) -> Any:
    return point


@pytest.mark.parametrize("fetchers", FETCHERS)
def test_nested_data_points_come_through_unchanged_and_are_ones_own(fetchers: str) -> None:
    sizes = [1, 50, 20_000, 0, 3000]  # small ones go through the pipe, large ones through shared memory
    df = ready(Certified(5, at={at: nested(size) for at, size in enumerate(sizes)}), same, 2, fetchers=fetchers)
    points = list(df)  # all kept
    for size, point in zip(sizes, points, strict=True):
        assert_same(point, nested(size))


class Kept(Certified):
    """Data points that keep what they hold to themselves, as some users' do."""

    def __iter__(self) -> Iterator[Any]:
        for point in super().__iter__():
            yield point, threading.Lock()


def test_threads_hand_over_the_objects_themselves_and_processes_what_can_be_pickled() -> None:
    assert len(list(ready(Kept(20), same, 2))) == 20
    points = iter(ready(Certified(20, at={7: threading.Lock()}), same, 2, fetchers="process"))
    with pytest.raises(iw.FetchFailed, match="failed after 7 data points: TypeError: cannot pickle") as caught:
        assert [number_of(next(points)) for _ in range(8)] == []
    assert isinstance(caught.value.__cause__, TypeError)


def chance(point: Any) -> tuple[float, ...]:
    return random.random(), np.random.random()


def test_random_numbers_of_processes_are_others_for_each_data_point_and_epoch_and_can_be_had_again() -> None:
    def numbers(workers: int) -> list[tuple[float, ...]]:
        np.random.seed(7)
        df = ready(Certified(20), chance, workers, fetchers="process")
        return [*df, *df]

    assert numbers(1) == numbers(2)
    assert len({number for point in numbers(2) for number in point}) == 80


class DieOnce:
    """Kills its process, the first time that it sees this number."""

    def __init__(self, counter: FileCounter) -> None:
        self.counter = counter

    def __call__(self, point: Any) -> Any:
        if point[1] == 11 and not self.counter.add():
            os._exit(9)
        return point


def test_a_worker_that_dies_is_replaced_and_each_data_point_still_comes_once(tmp_path) -> None:
    df = ready(Certified(30), DieOnce(FileCounter(tmp_path / "deaths")), 2, fetchers="process")
    assert [number_of(point) for point in df] == [*range(30)]
    dies = ready(Certified(30), DieOnce(FileCounter(tmp_path / "last")), 1, fetchers=iw.Processes(restarts=0))
    with pytest.raises(iw.WorkerDied):
        list(dies)


def test_a_length_is_that_of_the_dataflow_where_it_has_one() -> None:
    class Unsized(Certified):
        __len__ = None

    df = ready(Unsized(3), doubled)
    with pytest.raises(TypeError):
        len(df)
    assert len(list(df)) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dataflow.map(Certified, doubled), "map: got <class"),
        (lambda: dataflow.map([1, 2], doubled), r"map: got \[1, 2\]; wanted an object with reset_state"),
        (lambda: dataflow.map(Certified(1), 5), "function: got 5"),
        (lambda: dataflow.map(Certified(1), doubled, 0), "workers: got 0"),
        (lambda: dataflow.map(Certified(1), doubled, 5000), "workers: got 5000; wanted at most"),
        (lambda: dataflow.map(Certified(1), doubled, strict=False), r"strict: got False.*map\(RepeatedData\(df, -1\)"),
        (lambda: dataflow.map(Certified(1), doubled, fetchers="actor"), "fetchers: got 'actor'"),
        (lambda: dataflow.map(Certified(1), doubled, buffer_size=0), "buffer_size: got 0"),
        (lambda: dataflow.map(Certified(1), doubled, timeout_s=0), "timeout_s: got 0"),
    ],
)
def test_wrong_arguments_are_config_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(iw.ConfigError, match=message):
        make()
