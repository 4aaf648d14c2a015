"""Fetchers as processes: the conformance suite for each way to start them, and what starting them promises."""

from __future__ import annotations

import os
import pathlib
import pickle
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from fetchers.backend_conformance import BackendConformance
from fetchers.shared_between import Barrier, CertifiedRows, FileCounter, endless, rows_seen
from gates import register

import input_workers as iw
from input_workers.fetchers.fork_server import fork_server
from input_workers.fetchers.frames import raised, rebuilt

STARTS = ["forkserver", "spawn", "fork"]


class ProcessConformance(BackendConformance):
    keeps_classes = False
    exits_are_deaths = True
    ends_by_itself = False
    shares_workers = False
    counts = (1, 2, 4)

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: pathlib.Path) -> None:
        self.folder = tmp_path

    def counter(self, start: int = 0) -> Any:
        return FileCounter(self.folder / "counter", start)

    def barrier(self, parties: int) -> Any:
        return Barrier(parties)

    def made_of(self, fetch: Any, source: Any) -> int:
        return int(source.stats().rows_fetched)


class TestForkserver(ProcessConformance):
    fetchers = iw.Processes(start="forkserver")


@pytest.mark.usefixtures("no_other_threads")
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("ordered", [False, True])
def test_a_stream_comes_whole_however_its_workers_are_started(
    coordinator: iw.GlobalCoordinator, start: Any, ordered: bool
) -> None:
    stream = iw.Stream(CertifiedRows(500, width=300), shuffle=True, epochs=2, rows_per_request=16)
    source = register(
        coordinator, stream, 12, num_workers=3, fetchers=iw.Processes(start=start), ordered=ordered, last_batch="keep"
    )
    coordinator.start()
    assert sorted(row for batch in source for row in rows_seen(batch)) == sorted([*range(500)] * 2)
    assert source.stats().fetcher_restarts == 0


@pytest.mark.usefixtures("no_other_threads")
@pytest.mark.parametrize("start", STARTS)
def test_the_first_error_is_the_cause_however_its_workers_are_started(coordinator: iw.GlobalCoordinator, start: Any) -> None:
    def fetch(worker_id: int, batch_size: int) -> Any:
        return np.ones(3) if worker_id else {}["not there"]

    source = register(coordinator, fetch, num_workers=2, fetchers=iw.Processes(start=start))
    coordinator.start()
    with pytest.raises(iw.FetchFailed, match=r"source 'train', worker \d: ") as caught:
        source.next_batch()
    cause = caught.value.__cause__
    assert isinstance(cause, (KeyError, iw.SpecMismatch))
    if isinstance(cause, KeyError):
        assert """{}["not there"]""" in cause.__notes__[-1]


def test_fork_is_refused_beside_threads_with_the_reason(coordinator: iw.GlobalCoordinator) -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="a thread of the trainer")
    thread.start()
    try:
        register(coordinator, endless, fetchers=iw.Processes(start="fork"))
        with pytest.raises(iw.ConfigError, match=r"start='fork' while threads run \(.*a thread of the trainer.*\): a lock"):
            coordinator.start()
    finally:
        release.set()
        thread.join()


class Unsendable:
    def __init__(self) -> None:
        self.size = 3
        self.handle = threading.Lock()

    def __call__(self, worker_id: int, batch_size: int) -> Any:
        return endless(worker_id, batch_size)

    def method(self, worker_id: int, batch_size: int) -> Any:
        return endless(worker_id, batch_size)

    def __len__(self) -> int:
        return self.size

    def fetch(self, rows: Any, request: Any) -> Any:
        return [rows, rows]


def _in_a_closure() -> Any:
    opened = {"size": 3, "a queue": (number for number in range(3))}

    def fetch(worker_id: int, batch_size: int) -> Any:
        return next(opened["a queue"])

    return fetch


CULPRITS = {
    "an object": (Unsendable, r"the fetch function\.handle \(lock\)"),
    "a method": (lambda: Unsendable().method, r"the object of the fetch function\.handle \(lock\)"),
    "a closure": (_in_a_closure, r"variable 'opened'\['a queue'\] \(generator\)"),
    "a source": (lambda: iw.Stream(Unsendable()), r"handle \(lock\)"),
}


@pytest.mark.parametrize("what", CULPRITS)
def test_what_cannot_be_sent_is_named_at_the_start(coordinator: iw.GlobalCoordinator, what: str) -> None:
    make, culprit = CULPRITS[what]
    register(coordinator, make(), fetchers="process")
    with pytest.raises(iw.ConfigError, match=culprit) as caught:
        coordinator.start()
    assert "open files, locks and connections in worker_init_fun" in str(caught.value)


