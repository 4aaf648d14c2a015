"""The ends of a trainer with worker processes: all cases, and what each must look like from outside."""

from __future__ import annotations

import itertools
import pathlib
import random
import signal
import subprocess
import sys
import tempfile

CHILD = pathlib.Path(__file__).with_name("exit_child.py")
LIMIT_SECONDS = 60.0
ENDS = {
    "main": (0, ""),
    "sys.exit": (3, ""),
    "error": (1, "ValueError: the user's own"),
    "interrupt": (-signal.SIGINT, "KeyboardInterrupt"),
    "os._exit": (4, ""),
    "killed": (-signal.SIGKILL, ""),
    "collected": (0, ""),
    "with": (1, "ValueError: the user's own"),
}
CASES = list(
    itertools.product(["spawn", "forkserver", "fork"], ENDS, ["hold", "drop"], ["stop", "leave"], ["empty", "flowing", "full"])
)
SAMPLE = random.Random(20).sample(CASES, 24)


def check_exit(case: tuple[str, ...]) -> None:
    """Run a case. The pipes that its workers write to are ours: `run` returns when none is left."""
    start, *rest = case
    command = [sys.executable, "-W", "error", str(CHILD), *rest, "numpy", start]
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(CHILD.parents[2]), "TMPDIR": folder}
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, env=environment, check=False)
    code, last_line = ENDS[case[1]]
    lines = done.stderr.strip().splitlines()
    assert "Timeout (" not in done.stderr, done.stderr
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert (lines[-1] if lines else "") == last_line, done.stderr
    assert sum("Traceback" in line for line in lines) == bool(last_line), done.stderr
