"""Trouble around worker processes, each in a trainer of its own: what is left behind, and what is said."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import threading
import time
from typing import Any

import psutil
import pytest

CHILD = pathlib.Path(__file__).with_name("process_child.py")
LIMIT_SECONDS = 60.0
GONE_SECONDS = 2.0
STARTS = ["forkserver", "spawn", "fork"]


def trainer(what: str, start: str, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(CHILD.parents[2])}
    command = [sys.executable, "-W", "error", str(CHILD), what, start]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, env=environment, check=False, **more)


def await_gone(pids: list[int]) -> None:
    """Wait until these have ended, but for one that nobody reaps."""
    deadline = time.monotonic() + GONE_SECONDS
    tick = threading.Event()
    while left := [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, f"still there: {left}"
        tick.wait(0.005)


@pytest.mark.parametrize("start", STARTS)
def test_when_the_trainer_is_killed_nobody_outlives_it(start: str) -> None:
    done = trainer("orphans", start)
    assert done.returncode == -9, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == (4 if start == "forkserver" else 3)
    await_gone(pids)


@pytest.mark.parametrize("start", STARTS)
def test_a_fork_of_the_trainer_leaves_the_workers_alone_and_does_not_keep_them_alive(start: str) -> None:
    done = subprocess.Popen(
        [sys.executable, str(CHILD), "fork_by_the_user", start], stdout=subprocess.PIPE, text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(CHILD.parents[2])},
    )  # fmt: skip
    with done:
        assert done.stdout is not None
        fork, *pids = map(int, done.stdout.readline().split())
        try:
            assert len(pids) >= 2
            await_gone(pids)
        finally:
            psutil.Process(fork).kill()


@pytest.mark.parametrize("start", STARTS)
def test_too_few_descriptors_undo_the_start_and_are_named(start: str) -> None:
    done = trainer("few_descriptors", start)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split(" ", 1)[1] for line in done.stdout.splitlines()]
    failed = [line for line in lines if line]
    assert 0 < len(failed) < len(lines)
    for line in failed:
        assert re.search(r"Errno 24\].*RLIMIT_NOFILE", line), line
        assert re.search(r"worker process \d of 2 cannot be started", line), line


@pytest.mark.parametrize("start", ["forkserver", "spawn", "fork"])
def test_too_few_processes_undo_the_start_and_are_named(start: str) -> None:
    done = trainer("few_processes", start)
    if "Operation not permitted" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("this user may not become another")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"worker process \d of 4 cannot be started: .*RLIMIT_NPROC, processes and threads: 1", done.stdout)


def test_a_flood_of_lines_comes_out_whole_and_marked() -> None:
    done = trainer("flood", "forkserver")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    wanted = [*[f"{number:05} {'x' * 10_000}" for number in range(5000)], "the last line"]
    for worker in (0, 1):
        mark = f"[train/{worker}] "
        assert [line.removeprefix(mark) for line in lines if line.startswith(mark)] == wanted
    assert len(lines) == 2 * len(wanted)
    assert sorted(done.stderr.splitlines()) == ["[train/0] on stderr", "[train/1] on stderr"]


def test_importing_starts_no_process() -> None:
    code = "import input_workers.fetchers.fork_server as module; assert module.fork_server.holds() is None"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT_SECONDS, cwd=CHILD.parents[2])
