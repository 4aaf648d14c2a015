"""Without workers the fetch function is called in the trainer's own thread, and Ctrl-C loses nothing."""

from __future__ import annotations

import itertools
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
from gates import HANG_SECONDS, register
from self_certifying import CertifiedFetch, Witness

import input_workers as iw


def end_of_data() -> Any:
    raise iw.EndOfData


@pytest.mark.parametrize(
    ("rows", "calls"),
    [(1, [4, 8, 12, 16]), (3, [2, 3, 4, 6]), (4, [1, 2, 3, 4]), (8, [1, 1, 2, 2]), (9, [1, 1, 2, 2])],
)
def test_no_call_is_made_ahead_of_the_trainer(coordinator: iw.GlobalCoordinator, rows: int, calls: list[int]) -> None:
    made: list[threading.Thread] = []
    inner = CertifiedFetch(lambda worker, call: rows, end_of_data)

    def fetch(worker_id: int, batch_size: int) -> Any:
        made.append(threading.current_thread())
        return inner(worker_id, batch_size)

    source = register(coordinator, fetch, 4, num_workers=0)
    coordinator.start()
    assert not made
    witness, counts = Witness(), []
    for _ in calls:
        witness.see(source.next_batch(), 4)
        counts.append(len(made))
    assert counts == calls
    assert set(made) == {threading.current_thread()}


def test_nor_for_a_stream_in_its_order(coordinator: iw.GlobalCoordinator) -> None:
    requests: list[tuple[int, threading.Thread]] = []

    class Rows:
        def __len__(self) -> int:
            return 40

        def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
            requests.append((request.index, threading.current_thread()))
            return [rows.copy(), rows.copy()]

    source = register(coordinator, iw.Stream(Rows(), rows_per_request=2), 4, num_workers=0, ordered=True)
    coordinator.start()
    for number in range(10):
        assert source.next_batch().data.tolist() == list(range(number * 4, number * 4 + 4))
        assert [index for index, _ in requests] == list(range(number * 2 + 2))
    assert {thread for _, thread in requests} == {threading.current_thread()}


def test_each_call_is_made_by_the_trainer_that_asks(coordinator: iw.GlobalCoordinator) -> None:
    made: list[threading.Thread] = []

    def fetch(worker_id: int, batch_size: int) -> Any:
        made.append(threading.current_thread())
        return [np.zeros(4), np.zeros(4)]

    source = register(coordinator, fetch, 4, num_workers=0)
    coordinator.start()
    asked = []
    for _ in range(5):
        thread = threading.Thread(target=source.next_batch)
        thread.start()
        thread.join(HANG_SECONDS)
        asked.append(thread)
        source.next_batch()
        asked.append(threading.current_thread())
    assert made == asked


@pytest.mark.parametrize("ask", ["next_batch", "iterate", "specs"])
def test_the_function_cannot_ask_for_a_batch_of_its_own_source(coordinator: iw.GlobalCoordinator, ask: str) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "next_batch": lambda: source.next_batch(HANG_SECONDS),
        "iterate": lambda: next(iter(source)),
        "specs": lambda: source.specs(HANG_SECONDS),
    }
    source: Any = None

    def fetch(worker_id: int, batch_size: int) -> Any:
        calls[ask]()

    errors: list[BaseException] = []

    def train() -> None:
        try:
            source.next_batch()
        except BaseException as error:
            errors.append(error)

    source = register(coordinator, fetch, 4, num_workers=0)
    coordinator.start()
    trainer = threading.Thread(target=train, daemon=True)
    trainer.start()
    trainer.join(HANG_SECONDS / 2)
    assert not trainer.is_alive(), "it waits for itself"
    (error,) = errors
    assert isinstance(error, iw.FetchFailed)
    assert isinstance(error.__cause__, iw.LifecycleError)
    assert "must not ask for a batch of its own source" in str(error.__cause__)


def test_it_may_ask_for_a_batch_of_another(coordinator: iw.GlobalCoordinator) -> None:
    inner = register(coordinator, CertifiedFetch(lambda worker, call: 4, end_of_data), 4, num_workers=0, name="inner")
    outer = register(coordinator, lambda worker_id, batch_size: list(inner.next_batch()), 4, num_workers=0)
    coordinator.start()
    witness = Witness()
    for _ in range(5):
        witness.see(outer.next_batch(), 4)


