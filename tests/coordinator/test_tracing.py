"""A trace from its start to its file: it ends by itself, with its source, or when it is full, and disturbs nobody."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
from gates import HANG_SECONDS, Gate, await_true, register
from metrics.trace_checker import check_trace

import input_workers as iw
from input_workers.coordinator import tracing
from input_workers.metrics import trace as trace_module
from input_workers.metrics import trace_events

LONG = 600.0  # seconds: such a trace ends for another reason
SHORT = 0.2


def endless(worker_id: int, batch_size: int) -> Any:
    import numpy as np

    return [np.zeros((batch_size, 2), np.float32), np.zeros(batch_size)]


def train_until(trace: Any, source: Any) -> None:
    """Take batches, as a trainer does, until the file is there."""
    while True:
        source.next_batch()
        try:
            trace.wait(0.0)
        except iw.WaitTimeout:
            continue
        return


def is_traced(source: Any) -> bool:
    """Whether anybody still notes what he does."""
    recorder = source._core.recorder
    return any(each.trace is not None for each in (recorder, *recorder.devices.values(), *recorder.fetchers()))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_trainer_starts_it_goes_on_and_finds_the_file(
    coordinator: iw.GlobalCoordinator, tmp_path: Path, workers: int
) -> None:
    source = register(coordinator, endless, num_workers=workers)
    coordinator.start()
    trace = source.trace(tmp_path / "t.json", SHORT)
    assert is_traced(source)
    train_until(trace, source)
    assert trace.wait() == trace.path == str(tmp_path / "t.json")
    checked = check_trace(tmp_path / "t.json")
    if not checked.about["is_cut"]:
        assert checked.about["seconds"] == checked.about["asked_seconds"] == SHORT
    assert checked.spans("next_batch", "trainer MainThread")
    assert checked.spans("training", "trainer MainThread")
    assert checked.spans("send", "enqueuer-train")
    assert len({row for _, row in checked.rows if row.startswith("fetcher-train-")}) == max(1, workers)
    assert set(checked.counters) == {"assembly of train", "device queue of train"}
    assert not is_traced(source)
    source.next_batch()


def test_one_that_ends_with_the_data_has_what_there_is(coordinator: iw.GlobalCoordinator, tmp_path: Path) -> None:
    gate = Gate()
    source = register(coordinator, gate)
    coordinator.start()
    trace = source.trace(tmp_path / "t", LONG)
    for _ in range(5):
        gate.release(4)
    gate.end()
    assert len(list(source)) == 5
    checked = check_trace(Path(trace.wait(HANG_SECONDS)))
    assert checked.about["seconds"] < HANG_SECONDS
    assert len(checked.spans("call")) == 5


@pytest.mark.parametrize("by", ["coordinator", "source", "drop"])
def test_a_stop_ends_it_and_waits_for_the_file(tmp_path: Path, by: str) -> None:
    coordinator = iw.GlobalCoordinator()
    source = register(coordinator, endless)
    coordinator.start()
    trace = source.trace(tmp_path / "t", LONG)
    source.next_batch()
    if by == "drop":
        del source, coordinator
        trace.wait(HANG_SECONDS)
    else:
        assert (coordinator if by == "coordinator" else source).stop(HANG_SECONDS)
        assert not trace._thread.is_alive()
        trace.wait(0.0)
        coordinator.stop(HANG_SECONDS)
    assert check_trace(tmp_path / "t").spans("next_batch")


def test_it_can_be_ended_early(coordinator: iw.GlobalCoordinator, tmp_path: Path) -> None:
    source = register(coordinator, endless)
    coordinator.start()
    trace = source.trace(tmp_path / "t", LONG)
    source.next_batch()
    trace.request_stop()
    assert check_trace(Path(trace.wait(HANG_SECONDS))).about["seconds"] < HANG_SECONDS
    source.next_batch()


def test_what_hangs_is_in_the_file(coordinator: iw.GlobalCoordinator, tmp_path: Path) -> None:
    gate = Gate()
    source = register(coordinator, gate)
    coordinator.start()
    trainer = threading.Thread(target=source.next_batch, name="waiting")
    trainer.start()
    gate.await_calls()
    await_true(lambda: bool(source._core.recorder.devices["train"].waits[1]))
    await_true(lambda: source._core.recorder.enqueuer_starved[1] < math.inf)
    trace = source.trace(tmp_path / "t", 0.05)
    checked = check_trace(Path(trace.wait(HANG_SECONDS)))
    gate.release(4)
    gate.end()
    trainer.join()
    for row, name in (
        ("fetcher-train-0", "call"),
        ("enqueuer-train", "waiting for rows"),
        ("trainer waiting", "waiting for a batch"),
    ):
        (span,) = checked.row(row)
        assert (span.name, span.begin, span.end, span.is_open) == (name, 0.0, 0.05, True)


def test_a_second_one_is_refused_while_the_first_goes_on(coordinator: iw.GlobalCoordinator, tmp_path: Path) -> None:
    source, other = register(coordinator, endless), register(coordinator, endless, name="other")
    coordinator.start()
    first = other.trace(tmp_path / "first", LONG)
    for refused in (other.trace, coordinator.trace):
        with pytest.raises(iw.LifecycleError, match=r"'other' is being traced already, into .*first for 600 s"):
            refused(tmp_path / "second", SHORT)
        assert not is_traced(source)
        assert is_traced(other)
    first.request_stop()
    first.wait(HANG_SECONDS)
    coordinator.trace(tmp_path / "second", SHORT).wait(HANG_SECONDS)
    assert not is_traced(source)
    assert not is_traced(other)
    assert sorted(os.listdir(tmp_path)) == ["first", "second"]


def test_another_may_begin_while_one_is_written_and_a_stop_waits_for_it(
    coordinator: iw.GlobalCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, write = register(coordinator, endless), threading.Event()
    coordinator.start()

    def slow(*arguments: Any) -> Any:
        assert write.wait(HANG_SECONDS)
        return trace_events.text_of(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tracing, "text_of", slow)
        first = source.trace(tmp_path / "first", SHORT)
        await_true(lambda: not is_traced(source), "it has ended")
        second = source.trace(tmp_path / "second", LONG)
        write.set()
        first.wait(HANG_SECONDS)
    assert source._core.tracing is second
    source.next_batch()
    assert coordinator.stop(HANG_SECONDS)
    assert second.wait(0.0) == str(tmp_path / "second")


def test_all_sources_go_into_one_file(coordinator: iw.GlobalCoordinator, tmp_path: Path) -> None:
    register(coordinator, endless)
    register(coordinator, endless, name="test", num_workers=0)
    register(coordinator, endless, name="done")
    coordinator.start()
    coordinator["done"].stop()
    trace = coordinator.trace(tmp_path / "t", LONG)
    for name in ("train", "test", "train"):
        coordinator[name].next_batch()
    coordinator["train"].stop()
    coordinator["test"].next_batch()
    assert not trace._done.is_set()
    coordinator.stop()
    checked = check_trace(Path(trace.wait(0.0)))
    devices = [span.args["device"] for span in checked.row("trainer MainThread") if span.name == "next_batch"]
    assert devices == ["train", "test", "train", "test"]
    rows = {row for _, row in checked.rows}
    assert {"fetcher-train-0", "enqueuer-train", "enqueuer-test"} < rows
    assert not any("done" in row for row in rows)


def test_a_source_that_is_started_again_meanwhile_is_in_it_again(coordinator: iw.GlobalCoordinator, tmp_path: Path) -> None:
    gate = Gate()
    source = register(coordinator, gate)
    register(coordinator, endless, name="test")
    coordinator.start()
    trace = coordinator.trace(tmp_path / "t", LONG)
    for _ in range(2):
        gate.release(4)
        source.next_batch()
        gate.end()
        source.stop()
        coordinator.start()
    gate.end()
    coordinator.stop()
    calls = check_trace(Path(trace.wait(HANG_SECONDS))).spans("call", "fetcher-train-")
    assert len([span for span in calls if not span.is_open]) == 2


@pytest.mark.parametrize("path", ["missing/t.json", ".", "device"])
def test_a_path_that_cannot_be_written_is_an_error_at_once(
    coordinator: iw.GlobalCoordinator, tmp_path: Path, path: str
) -> None:
    source = register(coordinator, endless)
    coordinator.start()
    with pytest.raises(OSError, match=r"not a regular file|No such file"):
        source.trace("/dev/null" if path == "device" else tmp_path / path, SHORT)
    assert not is_traced(source)
    assert os.listdir(tmp_path) == []
    assert os.path.exists("/dev/null")


def test_a_file_that_cannot_be_written_in_the_end_is_told_to_who_waits(
    coordinator: iw.GlobalCoordinator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    source = register(coordinator, endless)
    coordinator.start()
    trace = source.trace(folder / "t", LONG)
    folder.rmdir()
    trace.request_stop()
    with pytest.raises(iw.InputWorkersError, match="could not be written") as caught:
        trace.wait(HANG_SECONDS)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert "could not be written" in caplog.text
    source.next_batch()


def test_the_old_file_stays_until_the_new_one_is_whole(coordinator: iw.GlobalCoordinator, tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text("old")
    source = register(coordinator, endless)
    coordinator.start()
    trace = source.trace(path, LONG)
    source.next_batch()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["t"]
    trace.request_stop()
    check_trace(Path(trace.wait(HANG_SECONDS)))
    assert os.listdir(tmp_path) == ["t"]


def test_a_file_that_can_only_be_written_in_part_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("old")
    assert in_a_child(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        trace.request_stop()
        try:
            trace.wait()
        except iw.InputWorkersError as error:
            print(error)
        """,
        tmp_path / "t",
    ).startswith("the trace could not be written: OSError: [Errno 27] File too large")
    assert os.listdir(tmp_path) == ["t"]
    assert (tmp_path / "t").read_text() == "old"


