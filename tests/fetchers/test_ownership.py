"""Who owns a returned array: taken over only where nobody else can reach its memory, copied everywhere else."""

from __future__ import annotations

import gc
import pathlib
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gates import register
from hypothesis import given
from hypothesis import strategies as st

import input_workers as iw
from input_workers.fetchers.ownership import owned
from input_workers.leases import CopyPool


def call(function: Callable[[], Any], lent: Any = None) -> tuple[list[np.ndarray], list[int]]:
    """Call as the fetch loop does; return what is owned, and where the returned arrays lay."""
    result = function()
    where = [array.__array_interface__["data"][0] for array in result]
    return list(owned(result, lent, CopyPool(4).copy)), where


def was_taken_over(function: Callable[[], Any], lent: Any = None) -> bool:
    arrays, where = call(function, lent)
    assert len(arrays) == len(where)
    return [array.__array_interface__["data"][0] for array in arrays] == where


kept_array = np.arange(12.0)
kept_base = np.arange(24.0)
kept_large = np.arange(60_000.0).reshape(200, 300)
kept_list = [np.arange(6.0)]
kept_tuple = (np.arange(6.0),)
kept: list[Any] = []


def keep(thing: Any) -> Any:
    kept[:] = [thing]
    return thing


def base_shared_by_two_views() -> Any:
    base = np.arange(24.0)
    return [base[:12], base[12:]]


def base_in_a_closure() -> Any:
    base = np.arange(24.0)
    kept[:] = [lambda: base]
    return [base[:]]


def seen_through_a_memoryview() -> Any:
    array = np.arange(6.0)
    kept[:] = [memoryview(array)]
    return [array]


def memmap(cut: bool) -> Callable[[], Any]:
    def fetch() -> Any:
        path = pathlib.Path(kept[0])
        mapped = np.memmap(path, np.uint8, "r+", shape=(64,))
        return [mapped[:32] if cut else mapped]

    return fetch


TAKEN_OVER: dict[str, Callable[[], Any]] = {
    "a new array": lambda: [np.arange(6.0)],
    "in a tuple": lambda: (np.arange(6.0), np.arange(3)),
    "reshaped": lambda: [np.arange(6.0).reshape(2, 3)],
    "Fortran order": lambda: [np.asfortranarray(np.arange(6.0).reshape(2, 3))],
    "all of it in reverse": lambda: [np.arange(6.0)[::-1]],
}
COPIED: dict[str, Callable[[], Any]] = {
    "an array that is kept": lambda: [kept_array],
    "kept only now": lambda: [keep(np.arange(6.0))],
    "a kept list": lambda: kept_list,
    "a kept tuple": lambda: kept_tuple,
    "a list kept only now": lambda: keep([np.arange(6.0)]),
    "a view of a kept array": lambda: [kept_base[3:9]],
    "a reversed view of a kept array": lambda: [kept_base[::-1]],
    "two views of one array": base_shared_by_two_views,
    "the same array twice": lambda: [kept_array] * 2,
    "a base that a closure holds": base_in_a_closure,
    "seen through a memoryview": seen_through_a_memoryview,
    "somebody else's buffer": lambda: [np.frombuffer(bytearray(48))],
    "bytes, read-only": lambda: [np.frombuffer(b"12345678")],
    "a broadcast of a kept value": lambda: [np.broadcast_to(kept_array[:1], (6,))],
    "a large array that is kept": lambda: [kept_large],
    "a large part, column by column": lambda: [kept_large[:, ::3]],
    "a subclass": lambda: [np.rec.fromarrays([np.arange(3)], names="a")],
    "a sequence of its own kind": lambda: type("Arrays", (list,), {})([np.arange(6.0)]),
}


@pytest.mark.parametrize("what", TAKEN_OVER)
def test_what_nobody_else_can_reach_is_taken_over_without_a_copy(what: str) -> None:
    assert was_taken_over(TAKEN_OVER[what])


@pytest.mark.parametrize("what", COPIED)
def test_what_somebody_else_could_reach_is_copied_bit_for_bit(what: str) -> None:
    arrays, where = call(COPIED[what])
    again = COPIED[what]()
    for array, address, original in zip(arrays, where, again, strict=True):
        assert array.__array_interface__["data"][0] != address
        assert type(array) is np.ndarray
        assert array.flags.carray
        assert not np.shares_memory(array, original)
        assert array.dtype == original.dtype
        assert array.tobytes() == original.tobytes()
    kept.clear()


