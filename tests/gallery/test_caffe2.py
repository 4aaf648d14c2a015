"""Each defect of the ancestors on its restatement, where the check must fail, and on ours, where it must hold."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from flow.assembly_driver import Driver, place
from gallery import caffe2_gallery as old
from gallery.caffe2_gallery import feed_of
from gates import register

import input_workers as iw


def ours(coordinator: iw.GlobalCoordinator, chunks: list[Any], batch_size: int, **more: Any) -> list[Any]:
    source = register(coordinator, feed_of(chunks), batch_size, **more)
    coordinator.start()
    return list(source)


def numbered(count: int, rows: int) -> list[list[np.ndarray]]:
    return [[np.arange(i * rows, (i + 1) * rows), np.arange(i * rows, (i + 1) * rows)] for i in range(count)]


def test_dw1_rows_beyond_a_batch_are_not_dropped_when_the_queue_is_full(coordinator: iw.GlobalCoordinator) -> None:
    def check(rows: list[int]) -> None:
        assert sorted(rows) == list(range(24))

    faulty, chunks = old.AppendAndSplit(4, 2), numbered(4, 6)
    faulty.put(chunks.pop(0))
    faulty.put(chunks.pop(0))
    batches = iter(lambda: faulty.batch(lambda: faulty.put(chunks.pop(0)) if chunks else None), None)
    with pytest.raises(AssertionError):
        check([row for batch in batches for row in batch[0].tolist()])
    check([row for batch in ours(coordinator, numbered(4, 6), 4) for row in batch.data.tolist()])


def test_dw2_the_rest_of_a_chunk_comes_before_the_next_chunk(coordinator: iw.GlobalCoordinator) -> None:
    def check(rows: list[int]) -> None:
        assert rows == list(range(len(rows)))

    faulty = old.AppendAndSplit(4, 10)
    for chunk in numbered(3, 6):
        faulty.put(chunk)
    with pytest.raises(AssertionError):
        check([row for batch in iter(faulty.batch, None) for row in batch[0].tolist()])
    check([row for batch in ours(coordinator, numbered(3, 6), 4, last_batch="keep") for row in batch.data.tolist()])


@pytest.mark.parametrize(("one", "two"), [("u1", "i1"), ("f4", "f8"), ("i8", "U3")])
def test_dw3_a_dtype_never_changes(coordinator: iw.GlobalCoordinator, one: str, two: str) -> None:
    chunks = [[np.ones(2, one), np.ones(2)], [np.ones(2, two), np.ones(2)]]
    faulty = old.AppendAndSplit(4, 10)
    for chunk in chunks:
        faulty.put(chunk)
    assert faulty.batch()[0].dtype != np.dtype(one)
    with pytest.raises(iw.FetchFailed) as caught:
        ours(coordinator, chunks, 4)
    assert isinstance(caught.value.__cause__, iw.SpecMismatch)


@pytest.mark.parametrize("shapes", [((0, 2), (2,)), ((2,), (0, 2)), ((0, 3), (0, 3))])
def test_dw4_and_dw5_no_rows_means_none_along_the_batch_axis(coordinator: iw.GlobalCoordinator, shapes: Any) -> None:
    axes = [len(shape) - 1 for shape in shapes]
    chunks = [[np.zeros(shape) for shape in shapes] for _ in range(6)]
    rows = shapes[0][-1]

    def check(batches: list[Any]) -> None:
        assert sum(batch[0].shape[axes[0]] for batch in batches) == rows * 6
        assert all(a.shape[i] == b.shape[j] for a, b in batches for i, j in [axes])

    faulty = old.AppendAndSplit(rows * 2, 10, axes)
    for chunk in chunks:
        faulty.put(chunk)
    if shapes[0][0] == 0:  # array 0 never seems to have rows: it eats all data
        with pytest.raises(AssertionError):
            check(list(iter(lambda: faulty.batch(calls=100), None)))
    check(ours(coordinator, chunks, rows * 2, batch_axes=axes))


def test_dw6_one_row_chunks_are_not_copied_again_and_again() -> None:
    faulty = old.AppendAndSplit(512, 600)
    for chunk in numbered(512, 1):
        faulty.put(chunk)
    faulty.batch()
    with pytest.raises(AssertionError):
        assert faulty.copied_rows <= 2 * 512
    copied: list[int] = []
    driver = Driver(512, on_copy=lambda key, value: copied.append(len(value)))
    driver.lay_out()
    for call in range(512):
        place(driver, 0, 1, call)
    driver.run(until=lambda: driver.rows_taken == 512)
    assert sum(copied) == 2 * 512, "each row of both inputs once"


def test_dw7_a_buffer_that_is_used_again_does_not_change_what_was_delivered(coordinator: iw.GlobalCoordinator) -> None:
    def reusing() -> Any:
        data = np.zeros((1, 3000))
        for number in range(3):
            data[:] = number
            yield [data, np.array([number])]

    def check(pairs: list[tuple[float, int]]) -> None:
        assert all(value == label for value, label in pairs)

    faulty = old.AppendAndSplit(1, 10)
    for chunk in reusing():
        faulty.put(chunk)
    with pytest.raises(AssertionError):
        check([(batch[0][0, 0], batch[1][0]) for batch in iter(faulty.batch, None)])
    chunks = reusing()
    source = register(coordinator, lambda worker_id, batch_size: next(chunks, None), 1)
    coordinator.start()
    batches = [source.next_batch() for _ in range(3)]
    check([(batch.data[0, 0], batch.label[0]) for batch in batches])


def test_dw8_a_shape_that_changes_is_seen_by_the_trainer_at_once(coordinator: iw.GlobalCoordinator) -> None:
    chunks = [[np.zeros((3, 2)), np.zeros(3)], [np.zeros((3, 5)), np.zeros(3)]]
    faulty = old.AppendAndSplit(6, 4)
    for chunk in chunks:
        faulty.put(chunk)
    finished = threading.Event()
    old.run_without_guard(faulty.batch, finished).join()
    with pytest.raises(AssertionError):
        assert finished.wait(0.01)
    started = time.monotonic()
    with pytest.raises(iw.FetchFailed):
        ours(coordinator, chunks, 6)
    assert time.monotonic() - started < 5 * 1.0


@pytest.mark.parametrize("error", [OSError("disk gone"), SystemExit(3)])
def test_dw9_and_dw10_the_trainer_sees_the_cause(coordinator: iw.GlobalCoordinator, error: BaseException) -> None:
    def fail(*args: int) -> Any:
        raise error

    def check(read: Any) -> None:
        try:
            read()
        except Exception as caught:
            assert caught.__cause__ is not None  # noqa: PT017
            assert type(caught.__cause__) is type(error)  # noqa: PT017

    faulty = old.SilentStop(fail)
    with pytest.raises(AssertionError):
        check(lambda: faulty.next_batch(0.01))
    faulty.thread.join()
    source = register(coordinator, fail, num_workers=2)
    coordinator.start()
    check(source.next_batch)


def test_dw11_no_data_is_not_asked_for_in_a_hot_loop(coordinator: iw.GlobalCoordinator) -> None:
    assert old.ask_at_once(lambda: None, 1000) > 5
    calls = []
    source = register(coordinator, lambda worker_id, batch_size: calls.append(0))
    coordinator.start()
    with pytest.raises(iw.WaitTimeout):
        source.next_batch(0.2)
    assert len(calls) < 50


@pytest.mark.parametrize("chunk", [[], [[1, 2], np.zeros(2)]])
def test_dw12_a_bad_chunk_is_a_spec_mismatch(coordinator: iw.GlobalCoordinator, chunk: Any) -> None:
    with pytest.raises((IndexError, AssertionError)):
        old.checked_by_assert(chunk)
    with pytest.raises(iw.FetchFailed) as caught:
        ours(coordinator, [chunk], 2)
    assert isinstance(caught.value.__cause__, iw.SpecMismatch)
