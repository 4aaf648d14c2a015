"""`adapters.keras.parallel`: a PyDataset whose batches our workers make."""

import pathlib
import signal

import psutil
import pytest
from keras_checks import check_run, run_all, start

import input_workers as iw

CHILD = pathlib.Path(__file__).with_name("keras_parallel_child.py")


FETCHERS = {"tensorflow": ["thread", "process"], "jax": ["thread"], "torch": ["process"]}
CHECKS = {"tensorflow": 9, "jax": 3, "torch": 7}


@pytest.fixture(scope="module")
def runs():
    return run_all(CHILD, FETCHERS)


@pytest.mark.parametrize("backend", FETCHERS)
def test_on_the_backend(runs, backend):
    check_run(runs[backend], CHECKS[backend])


def test_ctrl_c_ends_fit_and_its_workers():
    with start(CHILD, "jax", "ctrl_c") as running:
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
