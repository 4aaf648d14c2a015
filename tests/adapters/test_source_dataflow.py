"""A source as a DataFlow: epochs, rows or batches, its length, its ends."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fetchers.shared_between import CertifiedRows, certified_rows
from gates import Gate, register

import input_workers as iw
from input_workers.adapters import dataflow
from input_workers.adapters.dataflow import SourceDataFlow


def numbers_of(points: Any, rows: bool) -> list[int]:
    """Check every data point; return the row numbers."""
    seen = []
    for data, label in points:
        wanted = certified_rows([label] if rows else label)
        assert (np.reshape(data, (-1, 1)) == wanted[0]).all(), "torn"
        seen += [int(label)] if rows else [int(number) for number in label]
    return seen


@pytest.mark.parametrize("last_batch", ["drop", "keep", "pad"])
@pytest.mark.parametrize("rows", [True, False])
def test_each_iter_is_an_epoch_of_as_many_data_points_as_it_says(
    coordinator: iw.GlobalCoordinator, rows: bool, last_batch: str
) -> None:
    stream = iw.Stream(CertifiedRows(23), shuffle=True, epochs=None, epoch_end="break")
    df = SourceDataFlow(register(coordinator, stream, 5, num_workers=3, ordered=True, last_batch=last_batch), rows)
    coordinator.start()
    df.reset_state()
    orders = []
    for _ in range(4):
        points = list(df)
        assert (
            len(points)
            == len(df)
            == {"drop": 20, "keep": 23, "pad": 23}[last_batch] // (1 if rows else 5) + (not rows and last_batch != "drop")
        )
        orders.append(numbers_of(points, rows))
        df.reset_state()  # as often as you like
        assert set(orders[-1]) <= {*range(23)}
        if last_batch == "keep" or rows:
            assert len(set(orders[-1])) == len(orders[-1])
    assert len({tuple(order) for order in orders}) == 4, "each epoch has an order of its own"


def test_what_has_no_known_length_says_so_as_tensorpack_does(coordinator: iw.GlobalCoordinator) -> None:
    stream = iw.Stream(CertifiedRows(23), epochs=None)
    sources: dict[str, Any] = {
        "a function": Gate(),
        "no end": stream,
        "a mix": iw.sources.Mix({"a": (stream, 1)}),
    }
    for name, fetch in sources.items():
        with pytest.raises(NotImplementedError):
            len(SourceDataFlow(register(coordinator, fetch, name=name)))
    all_epochs = register(coordinator, iw.Stream(CertifiedRows(23), epochs=3), 5, name="all epochs")
    assert len(SourceDataFlow(all_epochs)) == 13
    assert len(SourceDataFlow(all_epochs, rows=True)) == 65
    sharded = register(coordinator, iw.Stream(CertifiedRows(23), shard=(1, 2)), 5, name="a shard", last_batch="keep")
    assert len(SourceDataFlow(sharded)) == 3


def test_an_iter_goes_on_where_the_one_before_has_stopped(coordinator: iw.GlobalCoordinator) -> None:
    stream = iw.Stream(CertifiedRows(20), epochs=2, epoch_end="break")
    df = SourceDataFlow(register(coordinator, stream, 5, ordered=True), rows=True)
    coordinator.start()
    first = [point for _, point in zip(range(5), df, strict=False)]
    assert numbers_of(first, True) == [0, 1, 2, 3, 4]
    assert numbers_of(df, True) == [*range(5, 20)]  # the next batch
    halves = [point for _, point in zip(range(20), df, strict=False)]  # all rows of the epoch, but not yet its end
    assert numbers_of(halves, True) == [*range(20)]
    assert list(df) == [], "the end of that epoch"


def test_a_round_too_many_is_an_error_not_an_endless_loop(coordinator: iw.GlobalCoordinator) -> None:
    stream = iw.Stream(CertifiedRows(20), epochs=2, epoch_end="break")
    df = SourceDataFlow(register(coordinator, stream, 5))
    coordinator.start()
    assert [len(list(df)) for _ in range(2)] == [4, 4]
    for _ in range(2):
        with pytest.raises(iw.EndOfData, match="no data left for another `iter`"):
            list(df)


def test_an_iterator_whose_end_was_seen_stays_at_it(coordinator: iw.GlobalCoordinator) -> None:
    df = SourceDataFlow(register(coordinator, iw.Stream(CertifiedRows(20), epochs=2, epoch_end="break"), 5))
    coordinator.start()
    points = iter(df)
    assert len(list(points)) == 4
    assert list(points) == []
    assert len(list(df)) == 4


def test_a_wait_that_takes_too_long_leaves_the_iterator_as_it_was(coordinator: iw.GlobalCoordinator) -> None:
    gate = Gate()
    points = iter(SourceDataFlow(register(coordinator, gate, 4, timeout_s=0.05)))
    coordinator.start()
    with pytest.raises(iw.WaitTimeout):
        next(points)
    gate.release(4)
    assert len(next(points)) == 2
    gate.end()
    assert coordinator.stop()


def test_a_stop_is_no_end(coordinator: iw.GlobalCoordinator) -> None:
    df = SourceDataFlow(register(coordinator, iw.Stream(CertifiedRows(20), epochs=None), 4))
    coordinator.start()
    points = iter(df)
    next(points)
    coordinator.stop()
    with pytest.raises(iw.QueueClosed):
        next(points)


def test_rows_lie_along_each_input_s_axis_and_padding_is_none(coordinator: iw.GlobalCoordinator) -> None:
    def fetch(worker_id: int, batch_size: int) -> Iterator[Any]:
        yield [np.arange(21).reshape(3, 7), np.arange(7)]

    generators = iw.sources.Generators(lambda worker_id: fetch(worker_id, 5))
    source = register(coordinator, generators, 5, batch_axes=[1, 0], last_batch="pad")
    coordinator.start()
    points = list(iter(SourceDataFlow(source, rows=True)))
    assert [(data.tolist(), int(label)) for data, label in points] == [([n, n + 7, n + 14], n) for n in range(7)]


def test_it_can_be_read_by_workers_again_and_by_devices(coordinator: iw.GlobalCoordinator) -> None:
    source = register(coordinator, iw.Stream(CertifiedRows(30)), 5, name_scope="a")
    register(coordinator, source._core.settings.fetch_fun, 5, name_scope="b")
    second = iw.GlobalCoordinator()
    coordinator.start()
    flows = [SourceDataFlow(coordinator[f"{name}/train"], rows=True) for name in "ab"]
    for name, flow in zip("ab", flows, strict=True):
        with pytest.raises(NotImplementedError, match="2 devices"):
            len(flow)
        register(second, dataflow.fetch(lambda _, flow=flow: dataflow.map(flow, list)), 3, name=name)
    with second:
        seen = [int(number) for name in "ab" for batch in second[name] for number in batch.label]
    assert collections.Counter(seen) == dict.fromkeys(range(30), 1)


def test_a_fork_cannot_read_it(coordinator: iw.GlobalCoordinator, no_other_threads: None) -> None:
    df = SourceDataFlow(register(coordinator, iw.Stream(CertifiedRows(30)), 5))
    coordinator.start()
    pid = os.fork()
    if not pid:
        try:
            next(iter(df))
        except iw.LifecycleError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert len(numbers_of(df, False)) == 30


def test_something_else_than_a_source_is_a_config_error(coordinator: iw.GlobalCoordinator) -> None:
    with pytest.raises(iw.ConfigError, match="got GlobalCoordinator"):
        SourceDataFlow(coordinator)  # type: ignore[arg-type]