def test_a_stop_by_another_thread_names_a_trainer_that_is_in_the_function(coordinator: iw.GlobalCoordinator) -> None:
    inside, release = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def long_call(worker_id: int, batch_size: int) -> Any:
        inside.set()
        release.wait(HANG_SECONDS)
        return [np.zeros(4), np.zeros(4)]

    source = register(coordinator, long_call, 4, num_workers=0)
    coordinator.start()

    def train() -> None:
        try:
            source.next_batch()
        except BaseException as error:
            errors.append(error)

    trainer = threading.Thread(target=train, name="the trainer")
    trainer.start()
    assert inside.wait(HANG_SECONDS)
    assert coordinator.stop(0.1) is False
    (stuck,) = coordinator.last_stop.stuck
    assert stuck.name == "the trainer"
    assert "long_call" in stuck.stack
    release.set()
    trainer.join(HANG_SECONDS)
    assert [type(error) for error in errors] == [iw.QueueClosed]
    assert coordinator.stop()
    assert coordinator.last_stop.stuck == ()
    assert source.stats().rows_in_flight == 0


def test_a_stop_in_the_function_itself_is_no_deadlock(coordinator: iw.GlobalCoordinator) -> None:
    stopped: list[bool] = []

    def fetch(worker_id: int, batch_size: int) -> Any:
        stopped.append(coordinator.stop(5.0))
        return [np.zeros(4), np.zeros(4)]

    source = register(coordinator, fetch, 4, num_workers=0)
    coordinator.start()
    with pytest.raises(iw.QueueClosed):
        source.next_batch()
    assert len(stopped) == 1


# ---- Ctrl-C


class CtrlC:
    """Raises KeyboardInterrupt at the `at`-th place where a read looks for signals, in our code or in the fetch function."""

    def __init__(self, at: int) -> None:
        self._left = at
        self.where: str | None = None  # None: there were fewer places

    def look(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event not in ("call", "c_return") or self.where is not None:
            return
        if "input_workers" not in code.co_filename.replace(os.sep, "/").split("/") and code.co_name != "fetch":
            return
        if code.co_name == "_give_back":  # what a weak reference calls: Python itself swallows Ctrl-C there
            return
        if self._left:
            self._left -= 1
            return
        after = f" after {arg.__name__}()" if event == "c_return" else ""
        self.where = f"{os.path.basename(code.co_filename)}:{frame.f_lineno} {code.co_qualname}: {event}{after}"
        raise KeyboardInterrupt


def read_interrupted(at: int, ordered: bool) -> tuple[str | None, list[int]]:
    """Read with an interrupt in the second batch; return where it came, and the rows of that and three more batches."""

    class Rows:
        def __len__(self) -> int:
            return 1000

        def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
            return [rows.copy(), rows.copy()]

    coordinator = iw.GlobalCoordinator()
    source = register(coordinator, iw.Stream(Rows(), rows_per_request=3), 4, num_workers=0, ordered=ordered)
    ctrl_c, rows, swallowed = CtrlC(at), [], []

    def train() -> None:
        rows.extend(source.next_batch().data.tolist())
        try:
            sys.setprofile(ctrl_c.look)
            try:
                rows.extend(source.next_batch().data.tolist())
            finally:
                sys.setprofile(None)
            swallowed.append(ctrl_c.where)
        except KeyboardInterrupt:
            pass
        for _ in range(3):
            rows.extend(source.next_batch(HANG_SECONDS).data.tolist())

    with coordinator:
        trainer = threading.Thread(target=train, daemon=True)
        trainer.start()
        trainer.join(HANG_SECONDS)
        assert not trainer.is_alive(), f"it hangs after Ctrl-C at {ctrl_c.where}"
    assert not any(swallowed), f"Ctrl-C at {ctrl_c.where} was swallowed"
    assert source.stats().rows_in_flight == 0, f"{source.stats().ledger} after Ctrl-C at {ctrl_c.where}"
    assert not coordinator.last_stop.failures, f"{coordinator.last_stop.failures} after Ctrl-C at {ctrl_c.where}"
    return ctrl_c.where, rows


@pytest.mark.parametrize("ordered", [False, True])
def test_ctrl_c_anywhere_in_a_read_loses_no_row_and_repeats_none(ordered: bool) -> None:
    for at in itertools.count():
        where, rows = read_interrupted(at, ordered)
        assert rows == list(range(len(rows))), f"{rows} after Ctrl-C at {where}"
        assert len(rows) == (16 if where else 20), f"Ctrl-C at {where}"
        if where is None:
            break
    assert at > 30, f"only {at} places: does the profiler see them?"


@pytest.mark.parametrize("kind", ["ordered", "plain"])
def test_a_storm_of_ctrl_c_loses_no_row_and_nothing_hangs(kind: str) -> None:
    child = pathlib.Path(__file__).with_name("inline_interrupts_child.py")
    done = subprocess.run([sys.executable, str(child), "2.5", kind], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
