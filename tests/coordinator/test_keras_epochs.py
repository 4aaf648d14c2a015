"""`epochs()`: Keras' fit, evaluate and predict over a source, on each of its backends."""

import os
import pathlib
import subprocess
import sys

import pytest

CHILD = pathlib.Path(__file__).with_name("keras_child.py")


@pytest.mark.parametrize(
    ("backend", "feeds"), [("tensorflow", ["numpy", "tensorflow"]), ("jax", ["numpy"]), ("torch", ["numpy"])]
)
def test_on_the_backend(backend, feeds):
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-W", "error::UserWarning", str(CHILD), *feeds]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ok")]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines) == len(feeds) + 9
