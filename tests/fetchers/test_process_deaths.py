"""Worker processes that die, hang or cannot begin: another takes over, and nothing is lost or repeated."""

from __future__ import annotations

import ctypes
import os
import pathlib
import pickle
import re
import signal
import stat
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
from fetchers.shared_between import CertifiedRows, Door, FileCounter, endless, rows_seen
from gates import await_true, register
from self_certifying import make_chunk

import input_workers as iw
from input_workers.fetchers import process_child, worker_calls
from input_workers.fetchers.fork_server import fork_server

# Noticing a death takes a millisecond; this much would be too late.
NOTICED_SECONDS = 5.0

DEATHS: dict[str, tuple[Callable[[], object], str]] = {
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), r"was killed by SIGKILL \(out of memory\?\)"),
    "segfault": (lambda: ctypes.string_at(0), r"was killed by SIGSEGV; (.|\n)*Fatal Python error: Segmentation fault"),
    "abort": (os.abort, r"was killed by SIGABRT; (.|\n)*Fatal Python error: Aborted"),
    "_exit": (lambda: os._exit(0), r"exited with code 0"),
    "sys.exit": (lambda: sys.exit("no more"), r"exited with code 1; (.|\n)*SystemExit: no more"),
    "a signal without a name": (lambda: os.kill(os.getpid(), 40), r"was killed by (signal 40|SIGRTMIN.*)"),
}


@pytest.mark.parametrize("how", DEATHS)
@pytest.mark.parametrize("ordered", [False, True])
def test_a_death_costs_a_stream_nothing(
    coordinator: iw.GlobalCoordinator, tmp_path: pathlib.Path, how: str, ordered: bool
) -> None:
    die, deaths = DEATHS[how][0], FileCounter(tmp_path / "deaths")

    def before(request: Any) -> None:
        if request.index in (3, 20) and deaths.add() < 2:
            die()

    stream = iw.Stream(CertifiedRows(300, before, 100), rows_per_request=7)
    source = register(coordinator, stream, 7, num_workers=3, fetchers="process", ordered=ordered, last_batch="keep")
    coordinator.start()
    rows = [row for batch in source for row in rows_seen(batch)]
    assert (rows if ordered else sorted(rows)) == [*range(300)]
    assert deaths.value >= 2
    assert source.stats().fetcher_restarts == 2
    assert source.stats().rows_fetched == 300


