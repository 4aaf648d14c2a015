"""A trainer may end however it likes: its own exit code, its own traceback and nothing else, and never a hang.

These are a sample of the cases, and all of those with a framework; tests/chaos runs all.
"""

from __future__ import annotations

import itertools
import pathlib
import random
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

CHILD = pathlib.Path(__file__).with_name("exit_child.py")
LIMIT_SECONDS = 40.0

# Lines that TensorFlow's own log writes when it is loaded.
OF_TENSORFLOW = re.compile(r"[IW]\d{4} |WARNING: All log messages before absl")

# end -> (exit code, last line of stderr)
ENDS = {
    "main": (0, ""),
    "sys.exit": (3, ""),
    "error": (1, "ValueError: the user's own"),
    "interrupt": (-signal.SIGINT, "KeyboardInterrupt"),
    "os._exit": (4, ""),
    "collected": (0, ""),
    "with": (1, "ValueError: the user's own"),
}
CASES = list(itertools.product(ENDS, ["hold", "drop"], ["stop", "leave"], ["empty", "flowing", "full"]))
SAMPLE = random.Random(10).sample(CASES, 28)
FRAMEWORK_CASES = [("main", "hold", "leave", "full", "tensorflow"), ("error", "hold", "leave", "flowing", "tensorflow"),
                   ("collected", "drop", "leave", "full", "tensorflow"), ("sys.exit", "drop", "stop", "flowing", "tensorflow"),
                   ("main", "hold", "leave", "full", "torch"), ("collected", "drop", "leave", "full", "torch"),
                   ("main", "hold", "leave", "full", "jax"), ("collected", "drop", "leave", "full", "jax")]  # fmt: skip


def end_like(case: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run a case; the last part of one with a framework is its feed, and its warnings are its own."""
    command = [sys.executable, "-W", "error", str(CHILD), *case, "numpy"]
    if case in FRAMEWORK_CASES:
        command = [sys.executable, str(CHILD), *case]
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(CHILD.parents[2]),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_ENABLE_X64": "1",
    }
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, env=environment, check=False)


@pytest.fixture(scope="module")
def children() -> dict[tuple[str, ...], subprocess.CompletedProcess[str]]:
    """Each case in a child of its own, two at a time, all of them before the first is looked at."""
    cases = [*FRAMEWORK_CASES, *SAMPLE]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(cases, pool.map(end_like, cases), strict=True))


def check(case: tuple[str, ...], done: subprocess.CompletedProcess[str]) -> None:
    code, last_line = ENDS[case[0]]
    lines = [line for line in done.stderr.strip().splitlines() if not OF_TENSORFLOW.match(line)]
    assert "Timeout (" not in done.stderr, done.stderr
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    if last_line:
        assert lines[0] == "Traceback (most recent call last):", done.stderr
        assert lines[-1] == last_line, done.stderr
        assert sum("Traceback" in line for line in lines) == 1, done.stderr
    else:
        assert lines == [], done.stderr


@pytest.mark.parametrize("case", SAMPLE, ids="-".join)
def test_the_end_of_a_trainer_is_its_own(
    children: dict[tuple[str, ...], subprocess.CompletedProcess[str]], case: tuple[str, ...]
) -> None:
    check(case, children[case])


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=getattr(pytest.mark, case[-1])) for case in FRAMEWORK_CASES], ids="-".join
)
def test_the_end_of_a_trainer_with_a_framework_is_its_own(
    children: dict[tuple[str, ...], subprocess.CompletedProcess[str]], case: tuple[str, ...]
) -> None:
    check(case, children[case])