@pytest.mark.parametrize("cut", [False, True])
def test_a_mapped_file_is_copied(tmp_path: pathlib.Path, cut: bool) -> None:
    path = tmp_path / "rows"
    path.write_bytes(bytes(range(64)))
    kept[:] = [path]
    arrays, _ = call(memmap(cut))
    kept.clear()
    assert type(arrays[0]) is np.ndarray
    assert arrays[0].flags.owndata
    assert arrays[0].tolist() == list(range(32 if cut else 64))


def test_a_small_part_of_a_large_array_is_copied_so_that_the_large_one_is_freed() -> None:
    watched: list[Any] = []

    def fetch() -> Any:
        large = np.zeros(1_000_000, np.uint8)
        watched.append(weakref.ref(large))
        return [large[:1000]]

    arrays, _ = call(fetch)
    gc.collect()
    assert watched[0]() is None, "1000 bytes hold a megabyte"
    assert arrays[0].nbytes == 1000


def test_memory_that_was_lent_comes_back_as_it_is() -> None:
    lent = [np.empty(4), np.empty(4)]
    assert was_taken_over(lambda: lent, lent)
    arrays, where = call(lambda: [lent[1], np.arange(4.0)], lent)
    assert arrays[0].__array_interface__["data"][0] != where[0], "lent for another input"


def test_the_empty_view_of_a_mutable_buffer_cannot_be_grown_under_us() -> None:
    arrays, _ = call(lambda: [np.arange(6.0)[2:2]])
    assert arrays[0].shape == (0,)


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    steps=st.lists(st.sampled_from([1, 2, -1, -2]), min_size=3, max_size=3),
    fortran=st.booleans(),
    read_only=st.booleans(),
    kept_too=st.booleans(),
)
def test_whatever_the_layout_values_are_equal_and_nothing_kept_is_shared(
    shape: list[int], steps: list[int], fortran: bool, read_only: bool, kept_too: bool
) -> None:
    holder: list[Any] = []

    def fetch() -> Any:
        base = np.arange(np.prod(shape) * 8, dtype=">i4").reshape([side * 2 for side in shape[:1]] + shape[1:] + [-1])
        base = np.asfortranarray(base) if fortran else base
        view = base[tuple(slice(None, None, step) for step in steps[: len(shape)])]
        view.flags.writeable = not read_only
        if kept_too:
            holder.append(base)
        expected.append(view.copy())
        return [view]

    expected: list[np.ndarray] = []
    arrays, _ = call(fetch)
    assert arrays[0].dtype == expected[0].dtype
    assert arrays[0].tobytes() == expected[0].tobytes()
    if kept_too:
        assert not np.shares_memory(arrays[0], holder[0])


def test_a_fetch_function_that_uses_its_buffers_again_delivers_each_row_as_it_was(coordinator: iw.GlobalCoordinator) -> None:
    data, label = np.zeros((3, 2000)), np.zeros(3, np.int64)
    result = [data, label]
    calls = iter(range(200))

    def fetch(worker_id: int, batch_size: int) -> Any:
        number = next(calls, None)
        if number is None:
            data[:], label[:] = -1, -1
            raise iw.EndOfData
        data[:], label[:] = number, number
        return result

    source = register(coordinator, fetch, batch_size=4)
    coordinator.start()
    labels = []
    for batch in source:
        assert (batch.data == batch.label[:, None]).all()
        labels += batch.label.tolist()
    assert labels == [number for number in range(200) for _ in range(3)]


@pytest.mark.parametrize("rows", [1, 4, 4000])
def test_writing_to_a_batch_changes_no_other_and_nothing_of_the_fetch_function(
    coordinator: iw.GlobalCoordinator, rows: int
) -> None:
    mine = np.arange(rows * 3)
    calls = iter(range(40))

    def fetch(worker_id: int, batch_size: int) -> Any:
        if next(calls, None) is None:
            raise iw.EndOfData
        return [mine, mine.copy()]

    source = register(coordinator, fetch, batch_size=rows)
    coordinator.start()
    batches = []
    for batch in source:
        batches.append((batch, [array.copy() for array in batch]))
        batches[0][0].data[:] = -len(batches)
        batches[0][0].label[:] = -len(batches)
    assert len(batches) == 120
    for batch, before in batches[1:]:
        assert all((array == old).all() for array, old in zip(batch, before, strict=True))
    assert mine.tolist() == list(range(rows * 3))


def test_the_references_are_counted_right_in_a_thread_with_a_profiler_too() -> None:
    results: list[bool] = []

    def run() -> None:
        sys.setprofile(lambda *args: None)
        results.append(was_taken_over(lambda: [kept_array]))
        sys.setprofile(None)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert results == [False]
