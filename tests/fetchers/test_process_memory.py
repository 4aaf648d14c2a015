"""The shared memory of worker processes: how much there is, that it is used again, and what of a run is left; and seeds."""

from __future__ import annotations

import mmap
import os
import random
import socket
import sys
import threading
import types
from typing import Any

import numpy as np
import pytest
from fetchers.shared_between import CertifiedRows, rows_seen
from gates import await_true, register

import input_workers as iw
from input_workers.fetchers.arena import MAX_SPARE_EXTENTS, Arena
from input_workers.fetchers.fork_server import fork_server


def arenas() -> list[str]:
    """The descriptors of shared memory that this process has."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if "input_workers-" in target:
            found.append(target)
    return found


def mapped() -> int:
    with open("/proc/self/maps") as maps:
        return sum("input_workers-" in line for line in maps)


# What `CertifiedRows(width=300)` gives for 8 rows takes 19,264 bytes.
EXTENT = -(-19_264 // mmap.PAGESIZE) * mmap.PAGESIZE


def test_a_stalled_trainer_holds_no_more_memory_than_workers_and_buffers(coordinator: iw.GlobalCoordinator) -> None:
    stream = iw.Stream(CertifiedRows(4000, width=300), epochs=None, rows_per_request=8)
    source = register(coordinator, stream, 8, num_workers=2, fetchers="process", max_buffered_batches=3, device_queue_depth=2)
    coordinator.start()
    source.next_batch()
    await_true(lambda: source.stats().fetcher_blocked_seconds > 0.2)
    assert 3 <= source.stats().block_bytes / EXTENT <= 3 + 2 + 1 + 2 * MAX_SPARE_EXTENTS
    assert len(arenas()) == 2


def test_a_worker_costs_one_descriptor_however_many_chunks_wait_or_are_held(coordinator: iw.GlobalCoordinator) -> None:
    def fetch(worker_id: int, batch_size: int) -> Any:
        return [np.full((1, 5000), worker_id), np.array([worker_id])]  # one row a call, too large to be packed

    source = register(coordinator, fetch, 64, num_workers=2, fetchers="process", max_buffered_batches=8)
    coordinator.start()
    held = [source.next_batch() for _ in range(4)]
    await_true(lambda: source.stats().fetcher_blocked_seconds > 0)
    assert len(arenas()) == 2
    assert all((batch.data == batch.label[:, None]).all() for batch in held)


def test_memory_is_used_again_and_goes_with_the_run(coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: set[tuple[int, int]] = set()
    take = Arena.take

    def noted(arena: Arena, nbytes: int = 0) -> Any:
        extent = take(arena, nbytes)
        assert extent is not None
        taken.add((id(arena), extent.offset))
        return extent

    monkeypatch.setattr(Arena, "take", noted)
    stream = iw.Stream(CertifiedRows(4000, width=300), epochs=None, rows_per_request=8)
    source = register(coordinator, stream, 8, num_workers=2, fetchers="process", max_buffered_batches=2, device_queue_depth=2)
    coordinator.start()
    for _ in range(1000):
        rows_seen(source.next_batch())
    assert len(taken) <= 2 * (2 + 2 + 3 + MAX_SPARE_EXTENTS)  # all that wait may come from one worker
    held = source.next_batch()
    assert coordinator.stop()
    assert source.stats().block_bytes <= EXTENT
    rows_seen(held)
    del held
    assert source.stats().block_bytes == 0
    assert arenas() == []
    assert mapped() == 0


def test_a_burst_of_batches_that_the_trainer_lets_go_of_leaves_little(coordinator: iw.GlobalCoordinator) -> None:
    stream = iw.Stream(CertifiedRows(4000, width=300), epochs=None, rows_per_request=8)
    source = register(coordinator, stream, 8, num_workers=3, fetchers="process", max_buffered_batches=2, device_queue_depth=2)
    coordinator.start()
    held = [source.next_batch() for _ in range(100)]
    assert source.stats().block_bytes >= 100 * EXTENT
    for batch in held:
        rows_seen(batch)
    held.clear()
    del batch
    assert source.stats().block_bytes / EXTENT <= 2 + 2 + 3 + 3 * MAX_SPARE_EXTENTS


def test_a_label_that_is_kept_does_not_hold_the_pictures(coordinator: iw.GlobalCoordinator) -> None:
    stream = iw.Stream(CertifiedRows(800, width=300), rows_per_request=8)
    source = register(coordinator, stream, 8, fetchers="process", max_buffered_batches=2, device_queue_depth=2)
    coordinator.start()
    labels = [batch.label for batch in source]
    assert sorted(int(label) for each in labels for label in each) == [*range(800)]
    assert source.stats().block_bytes <= (MAX_SPARE_EXTENTS + 1) * EXTENT


def test_calls_that_fail_after_they_were_lent_memory_keep_none(coordinator: iw.GlobalCoordinator) -> None:
    class Fails(CertifiedRows):
        def fetch(self, rows: Any, request: Any) -> Any:
            out = request.out
            if out is not None:
                out[0][...] = 0
                if request.index % 2:
                    raise ValueError("after it has written")
            return super().fetch(rows, request)

    specs = [iw.ArraySpec((300,), np.int64), iw.ArraySpec((), np.int64)]
    source = register(
        coordinator, iw.Stream(Fails(1600, width=300), rows_per_request=8), 8, fetchers="process", specs=specs,
        max_buffered_batches=2, device_queue_depth=2, on_error=iw.ErrorPolicy(skip=True, retries=0),
    )  # fmt: skip
    coordinator.start()
    most = 0
    for batch in source:
        rows_seen(batch)
        most = max(most, source.stats().block_bytes)
    assert most / EXTENT <= 2 + 2 + 3 + MAX_SPARE_EXTENTS


def test_no_memory_for_a_chunk_is_an_error_of_the_call_that_names_it(coordinator: iw.GlobalCoordinator) -> None:
    def full(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    def before(request: Any) -> None:
        os.posix_fallocate = full  # in the worker, which allocates what it writes to

    source = register(coordinator, iw.Stream(CertifiedRows(40, before, 3000), rows_per_request=4), 4, fetchers="process")
    coordinator.start()
    with pytest.raises(iw.FetchFailed, match=r"Errno 28.*No space left on device: shared memory of \d+ bytes for a chunk"):
        source.next_batch()


def test_a_chunk_that_is_larger_than_all_memory_is_an_error_of_its_call(
    coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("input_workers.fetchers.arena.MAX_ARENA_BYTES", 1 << 16)
    source = register(coordinator, iw.Stream(CertifiedRows(40, width=3000), rows_per_request=4), 4, fetchers="process")
    coordinator.start()
    with pytest.raises(iw.FetchFailed, match=r"Errno 12.* no room for a chunk of \d+ bytes in the worker's shared memory"):
        source.next_batch()


def test_out_is_shared_memory_and_a_chunk_that_is_a_batch_is_not_copied(coordinator: iw.GlobalCoordinator) -> None:
    class Writes(CertifiedRows):
        def fetch(self, rows: Any, request: Any) -> Any:
            arrays = super().fetch(rows, request)
            out = request.out
            if out is None:
                return arrays
            for target, array in zip(out, arrays, strict=True):
                target[...] = array
            return out

    stream = iw.Stream(Writes(400, width=400), rows_per_request=8)
    source = register(
        coordinator, stream, 8, fetchers="process", specs=[iw.ArraySpec((400,), np.int64), iw.ArraySpec((), np.int64)]
    )
    coordinator.start()
    with open("/proc/self/maps") as maps:
        maps.read()
    for batch in source:
        rows_seen(batch)
        address = batch.data.ctypes.data
        with open("/proc/self/maps") as maps:
            lines = [line for line in maps if "input_workers-" in line]
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
        assert any(begin <= address < end for begin, end in ranges)


@pytest.mark.parametrize("start", ["forkserver", "spawn"])
def test_twenty_runs_leave_nothing(coordinator: iw.GlobalCoordinator, start: Any) -> None:
    source = register(coordinator, iw.Stream(CertifiedRows(64, width=300), rows_per_request=8), 8, num_workers=2,
                      fetchers=iw.Processes(start=start))  # fmt: skip
    counts = set()
    for _ in range(20 if start == "forkserver" else 4):
        coordinator.start()
        rows_seen(source.next_batch())
        assert coordinator.stop()
        counts.add((len(os.listdir("/proc/self/fd")), threading.active_count(), mapped()))
    assert len(counts) == 1, counts


def test_a_default_timeout_of_sockets_is_nobodys(coordinator: iw.GlobalCoordinator) -> None:
    socket.setdefaulttimeout(0.01)
    try:
        source = register(coordinator, iw.Stream(CertifiedRows(64), rows_per_request=8), 8, fetchers="process")
        coordinator.start()
        assert sum(len(rows_seen(batch)) for batch in source) == 64
    finally:
        socket.setdefaulttimeout(None)


class Random:
    """Rows of the random numbers that functions use without asking."""

    def __len__(self) -> int:
        return 120

    def fetch(self, rows: Any, request: Any) -> Any:
        return [rows, np.array([[random.random(), np.random.random(), torch_seed()] for _ in rows])]


def import_torch(worker_id: int) -> None:
    """Stands for a framework that the function has imported: loading the real one takes seconds."""
    torch = types.SimpleNamespace(seed=0)
    torch.manual_seed = lambda seed: setattr(torch, "seed", seed)
    sys.modules["torch"] = torch  # type: ignore[assignment]


def torch_seed() -> float:
    return float(sys.modules["torch"].seed)


def test_random_numbers_of_a_stream_depend_on_its_requests_alone() -> None:
    streams = []
    for workers in (1, 2, 5):
        coordinator = iw.GlobalCoordinator()
        source = register(
            coordinator,
            iw.Stream(Random(), seed=3, rows_per_request=6),
            6,
            num_workers=workers,
            fetchers=iw.Processes(worker_init_fun=import_torch),
        )
        with coordinator:
            streams.append(sorted((batch.data[0], batch.label.tobytes()) for batch in source))
    assert streams[0] == streams[1] == streams[2]
    assert len({label for _, label in streams[0]}) == 20


def test_workers_of_a_plain_function_do_not_share_their_seeds(coordinator: iw.GlobalCoordinator) -> None:
    def fetch(worker_id: int, batch_size: int) -> Any:
        if done:
            raise iw.EndOfData
        done.append(True)
        return [np.array([random.random(), np.random.random(), torch_seed()])[None], np.array([worker_id])]

    done: list[bool] = []
    fork_server.stop()  # another test may have had it import the real one, which is seeded by then
    source = register(coordinator, fetch, 1, num_workers=4, fetchers=iw.Processes(worker_init_fun=import_torch))
    coordinator.start()
    numbers = np.concatenate([batch.data for batch in source])
    assert len(numbers) == 4
    assert all(len(set(column)) == 4 for column in numbers.T.tolist())


class WritesInPlace:
    def __len__(self) -> int:
        return 10_000

    def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
        out = request.out
        if out is None:
            return [np.zeros((len(rows), 3000)), rows.copy()]
        out[0][:], out[1][:] = 0, rows
        return out


def test_waiting_for_a_block_is_no_time_of_the_function(coordinator: iw.GlobalCoordinator) -> None:
    source = register(coordinator, iw.Stream(WritesInPlace(), rows_per_request=8), 8, num_workers=2, fetchers="process",
                      max_buffered_batches=2, device_queue_depth=2)  # fmt: skip
    coordinator.start()
    source.next_batch()
    await_true(lambda: source.stats().fetcher_blocked_seconds > 2.0)
    for _ in range(20):
        source.next_batch()
    assert source.stats().fetcher_busy_seconds < 0.5
