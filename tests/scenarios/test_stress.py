"""A few seeds of the stress program; tests/chaos runs it for 20 minutes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import input_workers as iw

TESTS = Path(__file__).parents[1]
# A seed that hangs ends the program itself, after it has dumped all stacks.
HANG_SECONDS = 150.0


def run_stress(seconds: float, *arguments: str) -> None:
    """Run the program in a process of its own, so that a hang or a crash shows as a failed test. Fails with its output."""
    paths = [str(Path(iw.__file__).parents[1]), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "chaos.stress", *arguments], cwd=TESTS, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, timeout=seconds + HANG_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_40_random_sources_deliver_every_row() -> None:
    run_stress(25.0, "--seconds", "22", "--seeds", "1-40")
