"""Generators: one for each worker, made when it is first asked, and never taken for finished when it broke."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gates import HANG_SECONDS, register

import input_workers as iw
from input_workers.sources import Generators


def count_to_two(worker_id: int) -> Iterator[Any]:
    yield [np.array([worker_id])]
    yield [np.array([worker_id + 100])]


def test_each_worker_has_its_own_which_ends_and_begins_anew() -> None:
    made = []

    def factory(worker_id: int) -> Iterator[Any]:
        made.append(worker_id)
        return count_to_two(worker_id)

    read = Generators(factory)
    assert made == []
    assert [read(worker, 32)[0][0] for worker in (0, 5, 0, 5)] == [0, 5, 100, 105]
    for worker in (5, 0):
        with pytest.raises(iw.EndOfData, match=f"worker {worker} has ended"):
            read(worker, 32)
    assert made == [0, 5]
    assert [read(0, 32)[0][0] for _ in range(2)] == [0, 100]
    assert made == [0, 5, 0]


def test_a_chunk_is_passed_on_as_it_is() -> None:
    chunks = [[np.zeros(2)], None, (np.zeros(1),)]
    read = Generators(lambda worker_id: iter(chunks))
    assert [read(0, 1) is chunk for chunk in chunks] == [True, True, True]


def test_end_of_data_raised_inside_is_an_end_too() -> None:
    def factory(worker_id: int) -> Iterator[Any]:
        yield [np.zeros(1)]
        raise iw.EndOfData

    read = Generators(factory)
    for _ in range(2):
        read(0, 1)
        with pytest.raises(iw.EndOfData):
            read(0, 1)


def test_an_exception_is_passed_on_and_what_follows_is_not_taken_for_the_end() -> None:
    def factory(worker_id: int) -> Iterator[Any]:
        yield [np.zeros(1)]
        raise OSError("disk error")

    read = Generators(factory)
    read(0, 1)
    with pytest.raises(OSError, match="disk error"):
        read(0, 1)
    for _ in range(2):
        with pytest.raises(iw.InputWorkersError, match=r"had raised OSError: disk error; that is not the end") as caught:
            read(0, 1)
        assert not isinstance(caught.value, iw.EndOfData)
    read.close()
    assert read(0, 1) is not None


def test_an_iterator_that_can_go_on_after_an_exception_does() -> None:
    class Reader:
        at = 0

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            self.at += 1
            if self.at == 2:
                raise OSError("once")
            if self.at == 4:
                raise StopIteration
            return [np.array([self.at])]

    read = Generators(lambda worker_id: Reader())
    assert read(0, 1)[0][0] == 1
    with pytest.raises(OSError, match="once"):
        read(0, 1)
    assert read(0, 1)[0][0] == 3
    with pytest.raises(iw.EndOfData):
        read(0, 1)


def test_a_factory_that_raises_is_asked_again() -> None:
    answers = [OSError("not yet"), count_to_two(7)]

    def factory(worker_id: int) -> Iterator[Any]:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    read = Generators(factory)
    with pytest.raises(OSError, match="not yet"):
        read(0, 1)
    assert read(0, 1)[0][0] == 7


@pytest.mark.parametrize("factory", [count_to_two(0), [1], None])
def test_a_factory_that_cannot_be_called_is_refused(factory: Any) -> None:
    with pytest.raises(iw.ConfigError, match=r"factory: got .*; wanted factory\(worker_id\) -> iterator"):
        Generators(factory)


@pytest.mark.parametrize("answer", [[[np.zeros(1)]], None, range(3)])
def test_a_factory_that_returns_no_iterator_is_refused(answer: Any) -> None:
    with pytest.raises(iw.ConfigError, match=rf"factory\(3\) returned {type(answer).__name__}; wanted an iterator"):
        Generators(lambda worker_id: answer)(3, 1)


class Watched:
    """A factory that says which of its generators were closed, and holds them, so that nothing else closes them."""

    def __init__(self) -> None:
        self.closed: list[int] = []
        self.made: list[Iterator[Any]] = []
        self.inside, self.go_on = threading.Event(), threading.Event()

    def __call__(self, worker_id: int) -> Iterator[Any]:
        self.made.append(self.generate(worker_id))
        return self.made[-1]

    def generate(self, worker_id: int) -> Iterator[Any]:
        try:
            yield [np.array([worker_id])]
            self.inside.set()
            assert self.go_on.wait(HANG_SECONDS)
            yield [np.array([worker_id])]
        finally:
            self.closed.append(worker_id)


def test_close_closes_every_generator_and_may_be_called_again() -> None:
    watched = Watched()
    read = Generators(watched)
    read(0, 1), read(1, 1)
    assert watched.closed == []
    read.close()
    assert sorted(watched.closed) == [0, 1]
    read.close()
    assert len(watched.closed) == 2
    read(0, 1)
    read.close()
    assert len(watched.closed) == 3


def test_a_generator_that_runs_is_closed_when_its_call_returns_and_no_second_call_enters_it() -> None:
    watched = Watched()
    read = Generators(watched)
    read(0, 1)
    chunks = []
    thread = threading.Thread(target=lambda: chunks.append(read(0, 1)))
    thread.start()
    assert watched.inside.wait(HANG_SECONDS)
    try:
        with pytest.raises(iw.LifecycleError, match="worker 0 is asked by two threads at once"):
            read(0, 1)
        read(1, 1)  # the other worker does not wait
        read.close()
        assert watched.closed == [1]
    finally:
        watched.go_on.set()
        thread.join(HANG_SECONDS)
    assert len(chunks) == 1
    assert watched.closed == [1, 0]


def test_close_closes_the_others_when_one_raises() -> None:
    closed = []

    class Stubborn:
        def __init__(self, worker_id: int) -> None:
            self.worker_id = worker_id

        def __next__(self) -> Any:
            return None

        def close(self) -> None:
            closed.append(self.worker_id)
            raise OSError(f"close {self.worker_id}")

    read = Generators(Stubborn)  # type: ignore[arg-type]
    for worker in range(3):
        read(worker, 1)
    with pytest.raises(OSError, match="close 0"):
        read.close()
    assert closed == [0, 1, 2]


def test_pickled_it_takes_the_factory_along_and_no_iterator() -> None:
    read = Generators(count_to_two)
    read(0, 1)
    again = pickle.loads(pickle.dumps(read))
    assert [again(0, 1)[0][0], read(0, 1)[0][0]] == [0, 100]


def test_the_source_ends_when_all_workers_have_and_the_next_run_begins_anew(coordinator: iw.GlobalCoordinator) -> None:
    def factory(worker_id: int) -> Iterator[Any]:
        yield from ([np.full(3, worker_id), np.arange(3) + 3 * call] for call in range(worker_id + 1))

    source = register(coordinator, Generators(factory), 4, num_workers=3, last_batch="keep")
    for _ in range(2):
        coordinator.start()
        batches = list(source)
        coordinator.stop()
        rows = sorted((int(a), int(b)) for batch in batches for a, b in zip(batch.data, batch.label, strict=True))
        first = rows[0][0]
        assert rows == [(first + worker, at) for worker in range(3) for at in range(3 * (first + worker + 1))]
        assert [len(batch.data) for batch in batches[:-1]] == [4] * (len(rows) // 4)


def test_a_failure_inside_reaches_the_trainer(coordinator: iw.GlobalCoordinator) -> None:
    def factory(worker_id: int) -> Iterator[Any]:
        yield [np.zeros(4), np.zeros(4)]
        raise OSError("disk error")

    source = register(coordinator, Generators(factory), 4, num_workers=1)
    with coordinator:
        next(iter(source))
        with pytest.raises(iw.FetchFailed, match="OSError: disk error"):
            next(iter(source))
