"""SharedArrays: one memory for all processes, which none can write to but the owner's, and nothing of it is left."""

from __future__ import annotations

import gc
import os
import pathlib
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fetchers.shared_between import Door, certified_rows, rows_seen
from gates import register

import input_workers as iw
from input_workers import leases
from input_workers.fetchers.fork_server import fork_server
from input_workers.sources import SharedArrays

STARTS = ["forkserver", "spawn", "fork"]
ROWS = 300
MB = 1 << 20


@pytest.fixture
def shared() -> Iterator[SharedArrays]:
    with SharedArrays(*certified_rows(np.arange(ROWS), 5)) as shared:
        yield shared


def in_other_process(code: str, pickled: bytes = b"") -> str:
    """Run code that has the bytes as `pickled` in a Python of its own; return what it printed."""
    code = f"import os, pickle, sys\npickled = bytes.fromhex({pickled.hex()!r})\n{code}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.usefixtures("no_other_threads")
@pytest.mark.parametrize("fetchers", [*(iw.Processes(start=start) for start in STARTS), "thread"])  # type: ignore[arg-type]
@pytest.mark.parametrize("ordered", [False, True])
def test_a_stream_over_shared_arrays_has_every_row_in_any_worker(
    coordinator: iw.GlobalCoordinator, shared: SharedArrays, fetchers: Any, ordered: bool
) -> None:
    stream = iw.Stream(shared, shuffle=True, rows_per_request=16, epochs=3)
    source = register(coordinator, stream, 32, num_workers=2, fetchers=fetchers, ordered=ordered, last_batch="keep")
    coordinator.start()
    seen = [row for batch in source for row in rows_seen(batch)]
    assert sorted(seen) == sorted([*range(ROWS)] * 3)


def test_a_stream_over_shared_arrays_has_every_row_without_workers(
    coordinator: iw.GlobalCoordinator, shared: SharedArrays
) -> None:
    source = register(coordinator, iw.Stream(shared), 32, num_workers=0, last_batch="keep")
    coordinator.start()
    assert [row for batch in source for row in rows_seen(batch)] == [*range(ROWS)]


def test_a_fetch_function_reads_them_as_they_are_and_cannot_write(
    coordinator: iw.GlobalCoordinator, shared: SharedArrays
) -> None:
    def fetch(worker_id: int, batch_size: int) -> list[Any]:
        for array in shared.arrays:
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
            with pytest.raises(ValueError, match="WRITEABLE"):
                array.flags.writeable = True
            assert not array.flags.owndata
        return [array[:7] for array in shared.arrays]

    source = register(coordinator, fetch, 7, fetchers="process")
    coordinator.start()
    assert rows_seen(source.next_batch()) == [*range(7)]
    shared.arrays[1][...] += 1000
    while not (source.next_batch().label == [*range(1000, 1007)]).all():  # after those that were fetched before
        assert source.stats().rows_delivered < 7 * 2000, "a worker does not see what the owner has written"


def memory_of(pid: int) -> dict[str, float]:
    """Return kinds of memory of a process in MB."""
    lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text() + pathlib.Path(f"/proc/{pid}/status").read_text()
    fields = (line.split() for line in lines.splitlines() if line.endswith(" kB"))
    return {name.rstrip(":"): int(value) / 1024 for name, value, _ in fields}


