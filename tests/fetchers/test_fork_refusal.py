"""Worker processes are not forked beside threads that may hold locks."""

from __future__ import annotations

import _thread
import threading

import pytest

import input_workers as iw
from input_workers.fetchers.process_launch import refuse_fork_beside_threads


def test_a_thread_of_python_is_named(no_other_threads: None) -> None:
    gate = threading.Event()
    thread = threading.Thread(target=gate.wait, name="beside")
    thread.start()
    try:
        with pytest.raises(iw.ConfigError, match="beside"):
            refuse_fork_beside_threads()
    finally:
        gate.set()
        thread.join()


def test_a_native_thread_that_has_called_python_once_does_not_forbid_it_for_ever(no_other_threads: None) -> None:
    done = threading.Event()

    def as_native_code_does() -> None:
        threading.current_thread()
        done.set()

    _thread.start_new_thread(as_native_code_does, ())
    assert done.wait(30.0)
    assert any(isinstance(thread, threading._DummyThread) for thread in threading.enumerate())
    refuse_fork_beside_threads()
