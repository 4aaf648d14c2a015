"""Worker processes that die, hang or cannot begin: another takes over, and nothing is lost or repeated."""

from __future__ import annotations

import ctypes
import os
import pathlib
import re
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

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

        def faulty(link: Any, frame: Any, descriptors: Any = ()) -> None:
            import pickle

            if frame[0] in (frames.CHUNK, frames.INLINE) and kills.add() in (2, 5, 6):
                content = pickle.dumps((*frame, b"x" * 8_000_000))  # more than the pipe takes at once
                header = len(content).to_bytes(8, "big")
                if step == "between frames":
                    send(link, frame, descriptors)
                link.socket.sendall(header[:3] if step == "header" else header + content[:100_000])
                os.kill(os.getpid(), signal.SIGKILL)
            send(link, frame, descriptors)

        frames.Link.send = faulty  # type: ignore[method-assign]

    stream = iw.Stream(CertifiedRows(200, before, 300), rows_per_request=8)
    source = register(coordinator, stream, 8, num_workers=2, fetchers="process", last_batch="keep")
    coordinator.start()
    assert sorted(row for batch in source for row in rows_seen(batch)) == [*range(200)]
    assert source.stats().fetcher_restarts == 3
    assert source.stats().rows_fetched == 200


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


def test_a_slow_call_made_ahead_is_not_taken_for_the_one_that_is_retried(
    coordinator: iw.GlobalCoordinator, tmp_path: pathlib.Path
) -> None:
    tries = FileCounter(tmp_path / "tries")

    def before(request: Any) -> None:
        if request.index == 2 and tries.add() == 0:
            raise OSError("only once")
        if request.index == 3 and tries.value == 1:
            time.sleep(60)

    source = register(
        coordinator, iw.Stream(CertifiedRows(40, before), rows_per_request=4), 4, fetchers="process",
        fetch_timeout_s=0.5, on_error=iw.ErrorPolicy(retries=2, backoff_s=0.001),
    )  # fmt: skip
    coordinator.start()
    assert sorted(row for batch in source for row in rows_seen(batch)) == [*range(40)]
    assert source.stats().fetch_errors == {"OSError": 1, "FetchTimeout": 1}


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
