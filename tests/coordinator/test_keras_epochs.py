"""`epochs()`: Keras' fit, evaluate and predict over a source, on each of its backends."""

import os
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

CHILD = pathlib.Path(__file__).with_name("keras_child.py")


FEEDS = {"tensorflow": ["numpy", "tensorflow"], "jax": ["numpy"], "torch": ["numpy"]}


def run(backend):
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-W", "error::UserWarning", str(CHILD), *FEEDS[backend]]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def runs():
    """All backends, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FEEDS, pool.map(run, FEEDS), strict=True))


@pytest.mark.parametrize("backend", FEEDS)
def test_on_the_backend(runs, backend):
    done = runs[backend]
    lines = [line for line in done.stdout.splitlines() if line.startswith("ok")]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines) == len(FEEDS[backend]) + 9
