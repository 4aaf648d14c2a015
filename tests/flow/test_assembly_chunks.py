"""Small chunks are packed, and whole batches kept as they are: the same rows, with fewer copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from flow.assembly_driver import ROW_NBYTES, Driver, Placing, place
from self_certifying import CALL, Witness, make_chunk

from input_workers.flow.batches import OpenBatch
from input_workers.metrics.fetcher_recorder import FetcherRecorder


def pack(driver: Driver, rows: int, call: int) -> bool:
    chunk = make_chunk(0, call, rows)
    packed = driver.assembly.pack(chunk, rows)
    for array in chunk:
        array[:] = -7  # the fetch function uses its buffers again
    return packed


def witnessed(driver: Driver) -> Witness:
    witness = Witness()
    for batch in driver.taken:
        witness.see(batch)
    return witness


# ---- packing


def test_packed_rows_are_copied_when_they_fill_a_batch() -> None:
    driver = Driver()
    driver.lay_out()
    assert all(pack(driver, rows, call) for call, rows in enumerate([1, 2]))
    assert driver.assembly.charged == (3, 3 * ROW_NBYTES), "their rows are reserved"
    driver.assembly.watch()
    assert driver.take() is None
    assert pack(driver, 1, 2)
    assert driver.wake.get(timeout=1) is None
    assert driver.take() is not None
    assert witnessed(driver).rows == 4


def test_a_block_of_packed_rows_is_copied_before_its_batch_is_full() -> None:
    driver = Driver(1000)
    driver.lay_out()
    for call in range(200):
        assert pack(driver, 1, call)
    driver.assembly.close()
    driver.run()
    assert witnessed(driver).rows == 200


@pytest.mark.parametrize("rows", [3, 4, 9])
def test_packed_rows_lie_before_those_of_a_chunk_that_comes_later(rows: int) -> None:
    driver = Driver()
    driver.lay_out()
    assert pack(driver, 1, 0)
    placing = Placing(driver, 0, rows, 1)
    placing.await_end()
    assert pack(driver, 1, 2)
    driver.assembly.close()
    driver.run()
    witness = witnessed(driver)
    assert witness.rows == rows + 2
    witness.assert_complete()


@pytest.mark.parametrize("placed", [1, 2])
def test_packed_rows_are_copied_by_the_end(placed: int) -> None:
    driver = Driver()
    driver.lay_out()
    place(driver, 0, placed)
    assert pack(driver, 1, 1)
    driver.assembly.close()
    driver.run()
    assert witnessed(driver).rows == placed + 1


def test_packed_rows_that_are_aborted_are_counted() -> None:
    driver = Driver()
    driver.lay_out()
    assert pack(driver, 3, 0)
    assert driver.assembly.abort() == 3
    assert driver.take() is None


def test_what_does_not_fit_at_once_or_has_an_order_is_not_packed() -> None:
    driver = Driver()
    assert not pack(driver, 1, 0), "no batch is laid out"
    driver.lay_out()
    assert pack(driver, 3, 0)
    assert not pack(driver, 2, 1), "it would lie in two batches"
    driver.assembly.close()
    assert not pack(driver, 1, 1)


def test_a_packed_copy_that_fails_is_not_kept_silent() -> None:
    def fail(key: Any, value: Any) -> None:
        raise MemoryError("no memory for the copy")

    driver = Driver(on_copy=fail)
    driver.lay_out()
    assert pack(driver, 3, 0)
    with pytest.raises(MemoryError):
        pack(driver, 1, 1)


# ---- keeping


def keep(
    driver: Driver, ours: Sequence[bool] | None, rows: int = 4, chunk: Any = None, before: int = 0
) -> tuple[Any, OpenBatch]:
    """Place a chunk of a whole batch; return its arrays, and the batch that was taken."""
    driver.lay_out()
    if before:
        place(driver, 1, before)
    chunk = make_chunk(0, 0, rows, axes=driver.axes) if chunk is None else chunk
    driver.assembly.place(chunk, rows, rows * ROW_NBYTES, None, ours, FetcherRecorder(0))
    batch = driver.take()
    assert isinstance(batch, OpenBatch)
    return chunk, batch


@pytest.mark.parametrize("axes", [(0, 0), (1, 0)])
def test_a_chunk_that_is_a_whole_batch_becomes_the_batch(axes: tuple[int, int]) -> None:
    chunk, batch = keep(Driver(axes=axes), (True, True))
    assert all(array is kept for array, kept in zip(batch.arrays, chunk, strict=True))


@pytest.mark.parametrize(
    ("ours", "rows", "before", "alignment"),
    [
        (None, 4, 0, 1),
        ((False, False), 4, 0, 1),
        ((True, True), 4, 0, None),
        ((True, True), 4, 2, 1),
        ((True, True), 5, 0, 1),
    ],
    ids=["nothing is known", "not ours", "the feed takes no chunks", "not from its first row on", "longer than a batch"],
)
def test_any_other_chunk_is_copied(ours: Any, rows: int, before: int, alignment: int | None) -> None:
    chunk, batch = keep(Driver(chunk_alignment=alignment), ours, rows, before=before)
    assert not any(np.shares_memory(array, other) for array in batch.arrays for other in chunk)
    assert batch.arrays[0][-1, CALL] == 0


@pytest.mark.parametrize("index", [0, 1])
def test_an_input_that_is_not_ours_is_copied_beside_one_that_is_kept(index: int) -> None:
    ours = [True, True]
    ours[index] = False
    chunk, batch = keep(Driver(), ours)
    assert [array is kept for array, kept in zip(batch.arrays, chunk, strict=True)] == ours
    assert not np.shares_memory(batch.arrays[index], chunk[index])
    assert (batch.arrays[index] == chunk[index]).all()


def test_a_chunk_is_copied_whole_if_more_than_half_of_its_bytes_are_not_ours() -> None:
    class Wide(Driver):
        def make_batch(self, batch_size: int | None = None) -> OpenBatch:
            return OpenBatch([np.zeros((4, 100)), np.zeros(4)], 4, None, self.target)

    chunk, batch = keep(Wide(), (False, True), chunk=[np.ones((4, 100)), np.ones(4)])
    assert not any(array is kept for array, kept in zip(batch.arrays, chunk, strict=True))
    assert all((array == 1).all() for array in batch.arrays)


@pytest.mark.parametrize("what", ["strided", "read-only", "misaligned for the feed"])
def test_memory_that_the_feed_cannot_take_is_copied(what: str) -> None:
    chunk = make_chunk(0, 0, 4)
    alignment = 1
    if what == "strided":
        chunk = [np.asfortranarray(array) for array in chunk]
    elif what == "read-only":
        for array in chunk:
            array.flags.writeable = False
    else:
        alignment = 64
        memory = np.empty((2, 64 + chunk[0].nbytes), np.uint8)
        for index, array in enumerate(chunk):
            begin = -memory[index].ctypes.data % 64 + 8
            moved = memory[index, begin : begin + array.nbytes].view(np.int64).reshape(array.shape)
            moved[:] = array
            chunk[index] = moved
    _, batch = keep(Driver(chunk_alignment=alignment), (True, True), chunk=chunk)
    assert not any(np.shares_memory(array, other) for array in batch.arrays for other in chunk)
    assert all((array == other).all() for array, other in zip(batch.arrays, chunk, strict=True))


def test_only_a_chunk_that_may_be_kept_need_be_looked_at() -> None:
    driver = Driver()
    assert driver.assembly.may_keep(4, None), "the first batch may be of this size"
    driver.lay_out()
    assert driver.assembly.may_keep(4, None)
    assert not driver.assembly.may_keep(3, None)
    place(driver, 0, 1)
    assert not driver.assembly.may_keep(4, None)
    copies = Driver(chunk_alignment=None)
    copies.lay_out()
    assert not copies.assembly.may_keep(4, None)
