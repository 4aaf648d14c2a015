"""What a batch is: its size, axes and last one; without re-chunking; inline; within the bounds; under a changing size."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
import pytest
from gates import HANG_SECONDS, Gate, await_true, register
from hypothesis import given, settings
from hypothesis import strategies as st
from self_certifying import CertifiedFetch, Witness, make_chunk

import input_workers as iw


def end_of_data() -> Any:
    raise iw.EndOfData


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 30), max_size=15),
    batch_size=st.integers(1, 12),
    last=st.sampled_from(["drop", "keep", "pad"]),
    axes=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    workers=st.integers(0, 3),
    buffered=st.integers(1, 3),
)
def test_every_batch_is_exact_and_the_last_one_is_as_was_asked(
    lengths: list[int], batch_size: int, last: str, axes: tuple[int, int], workers: int, buffered: int
) -> None:
    coordinator = iw.GlobalCoordinator()
    fetch = CertifiedFetch(lambda w, call: lengths[call] if call < len(lengths) else None, end_of_data, axes=axes)
    source = register(coordinator, fetch, batch_size, num_workers=workers, batch_axes=axes, last_batch=last,
                      max_buffered_batches=buffered, device_queue_depth=1)  # fmt: skip
    total = sum(lengths) * max(1, workers)
    witness = Witness(axes=axes)
    with coordinator:
        batches = list(source)
        stats = source.stats()
    rest = total % batch_size
    assert len(batches) == total // batch_size + (1 if rest and last != "drop" else 0)
    for number, batch in enumerate(batches):
        is_rest = rest and last != "drop" and number == len(batches) - 1
        assert batch.valid_rows == (rest if is_rest else batch_size)
        shown = rest if is_rest and last == "keep" else batch_size
        assert [array.shape[axis] for array, axis in zip(batch, axes, strict=True)] == [shown, shown]
        assert all(array.flags.carray for array in batch)
        real = [np.take(array, range(batch.valid_rows), axis) for array, axis in zip(batch, axes, strict=True)]
        witness.see(real, batch.valid_rows)
        for array, axis in zip(batch, axes, strict=True):
            padding = np.take(array, range(batch.valid_rows, shown), axis)
            assert (padding == np.take(array, [batch.valid_rows - 1], axis)).all()
    assert stats.rows_fetched == total
    assert stats.rows_delivered == witness.rows == total - (rest if last == "drop" else 0)
    assert stats.rows_dropped["final_partial"] == (rest if last == "drop" else 0)
    assert stats.rows_padded == (batch_size - rest if rest and last == "pad" else 0)
    assert stats.batches_delivered == len(batches)


def test_a_batch_is_a_named_tuple_with_its_epoch_and_its_real_rows(coordinator: iw.GlobalCoordinator) -> None:
    source = register(coordinator, CertifiedFetch(lambda worker, call: 4, end_of_data))
    coordinator.start()
    batch = source.next_batch()
    data, label = batch
    assert (batch._fields, batch.epoch, batch.valid_rows) == (("data", "label"), 0, 4)
    assert batch.data is data
    assert batch.label is label
    assert isinstance(batch, tuple)


def test_without_rebatching_chunks_come_as_they_are_and_bounds_count_chunks(coordinator: iw.GlobalCoordinator) -> None:
    lengths = [5, 1, 300, 7, 2, 4, 9, 1]
    made = threading.Semaphore(0)

    def length(worker: int, call: int) -> int | None:
        made.release()
        return lengths[call] if call < len(lengths) else None

    source = register(coordinator, CertifiedFetch(length, end_of_data), 4, rebatch=False, max_buffered_batches=2,
                      device_queue_depth=1)  # fmt: skip
    coordinator.start()
    # One on the device, one with the enqueuer, two in the queue, one at the door, one asked for by nobody.
    await_true(lambda: source.stats().fetcher_blocked_seconds > 0, "a full queue")
    assert source.stats().rows_fetched <= sum(lengths[:6])
    witness = Witness()
    assert [len(witness.see(batch)) for batch in source] == lengths
    assert source.stats().rows_dropped == {"final_partial": 0, "stopped": 0, "skipped_error": 0, "device_error": 0}


@pytest.mark.parametrize("rows", [1, 1000])
@pytest.mark.parametrize("bound", ["batches", "bytes"])
def test_what_waits_stays_within_the_bounds_while_nobody_reads(
    coordinator: iw.GlobalCoordinator, bound: str, rows: int
) -> None:
    row_nbytes, batch, workers, depth = 2 * 7 * 8, 100, 3, 2
    buffered = 5 if bound == "batches" else 1000
    limit = 5 * batch * row_nbytes
    fetch = CertifiedFetch(lambda worker, call: rows, end_of_data)
    source = register(coordinator, fetch, batch, num_workers=workers, max_buffered_batches=buffered, device_queue_depth=depth,
                      max_buffered_bytes=limit if bound == "bytes" else None)  # fmt: skip
    coordinator.start()
    await_true(lambda: len(source._core.run.assembly._waiters) == workers, "every fetcher at the door")
    stats = source.stats()
    assert stats.queue_bytes <= max(limit, rows * row_nbytes)
    held = stats.rows_fetched * row_nbytes
    assert held <= max(limit, rows * row_nbytes) + (workers + 1) * rows * row_nbytes + (depth + 2) * batch * row_nbytes


def test_held_batches_are_the_trainers_and_keep_their_values(coordinator: iw.GlobalCoordinator) -> None:
    fetch = CertifiedFetch(lambda worker, call: 1 + call % 40 if call < 300 else None, end_of_data)
    source = register(coordinator, fetch, 16, num_workers=2, device_queue_depth=1)
    coordinator.start()
    held = list(source)
    witness = Witness()
    for batch in held:
        witness.see(batch, 16)
    assert len(held) > 300


def test_batch_size_may_change_a_thousand_times_under_load(coordinator: iw.GlobalCoordinator) -> None:
    hints: set[int] = set()
    inner = CertifiedFetch(lambda worker, call: 1 + (call * 7) % 23, end_of_data)

    def fetch(worker_id: int, batch_size: int) -> Any:
        hints.add(batch_size)
        return inner(worker_id, batch_size)

    source = register(coordinator, fetch, 8, num_workers=2, max_buffered_batches=2, device_queue_depth=2)
    coordinator.start()
    sizes = [1, 8, 3, 64, 5]
    witness = Witness()
    seen = set()
    for number in range(1000):
        coordinator.reset_data_input("", "train", "numpy", sizes[number % len(sizes)])
        batch = source.next_batch()
        assert batch.valid_rows in sizes
        seen.add(batch.valid_rows)
        witness.see(batch, batch.valid_rows)
    coordinator.reset_data_input("", "train", "numpy", 6)
    assert 6 in itertools.islice((witness.see(source.next_batch()).shape[0] for _ in range(12)), 12)
    assert len(seen) > 1
    assert hints > {8}, "the hint follows"


def test_a_smaller_batch_size_is_served_at_once_from_the_rows_that_wait(coordinator: iw.GlobalCoordinator) -> None:
    gate = Gate()
    source = register(coordinator, gate, 10)
    coordinator.start()
    gate.release(5)
    gate.await_calls()
    with pytest.raises(iw.WaitTimeout):
        source.next_batch(0.05)
    coordinator.reset_data_input("", "train", "numpy", 5)
    assert source.next_batch(5.0).valid_rows == 5
    gate.open()


def test_reset_data_input_refuses_what_is_not_there(coordinator: iw.GlobalCoordinator) -> None:
    register(coordinator, Gate())
    for scope, name, feed, size in (("", "tset", "numpy", 4), ("gpu_0", "train", "numpy", 4), ("", "train", "numpi", 4),
                                    ("", "train", "numpy", 0)):  # fmt: skip
        with pytest.raises(iw.ConfigError):
            coordinator.reset_data_input(scope, name, feed, size)


def test_with_no_workers_everything_runs_in_the_readers_thread(coordinator: iw.GlobalCoordinator) -> None:
    threads: set[threading.Thread] = set()
    inner = CertifiedFetch(lambda worker, call: 6 if call < 10 else None, end_of_data)

    def fetch(worker_id: int, batch_size: int) -> Any:
        threads.add(threading.current_thread())
        return inner(worker_id, batch_size)

    source = register(coordinator, fetch, 4, num_workers=0)
    coordinator.start()
    assert not inner.made, "nothing runs before it is asked for"
    witness = Witness()
    assert sum(len(witness.see(batch, 4)) for batch in source) == 60
    assert threads == {threading.current_thread()}
    for _ in range(2):
        with pytest.raises(iw.EndOfData):
            source.next_batch()


def test_with_no_workers_a_poll_makes_one_call_and_a_failure_is_sticky(coordinator: iw.GlobalCoordinator) -> None:
    results: list[Any] = [None, make_chunk(0, 0, 3), make_chunk(0, 1, 1), ValueError("bad file")]

    def fetch(worker_id: int, batch_size: int) -> Any:
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    source = register(coordinator, fetch, 4, num_workers=0)
    coordinator.start()
    for left in (3, 2):
        with pytest.raises(iw.WaitTimeout):
            source.next_batch(0)
        assert len(results) == left
    assert source.next_batch(0).valid_rows == 4
    for _ in range(2):
        with pytest.raises(iw.FetchFailed) as caught:
            source.next_batch()
        assert isinstance(caught.value.__cause__, ValueError)


def test_specs_are_as_given_or_learnt_from_the_first_chunk(coordinator: iw.GlobalCoordinator) -> None:
    wanted = (iw.ArraySpec((7,), np.int64),) * 2
    gate = Gate()
    source = register(coordinator, gate)
    given = register(coordinator, gate, name="given", specs=wanted)
    assert given.specs() == wanted, "before the start"
    coordinator.start()
    with pytest.raises(iw.WaitTimeout):
        source.specs(0.02)
    gate.release(1, coordinator.get_worker_ids()[0])
    assert source.specs() == wanted
    gate.open()


def test_specs_of_a_source_without_workers_are_learnt_by_asking(coordinator: iw.GlobalCoordinator) -> None:
    source = register(coordinator, CertifiedFetch(lambda worker, call: 4, end_of_data), num_workers=0)
    coordinator.start()
    assert source.specs(HANG_SECONDS / 10) == (iw.ArraySpec((7,), np.int64),) * 2
    assert Witness().see(source.next_batch(), 4)[0, 2] == 0, "the first chunk is still there"