@pytest.mark.parametrize(
    ("result", "got"),
    [
        ("lambda: 3", "got function"),
        ("{'data': 1}", "got dict"),
        ("[np.ones(2), (number for number in range(3))]", "input 'label': got generator"),
        ("(number for number in range(3))", "got generator"),
        ("[np.ones(2), np.array([None, {}])]", "input 'label': got dtype"),
        ("[bytearray(1_000_000)] * 2", "input 'data': got bytearray"),
        ("type('Odd', (), {})()", "got Odd"),
        ("[np.ma.ones(2), np.ones(2)]", "got MaskedArray"),
    ],
)
def test_a_result_that_is_no_chunk_is_named(coordinator: iw.GlobalCoordinator, result: str, got: str) -> None:
    def fetch(worker_id: int, batch_size: int) -> Any:
        return eval(result, {"np": np})

    source = register(coordinator, fetch, fetchers="process")
    coordinator.start()
    with pytest.raises(iw.FetchFailed, match=got):
        source.next_batch()


def test_arrays_of_any_layout_arrive_as_they_are(coordinator: iw.GlobalCoordinator, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mapped"
    np.arange(40_000, dtype=">f4").tofile(path)

    def fetch(worker_id: int, batch_size: int) -> Any:
        if done:
            raise iw.EndOfData
        done.append(True)
        mapped = np.memmap(path, ">f4", "r", shape=(4, 10_000))
        strided = np.arange(80_000).reshape(4, 20_000)[:, ::-2]
        names = np.array([f"{row:5000}" for row in range(4)])
        nothing = np.empty((4, 0), np.float32)
        return mapped, strided, names, nothing

    done: list[bool] = []
    source = register(coordinator, fetch, input_names=["mapped", "strided", "names", "nothing"], fetchers="process")
    coordinator.start()
    batch = source.next_batch()
    assert batch.mapped.dtype == np.dtype(">f4")
    assert (batch.mapped == np.arange(40_000).reshape(4, 10_000)).all()
    assert (batch.strided == np.arange(80_000).reshape(4, 20_000)[:, ::-2]).all()
    assert batch.names.tolist() == [f"{row:5000}" for row in range(4)]
    assert batch.nothing.shape == (4, 0)


def test_chunks_grow_and_shrink_by_any_factor(coordinator: iw.GlobalCoordinator) -> None:
    sizes = [1, 3000, 1, 9000, 500, 40_000, 1, 1, 100_000, 2, 3, 8000, 16_000, 32_000, 64_000, 128_000, *[700] * 40]

    def fetch(worker_id: int, batch_size: int) -> Any:
        if len(done) == len(sizes):
            raise iw.EndOfData
        done.append(True)
        rows = sizes[len(done) - 1]
        return [np.full((rows, 3), len(done)), np.arange(rows)]

    done: list[bool] = []
    source = register(coordinator, fetch, 100, fetchers="process", num_workers=2, last_batch="keep", max_buffered_batches=3)
    coordinator.start()
    seen = dict.fromkeys(range(1, len(sizes) + 1), 0)
    for batch in source:
        assert (batch.data == batch.data[:, :1]).all()
        for call in batch.data[:, 0].tolist():
            seen[call] += 1
    assert seen == {call: 2 * rows for call, rows in enumerate(sizes, 1)}


def test_the_source_of_a_stream_cannot_end_it_early(coordinator: iw.GlobalCoordinator) -> None:
    class Ends(CertifiedRows):
        def fetch(self, rows: Any, request: Any) -> Any:
            if request.index == 2:
                raise iw.EndOfData
            return super().fetch(rows, request)

    source = register(coordinator, iw.Stream(Ends(40), rows_per_request=4), fetchers="process")
    coordinator.start()
    with pytest.raises(iw.FetchFailed, match="a Stream ends by the length of its source"):
        list(source)


@pytest.mark.usefixtures("no_other_threads")
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    ("name", "shown"), [("train", "iw:train/1"), ("validation-of-all", "iw:validation/1"), ("träin-äöü-ä", "iw:träin-ä/1")]
)
def test_workers_are_known_by_name_in_ps_and_top(coordinator: iw.GlobalCoordinator, start: Any, name: str, shown: str) -> None:
    def fetch(worker_id: int, batch_size: int) -> Any:
        return [np.array([os.getpid()]), np.array([worker_id])]

    source = register(coordinator, fetch, 1, num_workers=2, fetchers=iw.Processes(start=start), name=name)
    coordinator.start()
    pid = next(int(batch.data[0]) for batch in source if batch.label[0] == 1)
    assert pathlib.Path(f"/proc/{pid}/comm").read_text() == f"{shown}\n"


def test_the_fork_server_is_known_by_name_in_ps_and_top(coordinator: iw.GlobalCoordinator) -> None:
    source = register(coordinator, endless, fetchers="process")
    coordinator.start()
    source.next_batch()
    server = fork_server.holds()
    assert server is not None
    assert pathlib.Path(f"/proc/{server[0]}/comm").read_text() == "iw:forkserver\n"