def test_workers_share_the_memory_instead_of_having_copies(coordinator: iw.GlobalCoordinator, door: Door) -> None:
    fork_server.stop()  # what another test has had it import would count as memory of the workers
    with SharedArrays(np.arange(96 * MB // 8).reshape(-1, 8)) as shared:
        total = int(shared.arrays[0].sum())

        def fetch(worker_id: int, batch_size: int) -> list[Any]:
            read = int(shared.arrays[0].sum())  # every page of it
            door.knock()  # type: ignore[attr-defined]  # in a worker it is a Knocker
            return [np.full(1, read), np.zeros(1)]

        source = register(coordinator, fetch, 1, num_workers=3, fetchers="process")
        coordinator.start()
        pids = [door.await_knock()[0] for _ in range(3)]  # all have read it by then
        workers = [memory_of(pid) for pid in pids]
        assert all(each["RssShmem"] > 95 and each["RssAnon"] < 80 for each in workers), f"a copy of its own: {workers}"
        at_all = sum(memory_of(pid)["Pss_Shmem"] for pid in (os.getpid(), *pids))
        assert 95 < at_all < 110, f"{at_all} MB: more than one copy"
        door.open()
        assert int(source.next_batch().data[0]) == total


def test_a_worker_that_takes_the_place_of_a_dead_one_maps_them_again(
    coordinator: iw.GlobalCoordinator, shared: SharedArrays, door: Door
) -> None:
    class Knocking:
        def __init__(self) -> None:
            self.shared, self.door = shared, door

        def __len__(self) -> int:
            return ROWS

        def fetch(self, rows: Any, request: Any) -> Any:
            if request.index in (0, 9):
                self.door.knock(str(request.index))  # type: ignore[attr-defined]
            return self.shared.fetch(rows, request)

    stream = iw.Stream(Knocking(), rows_per_request=16)  # type: ignore[arg-type]
    source = register(coordinator, stream, 32, fetchers="process", last_batch="keep", ordered=True)
    coordinator.start()
    first = door.await_knock()[0]
    os.kill(first, signal.SIGKILL)
    second = door.await_knock()[0]
    door.open()
    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(lambda: [row for batch in source for row in rows_seen(batch)])
        assert door.await_knock()[1] == "9"
        door.open()
    assert second != first
    assert seen.result() == [*range(ROWS)]
    assert source.stats().fetcher_restarts == 1


def test_a_process_maps_them_once_and_only_as_long_as_it_has_them(shared: SharedArrays) -> None:
    found = in_other_process(
        "import gc\n"
        "def maps(): return open('/proc/self/maps').read().count('memfd:input_workers')\n"
        "first, second = pickle.loads(pickled), pickle.loads(pickled)\n"
        "third = pickle.loads(pickle.dumps(first))\n"
        "print(first is second is third, maps(), end=' ')\n"
        "kept = first.arrays[1]; files = len(os.listdir('/proc/self/fd'))\n"
        "del first, second, third; print(maps(), int(kept[-1]), end=' ')\n"
        "del kept; print(maps(), files - len(os.listdir('/proc/self/fd')), end=' ')\n"
        "print(len(pickle.loads(pickled)), maps())\n",
        pickle.dumps(shared),
    )
    assert found == f"True 1 1 {ROWS - 1} 0 1 {ROWS} 0"


def test_threads_that_load_them_at_once_get_the_same_object(shared: SharedArrays) -> None:
    found = in_other_process(
        "import threading\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "together = threading.Barrier(8)\n"
        "def load(_): together.wait(); return pickle.loads(pickled)\n"
        "with ThreadPoolExecutor(8) as pool: print(len(set(map(id, list(pool.map(load, range(8)))))))\n",
        pickle.dumps(shared),
    )
    assert found == "1"


def test_the_owner_gets_itself_back_and_others_are_others(shared: SharedArrays) -> None:
    with SharedArrays(np.zeros((ROWS, 5), np.int64), np.zeros(ROWS, np.int64)) as other:
        assert pickle.loads(pickle.dumps(shared)) is shared
        assert pickle.loads(pickle.dumps(other)) is other
        assert len(pickle.dumps(shared)) < 1000


@pytest.mark.parametrize(
    "array",
    [
        np.array([(1, 2.5), (3, 4.5)], [("a", "i2"), ("b", "f8")]),
        np.array(["2026-01-01", "NaT"], "datetime64[s]"),
        np.array([b"one", b"three"]),
        np.array(["ein", "zwei"]),
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(12).reshape(6, 2)[::-3],
        np.empty((2, 0)),
        np.array([True, False]),
        np.array([1j, 2], "complex64"),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_every_dtype_and_layout_comes_as_it_is(array: Any) -> None:
    before = np.ones((2, 3), np.uint8)  # 6 bytes: what follows must be aligned
    with SharedArrays(before, array) as shared:
        code = "found = [(each.dtype, each.shape, each.tobytes()) for each in pickle.loads(pickled).arrays]\n"
        code += "print(pickle.dumps(found).hex())"
        found = pickle.loads(bytes.fromhex(in_other_process(code, pickle.dumps(shared))))
        assert found == [(each.dtype, each.shape, each.tobytes()) for each in (before, array)]
        assert all(each.flags.c_contiguous and each.ctypes.data % 64 == 0 for each in shared.arrays)
        assert [spec.shape for spec in shared.specs] == [(3,), array.shape[1:]]


def test_rows_are_put_into_memory_that_is_offered(shared: SharedArrays) -> None:
    rows = np.array([4, 250, 4])
    request = iw.FetchRequest(0, 0, rows)
    request.out = [np.empty((3, 5), np.int64), np.empty(3, np.int64)]
    got = shared.fetch(rows, request)
    assert got[0] is request.out[0]
    request.out = None
    for offered, fresh, wanted in zip(got, shared.fetch(rows, request), certified_rows(rows, 5), strict=True):
        assert (offered == wanted).all()
        assert (fresh == wanted).all()
        assert fresh.flags.owndata


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((), "at least one array"),
        ((np.arange(3), np.arange(4)), r"as many rows.*"),
        ((np.zeros((0, 3)),), "at least one row"),
        ((np.float64(3.0),), "got shapes"),
        ((np.array([{}, None]),), "dtype object"),
        ((np.zeros(2), np.zeros(2, [("a", "O")])), "array 1: got dtype"),
        ((np.ma.masked_array([1, 2], [True, False]),), "masked"),
    ],
)
def test_what_cannot_be_shared_is_a_config_error(arrays: Any, message: str) -> None:
    before = descriptors()
    with pytest.raises(iw.ConfigError, match=message):
        SharedArrays(*arrays)
    assert descriptors() == before


def load_error(pickled: bytes) -> str:
    """Return what loading raises in another process."""
    return in_other_process(
        "try: pickle.loads(pickled)\nexcept Exception as error: print(type(error).__name__, error)", pickled
    )


def test_when_the_owner_is_gone_the_error_says_what_to_do() -> None:
    code = "import numpy as np\nfrom input_workers.sources import SharedArrays\nshared = SharedArrays(np.arange(4))\n"
    pickled = bytes.fromhex(in_other_process(code + "print(pickle.dumps(shared).hex())"))
    for error in (load_error(pickled), load_error(pickled)):
        assert error.startswith("LifecycleError SharedArrays: the memory of process")
        assert "got No such file or directory; wanted" in error
        assert "on this machine" in error


def test_a_description_of_closed_arrays_is_an_error_whatever_has_their_descriptor_now() -> None:
    shared = SharedArrays(np.arange(4))
    pickled = pickle.dumps(shared)
    path = pickle.loads(pickled)._description.path
    shared.close()
    with pytest.raises(iw.LifecycleError, match="got No such file or directory; wanted the arrays"):
        pickle.loads(pickled)
    number = int(path.rsplit("/", 1)[1])
    others: list[Any] = []
    try:
        while not os.path.exists(path):  # descriptors are used again, the lowest first
            others.append(SharedArrays(np.arange(4)))
        assert "got other memory" in load_error(pickled)
        for other in others:
            other.close()
        ends = os.pipe()
        os.dup2(ends[0], number)
        for end in ends:
            if end != number:
                os.close(end)
        assert "got something else" in load_error(pickled)
    finally:
        if os.path.exists(path):
            os.close(number)


def test_workers_that_cannot_map_them_fail_the_source(coordinator: iw.GlobalCoordinator) -> None:
    shared = SharedArrays(np.arange(4))
    pickled = pickle.dumps(shared)
    shared.close()

    def fetch(worker_id: int, batch_size: int) -> Any:
        return [pickle.loads(pickled).arrays[0], np.zeros(4)]

    source = register(coordinator, fetch, 4, fetchers="process")
    coordinator.start()
    with pytest.raises(iw.FetchFailed, match="wanted the arrays that it has there") as caught:
        source.next_batch()
    assert isinstance(caught.value.__cause__, iw.LifecycleError)


def test_closed_arrays_are_gone_but_for_those_that_were_taken() -> None:
    before = descriptors()
    shared = SharedArrays(np.arange(4), np.arange(4.0))
    taken = shared.arrays[1]
    shared.close()
    shared.close()
    assert taken.tolist() == [0, 1, 2, 3]
    for use in (lambda: shared.arrays, lambda: pickle.dumps(shared), lambda: shared.fetch(np.arange(1), None)):  # type: ignore[arg-type]
        with pytest.raises(iw.LifecycleError, match="close"):
            use()
    assert descriptors() == before + 1  # the mapping of what was taken
    del taken, use
    assert descriptors() == before


def test_dropped_arrays_leave_nothing() -> None:
    before = descriptors()
    shared = SharedArrays(np.arange(4))
    assert descriptors() > before
    del shared
    assert descriptors() == before


@pytest.mark.usefixtures("no_other_threads")
def test_a_plain_fork_has_them_and_closing_there_leaves_the_owner_s(shared: SharedArrays) -> None:
    pickled = pickle.dumps(shared)
    pid = os.fork()
    if not pid:
        again = pickle.loads(pickled)
        right = again is not shared and not again.arrays[0].flags.writeable and (again.arrays[0] == shared.arrays[0]).all()
        shared.close()
        os._exit(0 if right else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert in_other_process("print(len(pickle.loads(pickled)))", pickled) == str(ROWS)


@pytest.mark.usefixtures("no_other_threads")
def test_without_anonymous_memory_they_lie_in_a_file_that_is_removed_by_its_owner_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(leases, "BLOCK_FOLDER", str(tmp_path))
    shared = SharedArrays(*certified_rows(np.arange(ROWS)))
    (file,) = tmp_path.iterdir()
    assert shared._description.path == str(file)
    assert file.stat().st_mode & 0o077 == 0
    read = "shared = pickle.loads(pickled)\nprint(int(shared.arrays[1].sum()))"
    assert in_other_process(read, pickle.dumps(shared)) == str(sum(range(ROWS)))
    pid = os.fork()
    if not pid:
        shared.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert file.exists()
    shared.close()
    assert not file.exists()
    other = SharedArrays(np.arange(3))
    assert len(list(tmp_path.iterdir())) == 1
    del other
    gc.collect()
    assert not list(tmp_path.iterdir())
