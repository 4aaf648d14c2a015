"""`epochs()`: Keras' fit, evaluate and predict over a source, on each of its backends."""

import pathlib

import pytest
from keras_checks import check_run, run_all

CHILD = pathlib.Path(__file__).with_name("keras_child.py")


FEEDS = {"tensorflow": ["numpy", "tensorflow"], "jax": ["numpy"], "torch": ["numpy"]}


@pytest.fixture(scope="module")
def runs():
    return run_all(CHILD, FEEDS)


@pytest.mark.parametrize("backend", FEEDS)
def test_on_the_backend(runs, backend):
    check_run(runs[backend], len(FEEDS[backend]) + 9)