def test_only_what_runs_can_be_traced(coordinator: iw.GlobalCoordinator, tmp_path: Path) -> None:
    source = register(coordinator, endless)
    for _ in range(2):
        for trace in (source.trace, coordinator.trace):
            with pytest.raises(iw.LifecycleError, match=r"no source runs \(of 'train'\)"):
                trace(tmp_path / "t", SHORT)
        coordinator.start()
        source.next_batch()
        coordinator.stop()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("seconds", [0, -1.0, math.inf, math.nan, True, "5", None])
def test_seconds_are_checked(coordinator: iw.GlobalCoordinator, tmp_path: Path, seconds: Any) -> None:
    source = register(coordinator, endless)
    coordinator.start()
    with pytest.raises(iw.ConfigError, match="seconds"):
        source.trace(tmp_path / "t", seconds)


def test_when_it_is_full_it_ends_for_all_at_once_and_says_so(
    coordinator: iw.GlobalCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_module, "MOST_EVENTS", 200)
    source = register(coordinator, endless, num_workers=2)
    coordinator.start()
    trace = source.trace(tmp_path / "t", LONG)
    train_until(trace, source)
    checked = check_trace(tmp_path / "t")
    shown = sum(not span.is_open for row in checked.rows.values() for span in row) + sum(map(len, checked.counters.values()))
    assert 100 < shown <= 200
    assert checked.about["is_cut"]
    assert checked.about["seconds"] < HANG_SECONDS
    assert checked.marks == ["no room for more events"]