@pytest.mark.parametrize("how", DEATHS)
def test_a_worker_that_goes_on_dying_is_given_up(
    coordinator: iw.GlobalCoordinator, how: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    die, words = DEATHS[how]
    monkeypatch.setattr(worker_calls, "FIRST_RESTART_SECONDS", 0.001)
    source = register(coordinator, iw.Stream(CertifiedRows(9, lambda request: die())), fetchers=iw.Processes(restarts=2))
    coordinator.start()
    pattern = rf"source 'train', worker 0, request 0: process \d+ {words}"
    with pytest.raises(iw.WorkerDied, match=pattern) as caught:
        source.next_batch()
    assert "deaths within a minute: 3, of which 2 are made good (restarts)" in str(caught.value)
    assert source.stats().fetcher_restarts == 2
    assert source.stats().fetch_errors == {"WorkerDied": 1}


def test_with_no_restarts_the_first_death_is_the_end(coordinator: iw.GlobalCoordinator) -> None:
    source = register(coordinator, lambda worker_id, batch_size: os._exit(7), fetchers=iw.Processes(restarts=0))
    coordinator.start()
    with pytest.raises(iw.WorkerDied, match=r"worker 0: process \d+ exited with code 7; deaths within a minute: 1, of which 0"):
        source.next_batch()
    assert source.stats().fetcher_restarts == 0


def test_a_plain_functions_call_is_made_again(coordinator: iw.GlobalCoordinator, tmp_path: pathlib.Path) -> None:
    calls = FileCounter(tmp_path / "calls")

    def fetch(worker_id: int, batch_size: int) -> Any:
        call = calls.add()
        if call == 4:
            os._exit(1)
        if call == 9:
            raise iw.EndOfData
        return make_chunk(worker_id, call, 200)

    source = register(coordinator, fetch, 200, fetchers="process")
    coordinator.start()
    assert [batch.data[0, 2] for batch in source] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert source.stats().fetcher_restarts == 1


@pytest.mark.parametrize("stopped", [False, True])
def test_a_kill_in_a_call_is_noticed_at_once(coordinator: iw.GlobalCoordinator, stopped: bool) -> None:
    door = Door()
    here: Any = door
    stream = iw.Stream(CertifiedRows(8, lambda request: here.knock(str(request.index))), rows_per_request=4)
    source = register(coordinator, stream, 4, fetchers="process")
    coordinator.start()
    pid, text = door.await_knock()
    assert text == "0"
    if stopped:
        os.kill(pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    for wanted in ("0", "1"):
        other, text = door.await_knock()  # the next worker's
        assert (other != pid, text) == (True, wanted)
        assert time.monotonic() - started < NOTICED_SECONDS
        door.open()
    assert [row for batch in source for row in rows_seen(batch)] == [*range(8)]
    assert source.stats().fetcher_restarts == 1
    door.close()


def test_a_kill_of_an_idle_worker_loses_and_repeats_nothing(coordinator: iw.GlobalCoordinator) -> None:
    source = register(coordinator, iw.Stream(CertifiedRows(400, width=300), rows_per_request=4), 4, fetchers="process",
                      max_buffered_batches=1, device_queue_depth=1)  # fmt: skip
    coordinator.start()
    await_true(lambda: source.stats().fetcher_blocked_seconds > 0)
    (worker,) = workers()
    worker.kill()
    assert [row for batch in source for row in rows_seen(batch)] == [*range(400)]
    assert source.stats().fetcher_restarts == 1
    assert source.stats().rows_fetched == 400


def workers() -> list[psutil.Process]:
    """The workers of this process's fork server."""
    server = fork_server.holds()
    return psutil.Process(server[0]).children() if server is not None else []


def test_a_death_is_noticed_though_a_process_that_the_worker_has_forked_holds_the_pipe(
    coordinator: iw.GlobalCoordinator, tmp_path: pathlib.Path
) -> None:
    calls, door = FileCounter(tmp_path / "calls"), Door()
    here: Any = door

    def before(request: Any) -> None:
        if calls.add() == 1:
            if not os.fork():
                here.knock()
                os._exit(0)
            os._exit(1)

    source = register(coordinator, iw.Stream(CertifiedRows(40, before), rows_per_request=4), 4, fetchers="process")
    started = time.monotonic()
    coordinator.start()
    assert sum(len(rows_seen(batch)) for batch in source) == 40
    assert time.monotonic() - started < NOTICED_SECONDS
    assert source.stats().fetcher_restarts == 1
    door.await_knock()  # it was there all the time
    door.close()


@pytest.mark.parametrize("step", ["header", "half a frame", "between frames"])
def test_a_kill_in_mid_send_loses_and_repeats_nothing(
    coordinator: iw.GlobalCoordinator, tmp_path: pathlib.Path, step: str
) -> None:
    kills = FileCounter(tmp_path / "kills")

    def before(request: Any) -> None:
        from input_workers.fetchers import frames

        if getattr(frames, "is_faulty", False):
            return
        frames.is_faulty = True  # type: ignore[attr-defined]
        send = frames.Link.send

        def faulty(link: Any, frame: Any) -> None:
            import pickle

            if frame[0] in (frames.CHUNK, frames.INLINE) and kills.add() in (2, 5, 6):
                content = pickle.dumps((*frame, b"x" * 8_000_000))  # more than the pipe takes at once
                header = len(content).to_bytes(8, "big")
                if step == "between frames":
                    send(link, frame)
                link.socket.sendall(header[:3] if step == "header" else header + content[:100_000])
                os.kill(os.getpid(), signal.SIGKILL)
            send(link, frame)

        frames.Link.send = faulty  # type: ignore[method-assign]

    stream = iw.Stream(CertifiedRows(200, before, 300), rows_per_request=8)
    source = register(coordinator, stream, 8, num_workers=2, fetchers="process", last_batch="keep")
    coordinator.start()
    assert sorted(row for batch in source for row in rows_seen(batch)) == [*range(200)]
    assert source.stats().fetcher_restarts == 3
    assert source.stats().rows_fetched == 200


def to_the_pipe(data: bytes) -> None:
    """Write into every socket of this process, by a mistake with descriptor numbers; one is the pipe to the trainer."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.write(int(name), data)
        except OSError:  # the one that lists the folder
            pass


GARBAGE = {
    "a header of 4 GB": (1 << 32).to_bytes(8, "big") + b"x" * 100,
    "text": b"Epoch 1: loss 0.3, accuracy 0.9",
    "no pickle": (3).to_bytes(8, "big") + b"abc",
    "an empty frame": bytes(8),
    "no frame": (len(pickle.dumps({"kind": 3}))).to_bytes(8, "big") + pickle.dumps({"kind": 3}),
    "an unknown kind": (len(pickle.dumps((99, [])))).to_bytes(8, "big") + pickle.dumps((99, [])),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_in_the_pipe_ends_the_worker_and_says_why(coordinator: iw.GlobalCoordinator, what: str) -> None:
    def before(request: Any) -> None:
        if request.index == 2:
            to_the_pipe(GARBAGE[what])
            time.sleep(60)  # what the parent does must not depend on an answer

    source = register(coordinator, iw.Stream(CertifiedRows(40, before), rows_per_request=4), 4, fetchers="process")
    coordinator.start()
    started = time.monotonic()
    with pytest.raises(iw.WorkerDied, match=r"worker 0: process \d+ was killed: its pipe to the trainer must carry frames"):
        list(source)
    assert time.monotonic() - started < NOTICED_SECONDS


def test_a_large_error_and_a_large_request_do_not_wait_for_each_other(coordinator: iw.GlobalCoordinator) -> None:
    class Text:
        """Requests of 480 KB and a short one, all of which fail with an exception of 4 MB."""

        def __len__(self) -> int:
            return 63_000

        def fetch(self, rows: Any, request: Any) -> Any:
            raise UnicodeDecodeError("utf-8", b"\xff" * (4 << 20), 0, 1, "bad")

    source = register(
        coordinator, iw.Stream(Text(), rows_per_request=60_000), 100, fetchers="process",
        on_error=iw.ErrorPolicy(retries=1, backoff_s=0.0), timeout_s=10,
    )  # fmt: skip
    coordinator.start()
    with pytest.raises(iw.FetchFailed, match="UnicodeDecodeError") as caught:
        source.next_batch()
    assert type(caught.value.__cause__).__name__ == "UnicodeDecodeError"
    assert source.stats().fetch_errors == {"UnicodeDecodeError": 2}


@pytest.mark.parametrize("held", ["in Python", "with the interpreter lock held in C", "stopped"])
@pytest.mark.parametrize("skip", [False, True])
def test_a_call_that_takes_too_long_is_killed_and_shows_where_it_hangs(
    coordinator: iw.GlobalCoordinator, held: str, skip: bool
) -> None:
    def before(request: Any) -> None:
        if 5 in request.rows:
            stuck_in_here(held)

    policy = iw.ErrorPolicy(skip=skip, retries=0)
    source = register(
        coordinator, iw.Stream(CertifiedRows(12, before), rows_per_request=3), 3, num_workers=2, fetchers="process",
        fetch_timeout_s=0.4, on_error=policy, last_batch="keep",
    )  # fmt: skip
    coordinator.start()
    if skip:
        assert sorted(row for batch in source for row in rows_seen(batch)) == [row for row in range(12) if row != 5]
        assert source.stats().fetcher_restarts == 2, "the request, and then the row"
        assert [each.rows for each in source.stats().quarantine] == [(5,)]
        text = source.stats().quarantine[0].error
    else:
        with pytest.raises(iw.FetchTimeout, match=r"worker \d, request 1: a call has run for over 0\.4 s") as caught:
            list(source)
        text = str(caught.value)
        assert source.stats().fetcher_restarts == 0
    assert "stuck_in_here" in text or held == "stopped"
    assert re.search(r"process \d+ was killed", text)


def stuck_in_here(held: str) -> None:
    if held == "in Python":
        time.sleep(60)
    elif held == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        ctypes.PyDLL(None).sleep(60)


def test_what_comes_before_the_first_call_is_no_call(coordinator: iw.GlobalCoordinator) -> None:
    started = iw.Processes(start="spawn", worker_init_fun=lambda worker_id: time.sleep(0.5))
    source = register(coordinator, endless, fetchers=started, fetch_timeout_s=0.3)
    coordinator.start()
    assert source.next_batch().valid_rows == 4


def test_a_call_sent_ahead_that_hangs_is_not_taken_for_the_one_that_is_retried(
    coordinator: iw.GlobalCoordinator, tmp_path: pathlib.Path
) -> None:
    tries, hangs = FileCounter(tmp_path / "tries"), FileCounter(tmp_path / "hangs")

    def before(request: Any) -> None:
        if request.index == 2 and tries.add() == 0:
            raise OSError("only once")
        if request.index == 3 and hangs.add() == 0:
            time.sleep(60)

    source = register(
        coordinator, iw.Stream(CertifiedRows(40, before), rows_per_request=4), 4, fetchers="process",
        fetch_timeout_s=0.5, on_error=iw.ErrorPolicy(retries=2, backoff_s=0.001),
    )  # fmt: skip
    coordinator.start()
    assert sorted(row for batch in source for row in rows_seen(batch)) == [*range(40)]
    assert source.stats().fetch_errors == {"OSError": 1, "FetchTimeout": 1}


def test_answers_come_in_order_though_every_second_request_fails_at_first(
    coordinator: iw.GlobalCoordinator, tmp_path: pathlib.Path
) -> None:
    failed = [FileCounter(tmp_path / str(index)) for index in range(0, 25, 2)]
    asked: list[int] = []

    def before(request: Any) -> None:
        asked.append(request.index)
        assert asked == sorted(asked), "a retry is made before what was sent ahead"
        if not request.index % 2 and failed[request.index // 2].add() == 0:
            raise OSError("only once")

    source = register(
        coordinator, iw.Stream(CertifiedRows(100, before), rows_per_request=4), 4, fetchers="process", ordered=True,
        on_error=iw.ErrorPolicy(retries=1, backoff_s=0.001), fetch_timeout_s=30.0,
    )  # fmt: skip
    coordinator.start()
    assert [row for batch in source for row in rows_seen(batch)] == [*range(100)]
    stats = source.stats()
    assert stats.fetch_errors == {"OSError": 13}
    assert (stats.rows_fetched, stats.fetcher_restarts, stats.quarantine) == (100, 0, ())


def test_a_row_that_hangs_is_skipped_alone_and_its_neighbours_are_delivered(
    coordinator: iw.GlobalCoordinator, tmp_path: pathlib.Path
) -> None:
    calls = FileCounter(tmp_path / "calls")

    def before(request: Any) -> None:
        calls.add()
        if 13 in request.rows:
            time.sleep(60)
        if 10 in request.rows:
            raise OSError("row 10 is bad")

    source = register(
        coordinator, iw.Stream(CertifiedRows(40, before), rows_per_request=8), 8, fetchers="process", ordered=True,
        fetch_timeout_s=0.4, on_error=iw.ErrorPolicy(retries=1, backoff_s=0.001, skip=True), last_batch="keep",
    )  # fmt: skip
    coordinator.start()
    assert [row for batch in source for row in rows_seen(batch)] == [row for row in range(40) if row not in (10, 13)]
    stats = source.stats()
    assert [(each.rows, each.error.split(":")[0]) for each in stats.quarantine] == [((10,), "OSError"), ((13,), "FetchTimeout")]
    assert stats.fetch_errors == {"FetchTimeout": 4, "OSError": 2}, "two tries of the request, and two of each bad row"
    assert stats.fetcher_restarts == 4
    assert stats.rows_dropped["skipped_error"] == 2
    assert stats.rows_fetched == 40
    # Of four good requests; of this one twice; of its rows up to the one that hangs; of that once more, and of the good ones.
    assert calls.value == 4 + 2 + 7 + 1 + 6


def test_a_pause_before_a_retry_is_no_call_that_takes_too_long(
    coordinator: iw.GlobalCoordinator, tmp_path: pathlib.Path
) -> None:
    tries = FileCounter(tmp_path / "tries")

    def before(request: Any) -> None:
        if tries.add() == 0:
            raise OSError("only once")

    source = register(
        coordinator, iw.Stream(CertifiedRows(8, before), rows_per_request=4), 4, fetchers="process",
        fetch_timeout_s=0.2, on_error=iw.ErrorPolicy(retries=1, backoff_s=1.0),
    )  # fmt: skip
    coordinator.start()
    assert [row for batch in source for row in rows_seen(batch)] == [*range(8)]
    assert source.stats().fetcher_restarts == 0


def test_a_stop_ends_a_pause_before_a_retry(coordinator: iw.GlobalCoordinator) -> None:
    def before(request: Any) -> None:
        raise OSError("always")

    source = register(
        coordinator, iw.Stream(CertifiedRows(8, before), rows_per_request=4), 4, fetchers="process",
        on_error=iw.ErrorPolicy(retries=3, backoff_s=100.0, max_backoff_s=100.0),
    )  # fmt: skip
    coordinator.start()
    await_true(lambda: source.stats().fetch_errors == {"OSError": 1}, "it pauses")
    started = time.monotonic()
    assert coordinator.stop()
    assert time.monotonic() - started < NOTICED_SECONDS


def test_too_many_skipped_rows_fail_the_source_with_the_workers_error(coordinator: iw.GlobalCoordinator) -> None:
    def before(request: Any) -> None:
        if {3, 9, 14} & set(request.rows.tolist()):
            raise LookupError("not there")

    source = register(
        coordinator, iw.Stream(CertifiedRows(40, before), rows_per_request=4), 4, fetchers="process",
        on_error=iw.ErrorPolicy(skip=True, max_errors=2),
    )  # fmt: skip
    coordinator.start()
    with pytest.raises(iw.FetchFailed, match="3 failed, more than may be skipped") as caught:
        list(source)
    assert type(caught.value.__cause__) is LookupError
    assert "raised in worker process" in caught.value.__cause__.__notes__[0]


@pytest.mark.parametrize("kind", ["function", "stream"])
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_function_that_begins_anew_is_warned_of_once_and_a_stream_is_not(
    coordinator: iw.GlobalCoordinator, tmp_path: pathlib.Path, kind: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls = FileCounter(tmp_path / "calls")

    def trouble(request: Any = None) -> int:
        call = calls.add()
        if call in (4, 9):
            if how == "dies":
                os._exit(1)
            time.sleep(60)
        return call

    def fetch(worker_id: int, batch_size: int) -> Any:
        if trouble() > 15:
            raise iw.EndOfData
        return make_chunk(worker_id, 0, 200)

    stream = iw.Stream(CertifiedRows(80, trouble), rows_per_request=4)
    source = register(
        coordinator, fetch if kind == "function" else stream, 4, fetchers="process", fetch_timeout_s=0.4,
        on_error=iw.ErrorPolicy(retries=1, backoff_s=0.001),
    )  # fmt: skip
    coordinator.start()
    list(source)
    assert source.stats().fetcher_restarts == 2
    texts = [each.getMessage() for each in caplog.records if "may come twice" in each.getMessage()]
    assert len(texts) == (kind == "function")
    assert all(word in text for text in texts for word in ("'train'", "worker 0", "Stream", "restarts=0"))


def test_byte_order_survives_the_way_from_a_worker_and_the_skipping_of_rows(coordinator: iw.GlobalCoordinator) -> None:
    class BigEndian:
        def __len__(self) -> int:
            return 40

        def fetch(self, rows: Any, request: Any) -> Any:
            if 9 in rows:
                raise OSError("row 9 is bad")
            wide = np.zeros((len(rows), 8), ">i2")
            wide[:] = rows[:, None]
            return [wide[:, ::2], np.asfortranarray(wide)]

    source = register(
        coordinator, iw.Stream(BigEndian(), rows_per_request=4), 3, fetchers="process", ordered=True,
        on_error=iw.ErrorPolicy(skip=True), specs=[iw.ArraySpec((4,), ">i2"), iw.ArraySpec((8,), ">i2")],
    )  # fmt: skip
    coordinator.start()
    assert [row for batch in source for row in batch.data[:, 0].tolist()] == [row for row in range(40) if row != 9]


def test_a_plain_functions_last_chunk_is_not_lost_when_a_call_is_retried(
    coordinator: iw.GlobalCoordinator,
) -> None:
    def fetch(worker_id: int, batch_size: int) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("only once")
        if len(calls) == 3:
            raise iw.EndOfData
        return make_chunk(worker_id, 0, 400)

    calls: list[int] = []
    policy = iw.ErrorPolicy(retries=1, backoff_s=0.001)
    source = register(coordinator, fetch, 400, fetchers="process", on_error=policy)
    coordinator.start()
    assert sum(batch.valid_rows for batch in source) == 400


def test_worker_init_fun_runs_once_in_each_worker_and_in_each_that_takes_over(
    coordinator: iw.GlobalCoordinator, tmp_path: pathlib.Path
) -> None:
    inits, calls = FileCounter(tmp_path / "inits"), FileCounter(tmp_path / "calls")

    def init(worker_id: int) -> None:
        inits.add()
        os.environ["OF_WORKER"] = str(worker_id)

    def fetch(worker_id: int, batch_size: int) -> Any:
        assert os.environ["OF_WORKER"] == str(worker_id)
        call = calls.add()
        if call == 5:
            os._exit(1)
        if call > 30:
            raise iw.EndOfData
        return make_chunk(worker_id, call, 150)

    source = register(coordinator, fetch, 150, num_workers=2, fetchers=iw.Processes(worker_init_fun=init))
    coordinator.start()
    assert len(list(source)) == 30
    assert inits.value == 3


@pytest.mark.parametrize("policy", [iw.ErrorPolicy(), iw.ErrorPolicy(retries=3, skip=True)], ids=["raise", "skip"])
def test_a_worker_that_cannot_begin_says_why_and_is_not_started_again(
    coordinator: iw.GlobalCoordinator, policy: iw.ErrorPolicy, tmp_path: pathlib.Path
) -> None:
    inits = FileCounter(tmp_path / "inits")

    def init(worker_id: int) -> None:
        inits.add()
        raise OSError("no such database")

    source = register(coordinator, iw.Stream(CertifiedRows(20)), fetchers=iw.Processes(worker_init_fun=init), on_error=policy)
    coordinator.start()
    with pytest.raises(iw.WorkerDied, match=r"worker 0: .* could not begin: OSError: no such database") as caught:
        source.next_batch()
    assert isinstance(caught.value.__cause__, OSError)
    assert "worker_init_fun" in str(caught.value)
    assert inits.value == 1
    assert source.stats().fetcher_restarts == 0


@pytest.mark.parametrize("number", [signal.SIGINT, process_child.STACK_SIGNAL])
def test_signals_that_are_the_parents_do_not_harm_a_worker(coordinator: iw.GlobalCoordinator, number: int) -> None:
    door = Door()
    here: Any = door
    stream = iw.Stream(CertifiedRows(8, lambda request: here.knock()), rows_per_request=4)
    source = register(coordinator, stream, 4, fetchers="process")
    coordinator.start()
    pid, _ = door.await_knock()
    os.kill(pid, number)
    door.open()
    assert door.await_knock()[0] == pid
    door.open()
    assert [row for batch in source for row in rows_seen(batch)] == [*range(8)]
    door.close()


def test_the_death_of_the_fork_server_harms_no_worker(coordinator: iw.GlobalCoordinator, tmp_path: pathlib.Path) -> None:
    calls = FileCounter(tmp_path / "calls")

    def before(request: Any) -> None:
        if calls.add() == 20:
            os._exit(3)

    source = register(coordinator, iw.Stream(CertifiedRows(200, before), rows_per_request=4), 4, num_workers=2,
                      fetchers="process", max_buffered_batches=1, device_queue_depth=1)  # fmt: skip
    coordinator.start()
    rows = rows_seen(source.next_batch())
    server = fork_server.holds()
    assert server is not None
    os.kill(server[0], signal.SIGKILL)
    rows += [row for batch in source for row in rows_seen(batch)]
    assert sorted(rows) == [*range(200)]
    assert source.stats().fetcher_restarts == 1
    assert fork_server.holds() != server
