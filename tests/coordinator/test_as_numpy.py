"""`as_numpy()`: the same batches as NumPy arrays, one stream for both handles."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from gates import HANG_SECONDS, Gate, register
from self_certifying import CertifiedFetch, Witness, check_batch

import input_workers as iw
from input_workers.feeds import NumpyFeed


class Moved:
    """An array on a device, as its feed delivers it; NumPy can read it."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray[Any, Any]:
        return self.array


class MovingFeed(NumpyFeed):
    def receive(self, ticket: Any) -> Any:
        return [Moved(array) for array in ticket]


class ReadingFeed(MovingFeed):
    """Says itself how its arrays become NumPy's, and is interrupted where it is told to."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []

    def to_numpy(self, array: Moved) -> Any:
        if self.errors:
            raise self.errors.pop()
        return array.array


def end_of_data() -> Any:
    raise iw.EndOfData


@pytest.mark.parametrize("feed", ["numpy", MovingFeed(), ReadingFeed()], ids=["numpy", "moving", "reading"])
@pytest.mark.parametrize("workers", [0, 1])
def test_both_handles_take_from_the_same_batches(coordinator: iw.GlobalCoordinator, feed: Any, workers: int) -> None:
    fetch = CertifiedFetch(lambda worker, call: 3 if call < 24 else None, end_of_data)
    source = register(coordinator, fetch, 8, feed=feed, num_workers=workers)
    coordinator.start()
    arrays = source.as_numpy()
    rows = []
    for _ in range(3):
        rows += check_batch(arrays.next_batch()).tolist()
        batch = source.next_batch()
        assert type(batch.data) is (np.ndarray if feed == "numpy" else Moved)
    rows += [row for batch in arrays for row in check_batch(batch).tolist()]
    assert len(rows) == 6 * 8
    assert source.stats().batches_delivered == 9
    assert arrays.stats().batches_delivered == 9


def test_it_is_the_same_after_a_wait_that_was_too_long(coordinator: iw.GlobalCoordinator) -> None:
    gate = Gate()
    arrays = register(coordinator, gate, timeout_s=0.01).as_numpy()
    coordinator.start()
    with pytest.raises(iw.WaitTimeout):
        next(arrays)
    gate.release(4)
    assert len(arrays.next_batch(HANG_SECONDS).data) == 4
    gate.open(lambda worker_id: end_of_data())
    with pytest.raises(iw.EndOfData):
        arrays.next_batch(HANG_SECONDS)
    with pytest.raises(StopIteration):
        next(arrays)


def test_each_of_several_devices_has_its_own(coordinator: iw.GlobalCoordinator) -> None:
    fetch = CertifiedFetch(lambda worker, call: 4 if call < 4 and worker == 0 else None, end_of_data)
    for scope in ("gpu_0", "gpu_1"):
        source = register(coordinator, fetch, feed=MovingFeed(), name_scope=scope)
    coordinator.start()
    with pytest.raises(iw.ConfigError, match=r"gpu_0/train.*gpu_1/train"):
        source.as_numpy()
    pairs = list(zip(coordinator["gpu_0/train"].as_numpy(), coordinator["gpu_1/train"].as_numpy(), strict=True))
    assert len(pairs) == 2
    assert {type(array) for pair in pairs for batch in pair for array in batch} == {np.ndarray}


def test_its_holder_keeps_the_source_running() -> None:
    coordinator = iw.GlobalCoordinator()
    register(coordinator, CertifiedFetch(lambda worker, call: 4, end_of_data))
    coordinator.start()
    arrays = coordinator["train"].as_numpy()
    del coordinator
    gc.collect()
    assert len(arrays.next_batch(HANG_SECONDS).data) == 4
    arrays.stop()


@pytest.mark.parametrize("then_as_numpy", [True, False])
def test_a_batch_whose_conversion_was_interrupted_is_the_next_one(
    coordinator: iw.GlobalCoordinator, then_as_numpy: bool
) -> None:
    feed = ReadingFeed()
    fetch = CertifiedFetch(lambda worker, call: 4 if call < 5 else None, end_of_data)
    source = register(coordinator, fetch, feed=feed)
    coordinator.start()
    arrays, witness = source.as_numpy(), Witness()
    witness.see(arrays.next_batch())
    feed.errors.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        arrays.next_batch()
    batch = (arrays if then_as_numpy else source).next_batch()
    witness.see(type(batch)._make(np.asarray(array) for array in batch))
    for batch in arrays:
        witness.see(batch)
    assert witness.rows == 5 * 4
    witness.assert_complete()


def test_a_batch_that_cannot_be_converted_is_an_error_of_the_device(coordinator: iw.GlobalCoordinator) -> None:
    feed = ReadingFeed()
    source = register(coordinator, CertifiedFetch(lambda worker, call: 4, end_of_data), feed=feed)
    coordinator.start()
    feed.errors.append(ValueError("not on the host"))
    with pytest.raises(iw.FeedFailed, match="was sent but not received"):
        source.as_numpy().next_batch()
    assert source.stats().rows_dropped["device_error"] == 4
