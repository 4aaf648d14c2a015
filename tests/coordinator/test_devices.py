"""Several devices on one source: strict rotation, equal shares, and ends that reach all of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from gates import Gate, register
from self_certifying import CertifiedFetch, check_batch

import input_workers as iw


def end_of_data() -> Any:
    raise iw.EndOfData


def with_devices(coordinator: iw.GlobalCoordinator, fetch: Any, count: int, sizes: Any = (4,), **more: Any) -> list[Any]:
    for number in range(count):
        register(coordinator, fetch, sizes[number % len(sizes)], name_scope=f"gpu_{number}", **more)
    return [coordinator[f"gpu_{number}/train"] for number in range(count)]


def read_all(devices: list[Any]) -> list[list[list[list[int]]]]:
    with ThreadPoolExecutor(len(devices)) as pool:
        return list(pool.map(lambda device: [check_batch(batch).tolist() for batch in device], devices))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("chunks", [1, 7, 50, 51])
def test_batches_are_dealt_in_strict_rotation_and_every_device_gets_as_many(
    coordinator: iw.GlobalCoordinator, count: int, chunks: int
) -> None:
    # One worker each is added by each call; only one has data, so that there is one order.
    fetch = CertifiedFetch(lambda worker, call: 3 if call < chunks and worker == 0 else None, end_of_data)
    devices = with_devices(coordinator, fetch, count)
    coordinator.start()
    got = read_all(devices)
    full = chunks * 3 // 4 // count
    assert [len(batches) for batches in got] == [full] * count
    rows = [row for turn in zip(*got, strict=True) for batch in turn for row in batch]
    assert [row[2] * 3 + row[3] for row in rows] == list(range(full * count * 4))
    stats = coordinator["train"].stats()
    assert stats.rows_dropped["final_partial"] == chunks * 3 - full * count * 4
    assert [each.rows_delivered for each in stats.devices.values()] == [full * 4] * count


def test_with_keep_every_row_is_delivered_although_shares_may_differ(coordinator: iw.GlobalCoordinator) -> None:
    fetch = CertifiedFetch(lambda worker, call: 3 if call < 7 and worker == 0 else None, end_of_data)
    devices = with_devices(coordinator, fetch, 2, last_batch="keep")
    coordinator.start()
    got = read_all(devices)
    assert [[len(batch) for batch in batches] for batches in got] == [[4, 4, 4], [4, 4, 1]]


def test_devices_may_have_batches_of_unlike_sizes(coordinator: iw.GlobalCoordinator) -> None:
    fetch = CertifiedFetch(lambda worker, call: 5 if call < 30 and worker == 0 else None, end_of_data)
    devices = with_devices(coordinator, fetch, 2, sizes=(2, 7))
    coordinator.start()
    got = read_all(devices)
    assert [{len(batch) for batch in batches} for batches in got] == [{2}, {7}]
    assert [len(batches) for batches in got] == [16, 16]


@pytest.mark.parametrize("stopped", [0, 1, 2])
def test_a_device_that_is_stopped_leaves_the_rotation_and_the_others_share_the_rest(
    coordinator: iw.GlobalCoordinator, stopped: int
) -> None:
    gate = Gate()
    devices = with_devices(coordinator, gate, 3)
    coordinator.start()
    gate.release(12)
    batches = [device.next_batch() for device in devices]
    assert [len(batch.data) for batch in batches] == [4] * 3
    devices[stopped].stop()
    with pytest.raises(iw.QueueClosed):
        devices[stopped].next_batch()
    others = [device for device in devices if device is not devices[stopped]]
    gate.release(80)
    for _ in range(9):
        for device in others:
            assert len(device.next_batch().data) == 4
    gate.open(lambda worker_id: end_of_data())
    counts = [len(batches) for batches in read_all(others)]
    assert counts[0] == counts[1]


def test_a_complete_batch_is_not_held_back_for_a_device_that_was_stopped(coordinator: iw.GlobalCoordinator) -> None:
    gate = Gate()
    devices = with_devices(coordinator, gate, 2)
    coordinator.start()
    gate.await_calls(2)
    gate.release(4)
    gate.await_calls(2)
    with pytest.raises(iw.WaitTimeout):
        devices[0].next_batch(0.05)
    devices[1].stop()
    assert len(devices[0].next_batch(5.0).data) == 4
    gate.open(lambda worker_id: end_of_data())


def test_stopping_every_device_ends_the_source(coordinator: iw.GlobalCoordinator) -> None:
    devices = with_devices(coordinator, CertifiedFetch(lambda worker, call: 4, end_of_data), 2)
    coordinator.start()
    for device in devices:
        device.next_batch()
    for device in devices:
        device.stop()
    for device in devices:
        with pytest.raises(iw.QueueClosed):
            device.next_batch()
    assert coordinator["train"].stop()


def test_a_failure_reaches_every_device(coordinator: iw.GlobalCoordinator) -> None:
    def fail() -> Any:
        raise OSError("disk gone")

    devices = with_devices(coordinator, CertifiedFetch(lambda worker, call: None, fail), 3)
    coordinator.start()
    for device in devices * 2:
        with pytest.raises(iw.FetchFailed) as caught:
            device.next_batch()
        assert isinstance(caught.value.__cause__, OSError)


def test_the_end_of_each_epoch_reaches_every_device(coordinator: iw.GlobalCoordinator) -> None:
    import numpy as np

    rows = np.arange(24)
    stream = iw.Stream(iw.sources.Arrays(rows, rows), epochs=3, epoch_end="break", rows_per_request=5)
    devices = with_devices(coordinator, stream, 2)
    coordinator.start()
    for epoch in range(3):
        seen = []
        for device in devices:
            batches = list(device)
            assert [batch.epoch for batch in batches] == [epoch] * 3
            seen += [row for batch in batches for row in batch.data.tolist()]
        assert sorted(seen) == rows.tolist()
    assert [list(device) for device in devices] == [[], []]


def test_the_source_itself_names_its_devices_instead_of_choosing_one(coordinator: iw.GlobalCoordinator) -> None:
    fetch = CertifiedFetch(lambda worker, call: 4, end_of_data)
    source = register(coordinator, fetch, name_scope="gpu_0")
    with pytest.raises(iw.LifecycleError):
        source.next_batch()
    register(coordinator, fetch, name_scope="gpu_1")
    coordinator.start()
    for read in (source.next_batch, lambda: iter(source), lambda: next(source)):
        with pytest.raises(iw.ConfigError, match=r"gpu_0/train.*gpu_1/train"):
            read()
    assert source.stats().rows_delivered == 0


def test_a_further_device_must_agree_with_the_first_and_its_workers_add_up(coordinator: iw.GlobalCoordinator) -> None:
    fetch = CertifiedFetch(lambda worker, call: 4, end_of_data)
    register(coordinator, fetch, name_scope="gpu_0", num_workers=2)
    register(coordinator, fetch, 8, name_scope="gpu_1", num_workers=3)
    assert len(coordinator.get_worker_ids()) == 5
    for differing, more in (
        ("fetch_fun", {"fetch": lambda worker_id, batch_size: None}),
        ("input_names", {"input_names": ["image", "label"]}),
        ("max_buffered_batches", {"max_buffered_batches": 3}),
        ("last_batch", {"last_batch": "keep"}),
        ("timeout_s", {"timeout_s": 1.0}),
    ):
        with pytest.raises(iw.ConfigError, match=f"another {differing}"):
            register(coordinator, **{"fetch": fetch, "name_scope": "gpu_2", **more})
    with pytest.raises(iw.ConfigError, match="gpu_0/train' is registered already"):
        register(coordinator, fetch, name_scope="gpu_0")
    assert len(coordinator.get_worker_ids()) == 5
    coordinator.start()
    with pytest.raises(iw.LifecycleError, match="running"):
        register(coordinator, fetch, name_scope="gpu_2")
    with pytest.raises(KeyError, match="gpu_9/train"):
        coordinator["gpu_9/train"]
