"""Rows of small chunks go in, blocks come out: the same bits, in the order of coming."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from input_workers.packed_rows import BLOCK_ROWS, PackedRows

DTYPES = ["u1", ">i2", "f4", "f8", "c16", "?", "<U3", ">U2", "S4", "M8[s]", [("a", ">f4"), ("b", "u1", (2,))]]
inputs = st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)), min_size=1, max_size=3)


@given(inputs=inputs, lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_blocks_are_the_chunks_joined_bit_for_bit(
    inputs: list[tuple[object, list[int]]], lengths: list[int], seed: int
) -> None:
    random = np.random.default_rng(seed)
    packed = PackedRows()
    for _ in range(2):  # it can be used again
        chunks: list[list[np.ndarray]] = []
        for rows in lengths:
            arrays = []
            for dtype, shape in inputs:
                whole = np.zeros((2 * rows, *shape), dtype)
                if whole.dtype.kind not in "USMV":
                    whole.view(np.uint8)[:] = random.integers(0, 2, whole.view(np.uint8).shape)
                elif whole.dtype.kind != "V":
                    whole[:] = random.integers(0, 100, whole.shape).astype(whole.dtype)
                arrays.append(whole[::-2])  # strided, backwards
            chunks.append([array.copy() for array in arrays])
            packed.add(arrays, rows)
            for array in arrays:
                array[:] = np.zeros((), array.dtype)  # the fetch function uses its memory again
        assert packed.rows == sum(lengths)
        taken = packed.take()
        assert taken is not None
        arrays, rows, nbytes, request = taken
        assert (rows, request) == (sum(lengths), None)
        assert nbytes == sum(array.nbytes for array in arrays)
        for index, array in enumerate(arrays):
            pieces = [chunk[index] for chunk in chunks]
            expected = np.concatenate(pieces, dtype=pieces[0].dtype, casting="equiv")
            assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
            assert array.tobytes() == expected.tobytes()
            assert array.flags.writeable
            assert array.flags.c_contiguous


def test_nothing_in_nothing_out() -> None:
    packed = PackedRows()
    assert packed.take() is None
    packed.add([np.zeros((1, 0))], 1)
    taken = packed.take()
    assert taken is not None
    assert taken[0][0].shape == (1, 0)
    assert packed.take() is None


@pytest.mark.parametrize("rows", [1, BLOCK_ROWS - 1, BLOCK_ROWS, 10 * BLOCK_ROWS])
def test_a_block_is_full_at_its_size_and_an_empty_one_is_to_be_begun(rows: int) -> None:
    packed = PackedRows()
    assert packed.is_full()
    packed.add([np.zeros(rows)], rows)
    assert packed.is_full() is (rows >= BLOCK_ROWS)
    packed.take()
    assert packed.is_full()
