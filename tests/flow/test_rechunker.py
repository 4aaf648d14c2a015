"""The re-chunker against the obvious: concatenate everything, then slice. No threads."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from input_workers.contracts import FetchRequest, Slot
from input_workers.flow.rechunker import Rechunker

DTYPES = [
    *("u1", "<i4", ">i8", "?", "<f2", ">f2", "<f4", ">f4", "<f8", "<c8", ">c16", "<U3", ">U2", "S5", "V3"),
    *("<M8[s]", "<m8[ms]", np.dtype([("a", "<i4"), ("b", ">f8", (2,))]), np.dtype([("a", "u1"), ("b", "<f8")], align=True)),
    np.dtype({"names": ["a"], "formats": ["<i2"], "offsets": [3], "itemsize": 8}),
]
LAYOUTS = ("contiguous", "fortran", "reversed", "every second", "read-only", "broadcast")


def random_array(rng: np.random.Generator, shape: Sequence[int], dtype: Any, layout: str) -> np.ndarray:
    """Return an array of random bits (so NaN payloads and -0.0 too) in some layout of memory."""
    dtype = np.dtype(dtype)
    shape = tuple(shape)
    if layout == "every second":
        return random_array(rng, [side * 2 for side in shape], dtype, "contiguous")[tuple(slice(None, None, 2) for _ in shape)]
    if dtype.kind == "U":  # any code point, as not every bit pattern is one
        values = rng.integers(1, 0x10FFFF, (*shape, dtype.itemsize // 4)).astype(np.dtype("u4").newbyteorder(dtype.byteorder))
        array = values.view(dtype)[..., 0]
    elif dtype.kind == "b":
        array = rng.integers(0, 2, shape).astype("?")
    else:
        raw = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
        array = raw.view(dtype)[..., 0] if raw.size else np.empty(shape, dtype)
    if layout == "fortran":
        return np.asfortranarray(array)
    if layout == "reversed":
        return array[tuple(slice(None, None, -1) for _ in shape)]
    if layout == "broadcast" and array.ndim > 1 and array.size:
        return np.broadcast_to(array[..., :1], array.shape)
    array = np.ascontiguousarray(array).reshape(shape)
    if layout == "read-only":
        array.flags.writeable = False
    return array


def values_of(array: np.ndarray) -> bytes:
    """Return the bytes of the values in C order; padding between the fields of a record is no value."""
    if array.dtype.names is None:
        return array.tobytes()
    return b"".join(values_of(array[name]) for name in array.dtype.names)


def new_slot(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[Any], axes: Sequence[int], rows: int) -> Slot:
    arrays = [np.zeros((*s[:a], rows, *s[a:]), d) for s, d, a in zip(shapes, dtypes, axes, strict=True)]
    return Slot(arrays, rows)


def take(array: np.ndarray, axis: int, start: int, stop: int) -> np.ndarray:
    return array[(slice(None),) * axis + (slice(start, stop),)]


def joined(parts: Sequence[np.ndarray], shape: tuple[int, ...], dtype: np.dtype, axis: int) -> np.ndarray:
    """Return the parts one behind the other, in their own dtype (np.concatenate makes the byte order native)."""
    rows = sum(part.shape[axis] for part in parts)
    whole = np.zeros((*shape[:axis], rows, *shape[axis:]), dtype)
    done = 0
    for part in parts:
        whole[(slice(None),) * axis + (slice(done, done + part.shape[axis]),)] = part
        done += part.shape[axis]
    return whole


@st.composite
def streams(draw: st.DrawFn) -> dict[str, Any]:
    inputs = draw(st.integers(1, 3))
    shapes = [tuple(draw(st.lists(st.integers(0, 3), max_size=3))) for _ in range(inputs)]
    batch = draw(st.integers(1, 7))
    length = st.one_of(st.sampled_from([1, max(1, batch - 1), batch, batch + 1, 5 * batch, 5 * batch + 1]), st.integers(1, 20))
    return {
        "shapes": shapes,
        "axes": [draw(st.integers(0, len(shape))) for shape in shapes],
        "dtypes": [np.dtype(draw(st.sampled_from(DTYPES))) for _ in shapes],
        "batch": batch,
        "lengths": draw(st.lists(length, max_size=12)),
        "adds": draw(st.integers(1, 4)),
        "adopt": draw(st.booleans()),
        "layouts": draw(st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=4)),
        "seed": draw(st.integers(0, 2**32)),
    }


@settings(max_examples=500)
@given(streams())
@example({"shapes": [(), (0,)], "axes": [0, 1], "dtypes": [np.dtype("i4")] * 2, "batch": 6, "lengths": [2, 3, 4], "adds": 1,
          "adopt": False, "layouts": ["contiguous"], "seed": 0})  # fmt: skip
def test_slots_hold_what_concatenating_and_slicing_gives(stream: dict[str, Any]) -> None:
    rng = np.random.default_rng(stream["seed"])
    shapes, axes, dtypes, batch = stream["shapes"], stream["axes"], stream["dtypes"], stream["batch"]
    chunks = [
        (
            [
                random_array(rng, (*s[:a], rows, *s[a:]), d, stream["layouts"][(number + index) % len(stream["layouts"])])
                for index, (s, a, d) in enumerate(zip(shapes, axes, dtypes, strict=True))
            ],
            rows,
            0,
            None,
        )
        for number, rows in enumerate(stream["lengths"])
    ]
    columns = zip(range(len(axes)), shapes, dtypes, axes, strict=True)
    whole = [joined([chunk[0][i] for chunk in chunks], s, d, a) for i, s, d, a in columns]
    copies = [[array.copy() for array in chunk[0]] for chunk in chunks]
    rechunker = Rechunker(axes)
    slots: list[Slot] = []
    making: Slot | None = None
    released_rows = released_chunks = 0
    for begin in range(0, len(chunks), stream["adds"]):
        rechunker.add(chunks[begin : begin + stream["adds"]])
        while rechunker.rows:
            if making is None:
                making = rechunker.adopt(batch, 1) if stream["adopt"] else None
                if making is not None:
                    assert all(array.flags.carray for array in making.arrays)
                    released_rows, released_chunks = released_rows + batch, released_chunks + 1
            if making is None:
                making = new_slot(shapes, dtypes, axes, batch)
            copied, rows = rechunker.fill(making)
            released_rows, released_chunks = released_rows + rows, released_chunks + len(copied)
            if making.filled == making.rows:
                slots, making = [*slots, making], None
    total = sum(stream["lengths"])
    assert (released_rows, released_chunks) == (total, len(chunks))
    assert len(slots) == total // batch
    assert (making.filled if making else 0) == total % batch
    for number, slot in enumerate([*slots, *([making] if making else [])]):
        for array, axis, wanted, dtype in zip(slot.arrays, axes, whole, dtypes, strict=True):
            assert array.dtype == dtype
            expected = take(wanted, axis, number * batch, number * batch + slot.filled)
            assert values_of(take(array, axis, 0, slot.filled)) == values_of(expected)
    for chunk, before in zip(chunks, copies, strict=True):
        assert [values_of(array) for array in chunk[0]] == [values_of(array) for array in before], "a chunk was written to"


class Counted(np.ndarray):
    """Counts the bytes that `np.concatenate` is asked to copy from arrays of this class, and refuses any other function."""

    copied = 0

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        assert func is np.concatenate, f"copied by {func}"
        Counted.copied += sum(part.nbytes for part in args[0])
        return func([np.asarray(part) for part in args[0]], *args[1:], **kwargs)


@pytest.mark.parametrize("length", [1, 3, 64, 1000])
def test_each_byte_is_copied_at_most_twice_whatever_the_chunks(length: int) -> None:
    rows, batch = 6000, 128
    Counted.copied = 0
    rechunker = Rechunker([0])
    for begin in range(0, rows, length):
        part = np.arange(begin, min(begin + length, rows), dtype=np.int64)
        rechunker.add([([part.view(Counted)], len(part), 0, None)])
        while rechunker.rows >= batch:
            slot = Slot([np.empty(batch, np.int64)], batch)
            rechunker.fill(slot)
    slot = Slot([np.empty(batch, np.int64)], batch)
    rechunker.fill(slot)
    assert rows * 8 <= Counted.copied <= 2 * rows * 8


def seconds_for_one_row_chunks(rows: int) -> float:
    row = np.zeros((1, 16), np.float32)
    best = float("inf")
    for _ in range(5):
        rechunker = Rechunker([0])
        slot = Slot([np.empty((rows, 16), np.float32)], rows)
        started = time.perf_counter()
        rechunker.add([([row], 1, 64, None)] * rows)
        rechunker.fill(slot)
        best = min(best, time.perf_counter() - started)
    return best


def test_a_batch_of_one_row_chunks_costs_time_in_proportion_to_its_rows() -> None:
    ratio = seconds_for_one_row_chunks(64_000) / seconds_for_one_row_chunks(8_000)
    assert ratio < 8 * 2.5, f"8 times the rows took {ratio:.1f} times as long"  # quadratic: 64


def test_a_chunk_is_let_go_as_soon_as_it_was_copied_whole() -> None:
    rechunker = Rechunker([0])
    arrays = [np.arange(10), np.arange(3)]
    watched = [weakref.ref(array) for array in arrays]
    rechunker.add([([array], len(array), 0, None) for array in arrays])
    del arrays
    slot = Slot([np.empty(11, np.int64)], 11)
    assert [each[1] for each in rechunker.fill(slot)[0]] == [10]
    gc.collect()
    assert [ref() is None for ref in watched] == [True, False]
    assert rechunker.rows == 2
    assert [each[1] for each in rechunker.fill(Slot([np.empty(11, np.int64)], 11))[0]] == [3]
    gc.collect()
    assert watched[1]() is None
    assert rechunker.rows == 0


def test_a_slot_carries_the_epoch_of_its_first_row() -> None:
    rechunker = Rechunker([0])
    requests = [FetchRequest(index, epoch, np.arange(3)) for index, epoch in enumerate([4, 5])]
    rechunker.add([([np.arange(3)], 3, 24, request) for request in requests])
    epochs = []
    for _ in range(3):
        slot = Slot([np.empty(2, np.int64)], 2)
        rechunker.fill(slot)
        epochs.append(slot.epoch)
    assert epochs == [4, 4, 5]


@pytest.mark.parametrize("spoil", ["too long", "begun", "fortran", "read-only", "misaligned"])
def test_only_a_whole_contiguous_writeable_aligned_chunk_becomes_a_slot_itself(spoil: str) -> None:
    raw = np.zeros(4 * 6 * 8 + 128, np.uint8)
    offset = -raw.ctypes.data % 64 + (8 if spoil == "misaligned" else 0)
    array = raw[offset : offset + 4 * 6 * 8].view(np.int64).reshape(4, 6)
    if spoil == "fortran":
        array = np.asfortranarray(array)
    if spoil == "read-only":
        array.flags.writeable = False
    rechunker = Rechunker([0])
    rechunker.add([([array], 4, 0, None), ([array], 4, 0, None)])
    if spoil == "begun":
        rechunker.fill(Slot([np.empty((1, 6), np.int64)], 1))
    assert rechunker.adopt(3 if spoil in ("too long", "begun") else 4, 64) is None
    sound = Rechunker([0])
    whole = raw[-raw.ctypes.data % 64 :][: 4 * 6 * 8].view(np.int64).reshape(4, 6)
    sound.add([([whole], 4, 0, None)])
    slot = sound.adopt(4, 64)
    assert slot is not None
    assert slot.arrays[0] is whole
    assert (slot.filled, sound.rows) == (4, 0)
