"""A coordinator that is dropped, forked or interrupted: its threads end, its child says no, and Ctrl-C works everywhere."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest
from gates import HANG_SECONDS, Gate, register
from self_certifying import CertifiedFetch, Witness

import input_workers as iw


def end_of_data() -> Any:
    raise iw.EndOfData


def endless() -> CertifiedFetch:
    return CertifiedFetch(lambda worker, call: 4, end_of_data)


def our_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(("fetcher-", "enqueuer-"))]


@pytest.mark.parametrize("state", ["blocked at a full queue", "no data", "ended", "failed"])
def test_a_dropped_coordinator_is_collected_and_its_threads_end(state: str) -> None:
    coordinator = iw.GlobalCoordinator()
    fetch: Any = endless()
    if state == "no data":
        fetch = lambda worker_id, batch_size: None  # noqa: E731
    elif state == "ended":
        fetch = CertifiedFetch(lambda worker, call: None, end_of_data)
    elif state == "failed":
        fetch = lambda worker_id, batch_size: 3  # noqa: E731
    source = register(coordinator, fetch, num_workers=2)
    coordinator.start()
    threads = our_threads()
    gone = weakref.ref(coordinator)
    del coordinator, source
    gc.collect()
    assert gone() is None
    for thread in threads:
        thread.join(HANG_SECONDS)
        assert not thread.is_alive()


@pytest.mark.parametrize("scope", ["", "gpu_0"])
def test_a_handle_alone_keeps_its_source_running(scope: str) -> None:
    def make() -> Any:
        coordinator = iw.GlobalCoordinator()
        register(coordinator, endless(), name_scope=scope)
        coordinator.start()
        return coordinator[f"{scope}/train" if scope else "train"]

    handle = make()
    gc.collect()
    witness = Witness()
    for _ in range(50):
        witness.see(handle.next_batch(), 4)
    del handle
    gc.collect()
    for thread in our_threads():
        thread.join(HANG_SECONDS)
        assert not thread.is_alive()


@pytest.mark.parametrize("lock", ["assembly", "device", "recorder", None])
def test_a_forked_child_is_told_so_and_never_hangs_whatever_lock_was_held(
    coordinator: iw.GlobalCoordinator, lock: str | None
) -> None:
    source = register(coordinator, endless())
    coordinator.start()
    source.next_batch()
    run = source._core.run
    held = {"assembly": run.assembly._lock, "device": run.devices["train"].queue.lock, "recorder": run.recorder.lock}.get(lock)
    if held is not None:
        held.acquire()
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(5)
            try:
                source.next_batch()
            except iw.LifecycleError:
                code = 0 if coordinator.stop(1.0) else 2
        finally:
            os._exit(code)
    if held is not None:
        held.release()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    Witness().gap([0])
    assert source.next_batch().valid_rows == 4, "the parent goes on"


def in_a_child(script: str, code: int = 0) -> str:
    """Run in a fresh interpreter, whose main thread the signals meet; return its stdout."""
    prelude = f"""
import faulthandler, signal, sys, threading
faulthandler.dump_traceback_later({HANG_SECONDS}, exit=True)
sys.path[:0] = {sys.path!r}
import input_workers as iw
from gates import Gate, register
from self_certifying import CertifiedFetch, Witness
def end_of_data():
    raise iw.EndOfData
def interrupt_when(condition):
    def wait():
        while not condition():
            threading.Event().wait(0.001)
        threading.Event().wait(0.05)
        signal.pthread_kill(main, signal.SIGINT)
    main = threading.main_thread().ident
    thread = threading.Thread(target=wait)
    thread.start()
    return thread
coordinator = iw.GlobalCoordinator()
"""
    done = subprocess.run([sys.executable, "-c", prelude + script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_ctrl_c_interrupts_a_wait_for_a_batch_and_nothing_is_lost() -> None:
    in_a_child("""
gate = Gate()
source = register(coordinator, gate)
coordinator.start()
witness = Witness()
for _ in range(3):
    gate.release(4)
    witness.see(source.next_batch(), 4)
    gate.await_calls()
    thread = interrupt_when(lambda: True)
    try:
        source.next_batch()
        sys.exit("not interrupted")
    except KeyboardInterrupt:
        thread.join()
gate.release(4)
witness.see(source.next_batch(), 4)
gate.open()
assert coordinator.stop() and not coordinator.last_stop.failures
""")


def test_ctrl_c_interrupts_a_start_and_undoes_it() -> None:
    in_a_child("""
inside = threading.Event()
def init(handle, everything):
    if first.acquire(blocking=False):
        inside.set()
        threading.Event().wait(20)
first = threading.Semaphore(1)
source = register(coordinator, CertifiedFetch(lambda w, c: 4, end_of_data), init_fun=init)
thread = interrupt_when(inside.is_set)
before = threading.active_count()
try:
    coordinator.start()
    sys.exit("not interrupted")
except KeyboardInterrupt:
    thread.join()
assert threading.active_count() == before - 1
coordinator.start()
assert source.next_batch().valid_rows == 4
assert coordinator.stop()
""")


def test_ctrl_c_interrupts_a_stop_that_waits_and_it_may_be_called_again() -> None:
    in_a_child("""
gate = Gate()
source = register(coordinator, gate)
coordinator.start()
gate.await_calls()
thread = interrupt_when(lambda: repr(coordinator).startswith("<GlobalCoordinator stop"))
try:
    coordinator.stop(20)
    sys.exit("not interrupted")
except KeyboardInterrupt:
    thread.join()
gate.open()
assert coordinator.stop(20)
try:
    source.next_batch()
except iw.QueueClosed:
    pass
""")


def test_ctrl_c_at_any_moment_of_reading_loses_and_repeats_no_batch() -> None:
    out = in_a_child("""
source = register(coordinator, CertifiedFetch(lambda w, c: 1 + c % 9, end_of_data), 4)
coordinator.start()
witness = Witness()
interrupts = 0
got = []
signal.signal(signal.SIGALRM, signal.default_int_handler)
while interrupts < 1500:
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.00005 + interrupts % 50 * 0.00002)
        while True:
            got.append(source.next_batch())
    except KeyboardInterrupt:
        interrupts += 1
signal.setitimer(signal.ITIMER_REAL, 0)
for batch in got:
    witness.see(batch, 4)
stats = source.stats()
assert stats.rows_delivered == witness.rows, (stats.rows_delivered, witness.rows)
assert coordinator.stop() and not coordinator.last_stop.failures, coordinator.last_stop
print(len(got))
""")
    assert int(out) > 0


def test_the_gate_itself_lets_go_of_its_callers(coordinator: iw.GlobalCoordinator) -> None:
    gate = Gate()
    register(coordinator, gate, num_workers=3)
    coordinator.start()
    gate.await_calls(3)
    gate.open()
    assert coordinator.stop()
