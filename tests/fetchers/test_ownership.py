"""Who owns a returned array: kept only where nobody else can reach its memory, copied everywhere else."""

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
from input_workers.fetchers.ownership import ownership


def whose(function: Callable[[], Any], lent: Any = None, owns_all: bool = False) -> list[bool]:
    """Call as the fetch loop does; return which of the arrays may be kept."""
    result = function()
    ours = ownership(result, owns_all, lent)
    assert len(ours) == len(result)
    return list(ours)


def deliver(function: Callable[[], Any], inputs: int) -> tuple[list[np.ndarray], list[int]]:
    """Return the arrays that a trainer gets of one call, where chunks are batches, and where the returned ones lay."""
    where: list[int] = []

    def fetch(worker_id: int, batch_size: int) -> Any:
        if where:
            raise iw.EndOfData
        result = function()
        where.extend(array.__array_interface__["data"][0] for array in result)
        return result

    coordinator = iw.GlobalCoordinator()
    names = [f"input_{number}" for number in range(inputs)]
    source = register(coordinator, fetch, input_names=names, rebatch=False)
    with coordinator:
        (batch,) = source
    return list(batch), where


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


OURS: dict[str, Callable[[], Any]] = {
    "a new array": lambda: [np.arange(6.0)],
    "in a tuple": lambda: (np.arange(6.0), np.arange(3)),
    "reshaped": lambda: [np.arange(6.0).reshape(2, 3)],
    "Fortran order": lambda: [np.asfortranarray(np.arange(6.0).reshape(2, 3))],
    "all of it in reverse": lambda: [np.arange(6.0)[::-1]],
}
NOT_OURS: dict[str, Callable[[], Any]] = {
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


@pytest.mark.parametrize("what", OURS)
def test_what_nobody_else_can_reach_is_ours(what: str) -> None:
    assert all(whose(OURS[what]))


@pytest.mark.parametrize("what", NOT_OURS)
def test_what_somebody_else_could_reach_is_not_ours(what: str) -> None:
    assert not any(whose(NOT_OURS[what]))
    kept.clear()


@pytest.mark.parametrize("what", NOT_OURS)
def test_it_is_copied_bit_for_bit(what: str) -> None:
    original = NOT_OURS[what]()
    arrays, where = deliver(NOT_OURS[what], len(original))
    for array, address, before in zip(arrays, where, original, strict=True):
        assert array.__array_interface__["data"][0] != address
        assert type(array) is np.ndarray
        assert array.flags.carray
        assert not np.shares_memory(array, before)
        assert array.dtype == before.dtype
        assert array.tobytes() == before.tobytes()
    kept.clear()


def test_what_is_ours_is_delivered_as_it_is() -> None:
    arrays, where = deliver(lambda: [np.arange(6.0), np.arange(6)], 2)
    assert [array.__array_interface__["data"][0] for array in arrays] == where


@pytest.mark.parametrize("cut", [False, True])
def test_a_mapped_file_is_copied(tmp_path: pathlib.Path, cut: bool) -> None:
    path = tmp_path / "rows"
    path.write_bytes(bytes(range(64)))
    kept[:] = [path]
    assert whose(memmap(cut)) == [False]
    arrays, where = deliver(memmap(cut), 1)
    kept.clear()
    assert type(arrays[0]) is np.ndarray
    assert arrays[0].__array_interface__["data"][0] != where[0]
    assert arrays[0].tolist() == list(range(32 if cut else 64))


def test_a_small_part_of_a_large_array_is_copied_so_that_the_large_one_is_freed() -> None:
    watched: list[Any] = []

    def fetch() -> Any:
        large = np.zeros(1_000_000, np.uint8)
        part = large[:1000]
        watched.append(weakref.ref(large))
        return [part]

    arrays, _ = deliver(fetch, 1)
    gc.collect()
    assert watched[0]() is None, "1000 bytes hold a megabyte"
    assert arrays[0].nbytes == 1000
    assert whose(lambda: [np.zeros(1_000_000, np.uint8)[:1000]]) == [False]
    assert whose(lambda: [np.zeros(1000, np.uint8)[:500]]) == [True]


def test_memory_that_was_lent_is_ours() -> None:
    lent = [np.empty(4), np.empty(4)]
    assert whose(lambda: lent, lent) == [True, True]
    assert whose(lambda: [lent[1], np.arange(4.0)], lent) == [False, True], "lent for another input"


def test_what_we_made_ourselves_is_ours_whoever_else_holds_it() -> None:
    assert whose(lambda: [kept_array, kept_base[1:]], owns_all=True) == [True, True]


def weakly_held() -> Any:
    array = np.arange(6.0)
    kept[:] = [weakref.ref(array)]
    return [array]


def base_weakly_held() -> Any:
    base = np.arange(6.0)
    kept[:] = [weakref.ref(base)]
    return [base.reshape(2, 3)]


def weakly_held_in_a_cache() -> Any:
    cache: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
    array = np.arange(6.0)
    cache[0] = array
    kept[:] = [cache]
    return [array]


def watched_by_a_finalizer() -> Any:
    array = np.arange(6.0)
    weakref.finalize(array, lambda: None).atexit = False
    return [array]


@pytest.mark.parametrize("function", [weakly_held, base_weakly_held, weakly_held_in_a_cache, watched_by_a_finalizer])
def test_what_a_weak_reference_leads_to_is_not_ours(function: Callable[[], Any]) -> None:
    assert whose(function) == [False]
    kept.clear()


def test_a_weak_reference_that_is_gone_does_not_matter() -> None:
    def fetch() -> Any:
        array = np.arange(6.0)
        assert weakref.ref(array)() is array
        return [array]

    assert whose(fetch) == [True]


def test_a_trainer_that_writes_to_its_batches_changes_nothing_in_a_cache_of_weak_references(
    coordinator: iw.GlobalCoordinator,
) -> None:
    cache: dict[int, weakref.ref[np.ndarray]] = {}
    calls = iter(range(1, 10**6))

    def fetch(worker_id: int, batch_size: int) -> Any:
        key = next(calls) % 3
        array = cache[key]() if key in cache else None
        if array is None:
            array = np.full((4, 50_000), float(key))
            cache[key] = weakref.ref(array)
        return [array]

    source = register(coordinator, fetch, 4, input_names=["data"])
    coordinator.start()
    held: list[Any] = []
    for _ in range(100):
        batch = source.next_batch()
        assert set(np.unique(batch.data)) <= {0.0, 1.0, 2.0}
        np.add(batch.data, 100, out=batch.data)
        held = [*held[-2:], batch]


def test_the_empty_view_of_a_mutable_buffer_cannot_be_grown_under_us() -> None:
    assert whose(lambda: [np.arange(6.0)[2:2]]) == [False]


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
    arrays, _ = deliver(fetch, 1)
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
        results.extend(whose(lambda: [kept_array]))
        results.extend(whose(lambda: [np.arange(6.0)]))
        sys.setprofile(None)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert results == [False, True]