@pytest.mark.usefixtures("no_other_threads")
@pytest.mark.parametrize("start", STARTS)
def test_entries_of_sys_path_that_are_not_strings_are_passed_over(
    coordinator: iw.GlobalCoordinator, start: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(worker_id: int, batch_size: int) -> Any:
        import helper_of_this_test  # type: ignore[import-not-found]

        assert str(tmp_path) not in sys.path  # here, an import does not look there either
        return [np.full((4, 1), helper_of_this_test.NUMBER), np.arange(4)]

    folder = tmp_path / "on the path"
    folder.mkdir()
    (folder / "helper_of_this_test.py").write_text("NUMBER = 3")
    monkeypatch.setattr(sys, "path", [tmp_path, object(), str(folder), *sys.path])
    fork_server.stop()  # the next one is started with this path
    source = register(coordinator, fetch, fetchers=iw.Processes(start=start))
    coordinator.start()
    assert (source.next_batch().data == 3).all()


class Prefixed(Exception):
    """Makes its text from its argument, as many do."""

    def __init__(self, name: str) -> None:
        super().__init__(f"cannot read {name}")
        self.name = name


class TwoArguments(Exception):
    """Cannot be made from its `args`."""

    def __init__(self, name: str, line: int) -> None:
        super().__init__(f"{name}:{line}")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (Prefixed("a.jpg"), "cannot read a.jpg"),
        (TwoArguments("a.txt", 3), "a.txt:3"),
        (FileNotFoundError(2, "No such file", "a.jpg"), "[Errno 2] No such file: 'a.jpg'"),
        (UnicodeDecodeError("utf-8", b"ab\xff", 2, 3, "bad"), "'utf-8' codec can't decode byte 0xff in position 2: bad"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_exception_arrives_with_its_class_and_its_text(error: Exception, text: str) -> None:
    came = rebuilt(raised(error, pickle.dumps), "worker process 7")
    assert type(came) is type(error)
    assert str(came) == text
    assert getattr(came, "name", None) == getattr(error, "name", None)
    assert came.__notes__[-1].startswith("raised in worker process 7:")


def test_a_large_exception_arrives_as_its_name_and_text() -> None:
    frame = raised(ValueError("x" * 4_000_000, list(range(100_000))), pickle.dumps)
    assert len(pickle.dumps(frame)) < 192 * 1024  # fits into the buffer of a pipe
    came = rebuilt(frame, "worker process 7")
    assert type(came).__name__ == "ValueError"
    assert str(came).startswith("('xxxxx")


CLOSED_SCRIPT = """
import sys, input_workers as iw, numpy as np
def fetch(worker_id, batch_size):
    print("from the worker")
    return [np.zeros((batch_size, 5000))]
with open(sys.argv[1], "w") as file:
    iw.init_data_input_workers("numpy", ["x"], fetch, 4, 2, fetchers=iw.Processes(start=sys.argv[2]), timeout_s=20)
    with iw.global_coordinator as coordinator:
        file.write(str(coordinator["train"].next_batch().x.shape))
"""


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_a_trainer_may_be_started_with_closed_outputs(tmp_path: pathlib.Path, start: str, closed: str) -> None:
    script, result = tmp_path / "train.py", tmp_path / "result"
    script.write_text(CLOSED_SCRIPT)
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, str(script), str(result), start]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(pathlib.Path(iw.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    assert result.read_text() == "(4, 5000)"
    assert done.returncode == 0


SCRIPT = """
import input_workers as iw, numpy as np, helper
print("main runs")
class Odd(Exception): pass
def fetch(worker_id, batch_size):
    if __import__("os").environ["LATE"] != "set": raise Odd
    return [np.full((8, 3), helper.number()), np.arange(8)]
if __import__("sys").argv[1] == "twice":  # the fork server is older than what the second source needs
    iw.init_data_input_workers("numpy", ["x"], lambda worker, size: [np.ones(4)], 4, fetchers="process")
    with iw.global_coordinator as coordinator:
        coordinator["train"].next_batch()
__import__("os").environ["LATE"] = "set"
other = iw.GlobalCoordinator()
iw.init_data_input_workers("numpy", ["data", "label"], fetch, 8, fetchers=iw.Processes(start=START), coordinator=other)
other.start()
print(next(iter(other["train"])).data.sum())
"""


@pytest.mark.parametrize("start", STARTS)
def test_a_script_needs_no_main_guard(tmp_path: pathlib.Path, start: str) -> None:
    (tmp_path / "helper.py").write_text("def number(): return 3")
    script = tmp_path / "train.py"
    script.write_text(f"START = {start!r}\n{SCRIPT}")
    command = [sys.executable, "-W", "error", str(script), "twice" if start != "fork" else "once"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(pathlib.Path(iw.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.stderr == ""
    assert done.stdout == "main runs\n72.0\n" or done.stdout == "main runs\n72\n"
    assert done.returncode == 0
