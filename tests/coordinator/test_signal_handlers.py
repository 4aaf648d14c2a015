"""What a signal handler may call while it interrupts the trainer anywhere: an answer or a clear error, never a hang."""

from __future__ import annotations

import subprocess
import sys

import pytest
from gates import HANG_SECONDS

PRELUDE = f"""
import faulthandler, random, signal, sys, threading
faulthandler.dump_traceback_later({HANG_SECONDS}, exit=True)
sys.path[:0] = {sys.path!r}
import numpy as np
import input_workers as iw
from gates import register
stream = iw.Stream(iw.sources.Arrays(np.arange(1 << 20), np.arange(1 << 20)), epochs=None)
coordinator = iw.GlobalCoordinator()
source = register(coordinator, stream, 4, num_workers=WORKERS)
"""

STORM = """
random.seed(1)
calls, refused, due = 0, 0, True
def handler(*_):
    global calls, refused, due
    calls += 1
    try:
        CALL
    except iw.LifecycleError as error:
        assert "set a flag" in str(error) or "one source" in str(error) or "own source" in str(error), error
        refused += 1
    due = True
signal.signal(signal.SIGALRM, handler)
coordinator.start()
expected = 0
while calls < 800:
    batch = source.next_batch(20.0)
    if due:
        due = False
        signal.setitimer(signal.ITIMER_REAL, 0.00005 + random.random() * 0.0005)
signal.setitimer(signal.ITIMER_REAL, 0)
assert coordinator.stop() and not coordinator.last_stop.failures, coordinator.last_stop
stats = source.stats()
assert stats.rows_in_flight == 0, stats.ledger
print(calls, refused)
"""

STOP = """
random.seed(SEED)
def handler(*_):
    stopped.append(coordinator.stop(5.0))
signal.signal(signal.SIGTERM, handler)
signal.signal(signal.SIGALRM, handler)
for turn in range(60):
    stopped = []
    coordinator.start()
    source.next_batch(20.0)
    signal.setitimer(signal.ITIMER_REAL, 0.00005 + random.random() * 0.002)
    try:
        while True:
            source.next_batch(20.0)
    except iw.QueueClosed:
        pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    # With num_workers=0 it may have interrupted the fetch function itself, which then has not ended.
    assert len(stopped) == 1 and (stopped[0] or not WORKERS), (turn, stopped)
    coordinator.stop()
    assert not coordinator.last_stop.failures, coordinator.last_stop
    stats = source.stats()
    assert stats.rows_in_flight == 0, stats.ledger
print(turn)
"""


def in_a_child(script: str, workers: int) -> str:
    text = (PRELUDE + script).replace("WORKERS", str(workers))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120, check=False)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("stop: 1 threads did not end: MainThread")]
    assert (done.returncode, lines) == (0, []), done.stderr
    return done.stdout


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("call", ["source.state_dict()", "source.stats()", "source.next_batch(0.01)"])
def test_a_handler_gets_an_answer_or_an_error_that_says_what_to_do(call: str, workers: int) -> None:
    body = (
        call
        if "next_batch" not in call
        else f"\n        try:\n            {call}\n        except iw.WaitTimeout:\n            pass"
    )
    calls, _ = map(int, in_a_child(STORM.replace("CALL", body), workers).split())
    assert calls >= 800


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_works_in_a_handler_wherever_it_interrupts(workers: int) -> None:
    assert in_a_child(STOP.replace("SEED", "3"), workers)
