"""`adapters.keras.parallel`: a PyDataset whose batches our workers make."""

import os
import pathlib
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

import input_workers as iw

CHILD = pathlib.Path(__file__).with_name("keras_parallel_child.py")


def child(backend, *arguments):
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-W", "error::UserWarning", str(CHILD), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


FETCHERS = {"tensorflow": (["thread", "process"], 9), "jax": (["thread"], 3), "torch": (["process"], 7)}


def run(backend):
    with child(backend, *FETCHERS[backend][0]) as running:
        return *running.communicate(timeout=300), running.returncode


@pytest.fixture(scope="module")
def runs():
    """All backends, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FETCHERS, pool.map(run, FETCHERS), strict=True))


@pytest.mark.parametrize("backend", FETCHERS)
def test_on_the_backend(runs, backend):
    out, errors, returncode = runs[backend]
    assert returncode == 0, out + errors
    assert len([line for line in out.splitlines() if line.startswith("ok")]) == FETCHERS[backend][1]


def test_ctrl_c_ends_fit_and_its_workers():
    with child("jax", "ctrl_c") as running:
        workers = [psutil.Process(int(pid)) for pid in running.stdout.readline().split()]
        assert len(workers) >= 3  # two, and the fork server
        running.send_signal(signal.SIGINT)
        out, errors = running.communicate(timeout=60)
    assert running.returncode != 0
    assert "KeyboardInterrupt" in errors, out + errors
    _, left = psutil.wait_procs(workers, timeout=20)
    assert not left


@pytest.mark.parametrize(
    ("dataset", "match"), [(object(), "__getitem__ and __len__"), ([], "no batch"), ([1.0], "single number")]
)
def test_what_is_no_dataset_is_refused(dataset, match):
    with pytest.raises((iw.ConfigError, iw.SpecMismatch), match=match):
        iw.adapters.keras.parallel(dataset)


def test_a_module_that_cannot_be_preloaded_is_named(coordinator):
    fetchers = iw.Processes(start="forkserver", preload=("no_such_module",))
    iw.init_data_input_workers("numpy", ["x"], lambda *_: None, 4, 1, fetchers=fetchers, coordinator=coordinator)
    with pytest.raises(OSError, match="preload: 'no_such_module' cannot be imported"):
        coordinator.start()
    with pytest.raises(iw.ConfigError, match="wanted a tuple"):
        iw.Processes(preload="keras")
