"""Streams end to end: every row once an epoch, in its order, whoever fetches, however the epochs are cut."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from gates import HANG_SECONDS, register
from hypothesis import given, settings
from hypothesis import strategies as st

import input_workers as iw


def stream_of(rows: int, **more: Any) -> iw.Stream:
    numbers = np.arange(rows)
    return iw.Stream(iw.sources.Arrays(numbers, numbers * 2 + 1), **more)


def order_of(stream: iw.Stream, epoch: int) -> Any:
    return stream.plan("keep", [0]).rows(epoch, 0, len(stream.source))


@settings(max_examples=60)
@given(
    rows=st.integers(1, 40),
    batch=st.integers(1, 12),
    per_request=st.one_of(st.none(), st.integers(1, 15)),
    epochs=st.integers(1, 4),
    workers=st.sampled_from([0, 1, 7]),
    shuffle=st.booleans(),
    last=st.sampled_from(["drop", "keep", "pad"]),
    buffered=st.integers(1, 3),
)
def test_with_break_every_epoch_stands_for_itself(
    rows: int, batch: int, per_request: int | None, epochs: int, workers: int, shuffle: bool, last: str, buffered: int
) -> None:
    coordinator = iw.GlobalCoordinator()
    stream = stream_of(rows, epochs=epochs, epoch_end="break", rows_per_request=per_request, shuffle=shuffle, seed=7)
    source = register(coordinator, stream, batch, num_workers=workers, last_batch=last, max_buffered_batches=buffered,
                      device_queue_depth=2)  # fmt: skip
    with coordinator:
        for epoch in range(epochs):
            batches = list(source)
            delivered = [row for each in batches for row in each.data[: each.valid_rows].tolist()]
            full = rows if last != "drop" else rows - rows % batch
            assert len(delivered) == len(set(delivered)) == full
            assert set(delivered) <= set(range(rows))
            assert all((each.label == each.data * 2 + 1).all() for each in batches)
            assert [each.epoch for each in batches] == [epoch] * len(batches)
            if workers < 2:
                assert delivered == order_of(stream, epoch).tolist()[:full]
        assert list(source) == []
        assert list(source) == []
        stats = source.stats()
    assert stats.rows_fetched == rows * epochs
    assert stats.batches_delivered == epochs * (rows // batch + (1 if rows % batch and last != "drop" else 0))
    assert stats.rows_dropped["final_partial"] == epochs * (rows % batch if last == "drop" else 0)


@pytest.mark.parametrize("workers", [0, 1, 7])
@pytest.mark.parametrize("shuffle", [False, True])
def test_with_run_on_batches_cross_the_epochs_and_each_row_comes_once_in_each(
    coordinator: iw.GlobalCoordinator, workers: int, shuffle: bool
) -> None:
    stream = stream_of(50, epochs=3, shuffle=shuffle, rows_per_request=4)
    source = register(coordinator, stream, 8, num_workers=workers, last_batch="keep")
    coordinator.start()
    too_long = threading.Timer(HANG_SECONDS / 3, coordinator.stop)  # a hang in this thread, which fetches where workers is 0
    too_long.start()
    try:
        batches = list(source)
    finally:
        too_long.cancel()
    rows = [row for batch in batches for row in batch.data.tolist()]
    assert [len(batch.data) for batch in batches] == [8] * 18 + [6]
    assert sorted(rows) == sorted([*range(50)] * 3)
    if workers < 2:
        assert rows == [row for epoch in range(3) for row in order_of(stream, epoch).tolist()]
        assert [batch.epoch for batch in batches] == [number * 8 // 50 for number in range(19)]


def test_a_shuffle_depends_on_seed_and_epoch_alone() -> None:
    one, same, other = (stream_of(1000, shuffle=True, seed=seed) for seed in (1, 1, 2))
    assert order_of(one, 3).tolist() == order_of(same, 3).tolist()
    assert order_of(one, 3).tolist() != order_of(one, 4).tolist()
    assert order_of(one, 3).tolist() != order_of(other, 3).tolist()
    assert not order_of(one, 0).flags.writeable


class Recording:
    """A source of 30 rows that notes each request, and writes into `out` where that is offered."""

    def __init__(self) -> None:
        self.requests: dict[int, tuple[Any, ...]] = {}
        self.used_out = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return 30

    def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
        values = request.rng.integers(0, 1 << 40, len(rows))
        with self._lock:
            assert request.index not in self.requests, "asked twice"
            self.requests[request.index] = (request.epoch, rows.tolist(), request.batch_size, values.tolist())
            assert rows.dtype == np.int64
            assert not rows.flags.writeable
        if request.out is None:
            return [rows.copy(), values]
        self.used_out += 1
        request.out[0][:], request.out[1][:] = rows, values
        return request.out


def test_requests_are_numbered_over_all_epochs_and_their_random_numbers_do_not_depend_on_who_fetches() -> None:
    seen = []
    for workers in (0, 1, 7):
        coordinator = iw.GlobalCoordinator()
        recording = Recording()
        stream = iw.Stream(recording, shuffle=True, seed=5, epochs=4, rows_per_request=7)
        source = register(coordinator, stream, 6, num_workers=workers)
        with coordinator:
            delivered = {(batch.epoch // 99, row, value) for batch in source for row, value in zip(*batch, strict=True)}
        assert sorted(recording.requests) == list(range(4 * 5))
        assert all(epoch == index // 5 for index, (epoch, *_) in recording.requests.items())
        assert {len(rows) for _, rows, *_ in recording.requests.values()} == {7, 2}
        assert len(delivered) == 120
        assert recording.used_out >= 10
        seen.append((recording.requests, delivered))
    assert seen[0] == seen[1] == seen[2]


def test_batches_made_in_lent_memory_are_not_written_over_while_they_are_held(coordinator: iw.GlobalCoordinator) -> None:
    numbers = np.arange(4000).reshape(400, 10)
    source = register(coordinator, iw.Stream(iw.sources.Arrays(numbers, numbers[:, 0]), epochs=5), 16, num_workers=2,
                      last_batch="keep", max_buffered_batches=2)  # fmt: skip
    coordinator.start()
    held = [(batch, batch.data.copy()) for batch in source]
    assert sum(len(batch.data) for batch, _ in held) == 2000
    for batch, before in held:
        assert (batch.data == before).all()
        assert (batch.data[:, 0] == batch.label).all()


@pytest.mark.parametrize("size", [0, 3, 9])
def test_a_source_that_returns_another_number_of_rows_than_was_asked_for_is_an_error(
    coordinator: iw.GlobalCoordinator, size: int
) -> None:
    class Wrong:
        def __len__(self) -> int:
            return 20

        def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
            count = 4 if request.index < 2 else size
            return [np.zeros(count), np.zeros(count)]

    source = register(coordinator, iw.Stream(Wrong(), rows_per_request=4), 4)
    coordinator.start()
    source.next_batch()
    source.next_batch()
    with pytest.raises(iw.FetchFailed, match=rf"request 2: SpecMismatch: .*got {size} rows; wanted exactly the 4") as caught:
        source.next_batch()
    assert "request: 2 (epoch 0)" in caught.value.__notes__


@pytest.mark.parametrize("error", [iw.EndOfData(), StopIteration(), OSError("disk gone")])
def test_an_error_of_a_source_names_the_request_and_is_never_an_end(
    coordinator: iw.GlobalCoordinator, error: Exception
) -> None:
    class Broken(Recording):
        def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
            if request.index == 3:
                raise error
            return [rows.copy(), rows.copy()]

    source = register(coordinator, iw.Stream(Broken(), rows_per_request=5), 5)
    coordinator.start()
    for _ in range(3):
        source.next_batch()
    for _ in range(2):
        with pytest.raises(iw.FetchFailed, match=r"source 'train', worker 0, request 3: "):
            next(source)


@pytest.mark.parametrize("depth", [1, 4])
def test_epochs_that_give_no_batch_do_not_run_ahead_of_the_trainer(coordinator: iw.GlobalCoordinator, depth: int) -> None:
    far_ahead = threading.Event()

    class Small(Recording):
        def __len__(self) -> int:
            return 3

        def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
            if request.epoch > 100:
                far_ahead.set()
            return [rows.copy(), rows.copy()]

    stream = iw.Stream(Small(), epochs=None, epoch_end="break")
    source = register(coordinator, stream, 5, device_queue_depth=depth, max_buffered_batches=2)
    coordinator.start()
    assert not far_ahead.wait(0.3)
    assert all(list(source) == [] for _ in range(10))


def test_a_stop_amid_several_epochs_keeps_the_ledger(coordinator: iw.GlobalCoordinator) -> None:
    stream = stream_of(8, epochs=None, epoch_end="break", rows_per_request=2)
    source = register(coordinator, stream, 4, device_queue_depth=1)
    for _ in range(5):
        coordinator.start()
        waiting = threading.Event()
        while source.stats().fetcher_blocked_seconds == 0 and not waiting.wait(0.001):
            pass
        assert coordinator.stop()
        assert coordinator.last_stop.failures == {}
        assert source.stats().rows_in_flight == 0
