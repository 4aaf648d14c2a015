"""Adapters load what they need when they are used, and name what is missing."""

import subprocess
import sys

import pytest

NAMES = {"keras": "keras", "tf_data": "tensorflow", "torch": "torch"}


def run(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("name", "package"), NAMES.items())
def test_a_missing_framework_is_named_with_what_to_install(name, package):
    script = f"import sys, input_workers as iw\nsys.modules[{package!r}] = None\niw.adapters.{name}"
    done = run(script)
    last = done.stderr.splitlines()[-1]
    assert "ConfigError: " in last, done.stderr
    assert last.endswith(f": pip install input-workers[{package}]"), last


def test_epochs_without_keras_names_it():
    script = """
import sys, numpy as np, input_workers as iw
sys.modules["keras"] = None
stream = iw.Stream(iw.sources.Arrays(np.arange(8)))
coordinator = iw.init_data_input_workers("numpy", ["x"], stream, 4)
coordinator["train"].epochs()
"""
    assert run(script).stderr.splitlines()[-1].endswith("ConfigError: this needs Keras 3: pip install input-workers[keras]")


def test_what_needs_nothing_else_loads_without_any():
    script = "\n".join(
        [
            "import sys, input_workers as iw",
            *(f"sys.modules[{package!r}] = None" for package in NAMES.values()),
            "iw.adapters.BackgroundGenerator, iw.adapters.ProducerPool, iw.adapters.dataflow",
        ]
    )
    done = run(script)
    assert done.returncode == 0, done.stderr


def test_what_is_not_there_is_said_to_be_no_attribute():
    assert "has no attribute 'nothing'" in run("import input_workers as iw; iw.adapters.nothing").stderr
