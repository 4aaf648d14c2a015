"""Batches are laid out, sent and ended as the trainer asks, while sizes, feeds and epochs change."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from gates import HANG_SECONDS, await_true, register

import input_workers as iw


class ClosableFeed(iw.feeds.NumpyFeed):
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("epoch_end", ["run_on", "break"])
def test_a_feed_that_was_replaced_is_closed_when_its_last_batch_was_received(
    coordinator: iw.GlobalCoordinator, epoch_end: str
) -> None:
    rows = np.arange(10)
    stream = iw.Stream(iw.sources.Arrays(rows, rows), epochs=100, epoch_end=epoch_end, rows_per_request=2)
    before, after = ClosableFeed(), ClosableFeed()
    source = register(coordinator, stream, 4, feed=before, last_batch="keep")
    coordinator.start()
    for _ in range(3):
        source.next_batch()
    coordinator.reset_data_input("", "train", after, 5)
    sizes: list[int] = []
    while sizes.count(5) < 8:
        try:
            sizes.append(len(source.next_batch().data))
        except iw.EndOfData:
            continue
    assert 4 not in sizes[sizes.index(5) :]
    assert (before.closed, after.closed) == (1, 0)
    assert coordinator.stop()
    assert (before.closed, after.closed) == (1, 1)


def test_small_chunks_are_delivered_when_the_batch_is_made_as_small_as_what_there_is(
    coordinator: iw.GlobalCoordinator,
) -> None:
    goes_on = threading.Event()
    calls = iter(range(100))

    def fetch(worker_id: int, batch_size: int) -> Any:
        call = next(calls)
        if call == 2:
            goes_on.wait(HANG_SECONDS)
        if call == 20:
            raise iw.EndOfData
        return [np.arange(call * 4, call * 4 + 4)]

    source = register(coordinator, fetch, 12, input_names=["data"])
    coordinator.start()
    await_true(lambda: source.stats().rows_fetched == 8, "two chunks of four rows are there")
    coordinator.reset_data_input("", "train", "numpy", 8)
    try:
        assert source.next_batch(2.0).data.tolist() == list(range(8))
    finally:
        goes_on.set()
    assert [row for batch in source for row in batch.data.tolist()] == list(range(8, 80))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("rebatch", [True, False])
def test_in_order_a_request_that_is_skipped_whole_ends_nothing(
    coordinator: iw.GlobalCoordinator, rebatch: bool, workers: int
) -> None:
    class Rows:
        def __len__(self) -> int:
            return 16

        def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
            if set(rows.tolist()) & {4, 5, 6, 7}:
                raise OSError("cannot be read")
            return [rows.copy()]

    source = register(coordinator, iw.Stream(Rows(), rows_per_request=4), 4, input_names=["data"], num_workers=workers,
                      ordered=True, rebatch=rebatch, on_error=iw.ErrorPolicy(skip=True))  # fmt: skip
    coordinator.start()
    rows = [row for batch in source for row in batch.data.tolist()]
    assert rows == [0, 1, 2, 3, *range(8, 16)]
    assert source.stats().rows_dropped["skipped_error"] == 4