def test_a_forked_child_is_told_that_the_trace_is_not_its_own(coordinator: iw.GlobalCoordinator, tmp_path: Path) -> None:
    source = register(coordinator, endless)
    coordinator.start()
    trace = source.trace(tmp_path / "t", LONG)
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(5)
            source.stop()
            trace.wait()
        except iw.LifecycleError:
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert os.listdir(tmp_path) == []
    trace.request_stop()
    check_trace(Path(trace.wait(HANG_SECONDS)))


def test_an_interpreter_that_ends_meanwhile_leaves_a_whole_file(tmp_path: Path) -> None:
    assert in_a_child("", tmp_path / "t") == ""
    assert len(check_trace(tmp_path / "t").spans("next_batch")) == 10
    assert os.listdir(tmp_path) == ["t"]


def in_a_child(script: str, path: Path) -> str:
    """Begin a trace in a fresh interpreter, take ten batches, go on with the script; return its stdout."""
    prelude = """
import logging, sys, numpy as np, input_workers as iw
logging.disable()
iw.init_data_input_workers("numpy", ["data"], lambda worker, rows: [np.zeros((rows, 2))], 4)
iw.global_coordinator.start()
trace = iw.global_coordinator["train"].trace(sys.argv[1], 600)
for _ in range(10):
    iw.global_coordinator["train"].next_batch()
"""
    command = [sys.executable, "-W", "error", "-c", prelude + textwrap.dedent(script), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
