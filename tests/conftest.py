"""What holds around every test: nothing is left running or open, and nobody uses the process-wide coordinator."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import hypothesis
import psutil
import pytest
from fetchers.shared_between import Door

import input_workers as iw
from input_workers.fetchers.fork_server import fork_server

# A shell's background jobs ignore Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What a test has set in motion must end within this time after it; it is waited for, not slept through.
LEAK_SECONDS = 5.0
FRAMEWORKS = ("tensorflow", "torch", "jax")

hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.register_profile("explore", parent=hypothesis.settings.get_profile("repeatable"), derandomize=False)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that lists the folder
            pass
    return found


def _leaks(threads: set[threading.Thread], children: set[int], descriptors: dict[int, str], loaded: bool) -> list[str]:
    deadline = time.monotonic() + LEAK_SECONDS
    leaks = []
    for thread in set(threading.enumerate()) - threads:
        if isinstance(thread, threading._DummyThread):  # a framework's, which keeps it
            continue
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            leaks.append(f"thread {thread.name}")
    fresh = [child for child in psutil.Process().children(recursive=True) if child.pid not in children]
    _, left = psutil.wait_procs(fresh, timeout=max(0.0, deadline - time.monotonic()))
    leaks += [f"process {child.pid}: {child}" for child in left]
    if not loaded:  # a framework that this test was the first to load keeps what it opens
        opened = {fd: target for fd, target in _descriptors().items() if descriptors.get(fd) != target}
        if opened:
            gc.collect()
            leaks += [f"descriptor {fd}: {target}" for fd, target in _descriptors().items() if opened.get(fd) == target]
    return leaks


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    threads = set(threading.enumerate())
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    descriptors = _descriptors()
    modules = len(sys.modules)
    had = [framework in sys.modules for framework in FRAMEWORKS]
    yield
    loaded = len(sys.modules) > modules and [framework in sys.modules for framework in FRAMEWORKS] != had
    server = fork_server.holds()
    if server is not None:  # one for the process, from its first use to its end
        children.add(server[0])
        descriptors[server[1]] = os.readlink(f"/proc/self/fd/{server[1]}")
    leaks = _leaks(threads, children, descriptors, loaded)
    assert not leaks, f"left behind: {leaks}"


@pytest.fixture(autouse=True)
def _the_process_wide_coordinator_is_unused() -> Iterator[None]:
    yield
    assert len(iw.global_coordinator) == 0, f"a test registered with {iw.global_coordinator}"


@pytest.fixture
def coordinator(_nothing_is_left: None) -> Iterator[iw.GlobalCoordinator]:
    """A coordinator of the test's own, stopped after it; whatever happened, its ledgers must then add up."""
    coordinator = iw.GlobalCoordinator()
    yield coordinator
    ended = coordinator.stop(30.0)
    assert ended, coordinator.last_stop
    for name, stats in coordinator.stats().items():
        assert stats.rows_in_flight == 0, f"{name}: {stats.ledger}"
        lost = [line for line in (coordinator.last_stop.failures if coordinator.last_stop else {}).values() if "ledger" in line]
        assert not lost, lost


@pytest.fixture
def no_other_threads() -> None:
    """Before a fork: what another test has set in motion must have ended, as it had to, but perhaps not quite yet."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not isinstance(thread, threading._DummyThread):
            thread.join(5.0)


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door()
    yield door
    door.close()
