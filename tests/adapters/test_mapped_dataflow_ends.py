"""How the iterations of a mapped DataFlow end: errors are the user's own, nothing is left behind by any way out."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from adapters.certified_flow import Certified, number_of

import input_workers as iw
from input_workers.adapters import dataflow

FETCHERS = ["thread", "process"]


class Odd(ValueError):
    """An exception of the user's, with more than a text."""

    def __init__(self, number: int) -> None:
        super().__init__(f"odd {number}")
        self.number = number

    def __reduce__(self) -> Any:
        return Odd, (self.number,)


def picky(point: Any) -> Any:
    if number_of(point) == 11:
        raise Odd(11)
    return point


def same(point: Any) -> Any:
    return point


def ready(df: Any, function: Any, workers: int = 2, **settings: Any) -> Any:
    mapped = dataflow.map(df, function, workers, **settings)
    mapped.reset_state()
    return mapped


@pytest.mark.parametrize("fetchers", FETCHERS)
@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_of_the_function_comes_where_the_data_point_would(fetchers: str, workers: int) -> None:
    df = ready(Certified(40), picky, workers, fetchers=fetchers)
    for _ in range(2):  # another iteration begins anew
        points, seen = iter(df), []
        with pytest.raises(iw.FetchFailed, match=r"request 11: .*odd 11") as caught:
            seen.extend(number_of(point) for point in points)
        assert seen == [*range(11)]
        assert isinstance(caught.value.__cause__, Odd)
        assert caught.value.__cause__.number == 11
        assert "raise Odd(11)" in "".join(traceback.format_exception(caught.value)), "the line that raised it"
        with pytest.raises(iw.LifecycleError, match=r"was ended by FetchFailed: .*odd 11"):
            next(points)


def test_an_error_out_of_order_comes_after_what_was_finished() -> None:
    seen = []
    with pytest.raises(iw.FetchFailed) as caught:
        seen.extend(number_of(point) for point in ready(Certified(40), picky, 3, ordered=False))
    assert isinstance(caught.value.__cause__, Odd)
    assert len(seen) == len({*seen} - {11})


@pytest.mark.parametrize("fetchers", FETCHERS)
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("at", [0, 13])
def test_an_error_of_the_dataflow_comes_after_all_data_points_before_it(fetchers: str, ordered: bool, at: int) -> None:
    points = iter(ready(Certified(40, at={at: Odd(5)}), same, 2, fetchers=fetchers, ordered=ordered))
    seen = []
    with pytest.raises(iw.FetchFailed, match=f"Certified failed after {at} data points: Odd: odd 5") as caught:
        seen.extend(number_of(point) for point in points)
    assert sorted(seen) == [*range(at)]
    assert isinstance(caught.value.__cause__, Odd)
    with pytest.raises(iw.LifecycleError, match="odd 5"):
        next(points)


@pytest.mark.parametrize("error", [StopIteration, iw.EndOfData, iw.BadRows([3])])
@pytest.mark.parametrize("fetchers", FETCHERS)
def test_no_error_of_a_function_is_taken_for_the_end(fetchers: str, error: Any) -> None:
    def function(point: Any) -> Any:
        raise error

    with pytest.raises(iw.FetchFailed):
        list(ready(Certified(10), function, fetchers=fetchers))


def test_an_interrupt_in_the_dataflow_is_not_its_end() -> None:
    points = iter(ready(Certified(40, at={20: KeyboardInterrupt()}), same, 2, buffer_size=4))
    seen = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(number_of(point) for point in points)
    assert seen == [*range(17)]
    with pytest.raises(iw.LifecycleError, match="KeyboardInterrupt"):
        next(points)


@pytest.mark.parametrize("fetchers", FETCHERS)
@pytest.mark.parametrize("ordered", [True, False])
def test_nothing_is_left_by_a_break_a_drop_a_close_or_an_iterator_never_read(fetchers: str, ordered: bool) -> None:
    closed = []

    class Closes(Certified):
        def __iter__(self) -> Iterator[Any]:
            try:
                yield from super().__iter__()
            finally:
                closed.append(1)

    df = ready(Closes(1000), same, 2, fetchers=fetchers, ordered=ordered)
    for _ in df:
        break
    assert len(closed) == 1
    points = iter(df)
    next(points)
    points.close()
    points.close()
    assert len(closed) == 2
    with pytest.raises(iw.LifecycleError, match=r"ended by close\(\)"):
        next(points)
    points = iter(df)
    next(points)
    del points
    assert len(closed) == 3
    iter(df)
    gc.collect()
    # That the workers end, too, the fixture looks after.


@pytest.mark.parametrize("what", ["function", "dataflow"])
def test_a_failed_iteration_holds_nothing_when_its_error_is_gone(what: str) -> None:
    """Without the garbage collector: an iteration's workers, and what it read, are no part of a cycle."""

    class Big:
        pass

    alive = []

    class Flow(Certified):
        def __iter__(self) -> Iterator[Any]:
            held = Big()
            alive.append(weakref.ref(held))
            yield from super().__iter__()
            raise Odd(self.size)

    df = ready(Flow(15), picky if what == "function" else same)
    gc.collect()
    gc.disable()
    try:
        try:
            for _ in df:
                pass
        except iw.FetchFailed:
            pass
        assert alive[0]() is None
    finally:
        gc.enable()


def test_iterations_may_overlap() -> None:
    df = ready(Certified(30), same, 2)
    first, second = iter(df), iter(df)
    pairs = [(number_of(one), number_of(other)) for one, other in zip(first, second, strict=True)]
    assert pairs == [(number, number) for number in range(30)]


def test_what_cannot_be_sent_is_a_config_error_before_anything_is_read() -> None:
    lock = threading.Lock()

    def function(point: Any) -> Any:
        return lock

    with pytest.raises(iw.ConfigError, match="lock"):
        iter(ready(Certified(3), function, fetchers="process"))


def shout(point: Any) -> Any:
    """Raise an exception that is larger than a pipe, for such data points."""
    if isinstance(point, str):
        raise ValueError(point)
    return point


def test_large_data_points_and_large_errors_do_not_wait_for_each_other() -> None:
    """One goes into a worker's pipe while the other comes out."""
    points = dict.fromkeys(range(4, 8), "y" * (1 << 20))
    for _ in range(3):
        with pytest.raises(iw.FetchFailed):
            list(ready(Certified(8, at=points), shout, 1, fetchers="process", buffer_size=8, timeout_s=30))


CTRL_C = """
import os, signal, sys, threading
from input_workers.adapters import dataflow

class Numbers:
    def reset_state(self):
        pass
    def __iter__(self):
        return iter([[number] for number in range(100)])

trainer = os.getpid()

def function(point):
    if point[0] == 9:
        os.kill(trainer, signal.SIGINT)
        threading.Event().wait(2)
    return point

if __name__ == "__main__":
    try:
        for point in dataflow.map(Numbers(), function, 2, fetchers=sys.argv[1]):
            print(point, flush=True)
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.mark.parametrize("fetchers", FETCHERS)
def test_ctrl_c_ends_a_program_that_waits_for_a_data_point(fetchers: str) -> None:
    done = subprocess.run([sys.executable, "-c", CTRL_C, fetchers], capture_output=True, text=True, timeout=60, check=False)
    assert "interrupted" in done.stdout, done.stderr
    assert done.returncode == 0
