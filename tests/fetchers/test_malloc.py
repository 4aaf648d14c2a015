"""Memory that was freed is kept when malloc is told to, and pages are not faulted in again."""

import ctypes
import os
import subprocess
import sys

import pytest

import input_workers as iw
from input_workers.fetchers import malloc

# Prints how many pages were faulted in by making and dropping arrays of 32 MB again and again, in the main thread or in two
# others at once. NumPy's huge pages are off, so a fresh array costs one fault for every 4 KB.
COUNT_FAULTS = """
import resource, threading
import numpy as np
import input_workers as iw
{before}
def make(count=1):
    for _ in range(count):
        first, second = (np.full((8, 1 << 20), 1.0, np.float32) for _ in range(2))
        del first, second
def work():
    make()
    warm.wait()
    counted.wait()
    make(20)
warm, counted = threading.Barrier({threads} + 1), threading.Event()
threads = [threading.Thread(target=work) for _ in range({threads})]
for thread in threads:
    thread.start()
if not threads:
    make()
warm.wait()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counted.set()
if not threads:
    make(20)
for thread in threads:
    thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""
KEEP = "from input_workers.fetchers.malloc import keep_freed_memory; keep_freed_memory(); keep_freed_memory()"
START_A_SOURCE = """
rows = [np.zeros((32, 4), np.float32)]
coordinator = iw.init_data_input_workers(
    "numpy", ["data"], lambda worker_id, batch_size: rows, 32, 1, fetchers=iw.Threads(keep_freed_memory=True)
)
with coordinator:
    coordinator["train"].next_batch()
"""

glibc_only = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")


def count_faults(before, threads=0):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS.format(before=before, threads=threads)],
        env={**environment, "NUMPY_MADVISE_HUGEPAGE": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return int(done.stdout)


@glibc_only
@pytest.mark.parametrize("threads", [0, 2])
def test_kept_memory_is_not_faulted_in_again(threads):
    assert 10 * count_faults(KEEP, threads) < count_faults("", threads)


@glibc_only
def test_the_option_of_threads_takes_effect_when_the_source_starts():
    assert 10 * count_faults(START_A_SOURCE) < count_faults("")


def test_another_c_library_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: object())
    with pytest.raises(iw.ConfigError, match="needs the mallopt of glibc"):
        malloc.keep_freed_memory()


@glibc_only
def test_a_refusal_is_an_error(monkeypatch):
    class Refusing:
        gnu_get_libc_version = staticmethod(lambda: b"2.36")

        class mallopt:  # noqa: N801
            def __new__(cls, parameter, value):
                return 0

    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: Refusing())
    with pytest.raises(iw.ConfigError, match="was refused by mallopt"):
        malloc.keep_freed_memory()


def test_the_option_is_true_or_false():
    assert iw.Threads(keep_freed_memory=True).keep_freed_memory
    with pytest.raises(iw.ConfigError, match="keep_freed_memory must be True or False, got 1"):
        iw.Threads(keep_freed_memory=1)
