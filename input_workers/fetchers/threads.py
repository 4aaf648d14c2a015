"""Fetchers as threads: the reference backend. Right for fetch functions that wait or release the GIL."""

from __future__ import annotations

import math
import sys
import threading
import traceback
from collections.abc import Callable, Sequence

from input_workers.errors import Failure, FetchTimeout
from input_workers.lifecycle import seconds_left
from input_workers.metrics.recorder import FetcherRecorder

__all__ = ["ThreadFetchers", "join_threads", "stack_of"]


def stack_of(thread: threading.Thread) -> str:
    """Return the stack of a running thread as text; empty if it has ended."""
    frame = sys._current_frames().get(thread.ident or -1)
    return "".join(traceback.format_stack(frame)) if frame is not None else ""


def join_threads(threads: Sequence[threading.Thread], deadline: float) -> list[tuple[str, str]]:
    """Wait until the threads end or `time.monotonic()` reaches `deadline`; return (name, stack) of those that did not.

    The calling thread is not waited for, but named: it has not ended.
    """
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(seconds_left(deadline))
    return [(thread.name, stack_of(thread)) for thread in threads if thread.is_alive()]


class ThreadFetchers:
    """Runs the fetch loop in daemon threads.

    Args:
        source: the name, for errors and thread names.
        recorders: one for each fetcher.
        loop: the fetch loop of a fetcher; it never raises.
        fail: told a call that runs longer than `fetch_timeout_s`.
        on_end: called in the last fetcher to end.
    """

    # Invariant under _lock: `_running` counts the fetchers whose loop has not returned.

    def __init__(
        self,
        source: str,
        recorders: Sequence[FetcherRecorder],
        loop: Callable[[FetcherRecorder], None],
        fail: Callable[[Failure], object],
        on_end: Callable[[], None],
        fetch_timeout_s: float | None,
    ) -> None:
        self._source = source
        self._loop = loop
        self._fail = fail
        self._on_end = on_end
        self._timeout_s = math.inf if fetch_timeout_s is None else fetch_timeout_s
        self._lock = threading.Lock()
        self._running = len(recorders)
        self._recorders = list(recorders)
        self._threads = [
            threading.Thread(target=self._run, args=(recorder,), name=f"fetcher-{source}-{recorder.worker_id}", daemon=True)
            for recorder in recorders
        ]

    def start(self) -> None:
        """Start every thread. If one cannot be started, those that were see the end of the run by themselves."""
        for thread in self._threads:
            thread.start()

    def _run(self, recorder: FetcherRecorder) -> None:
        self._loop(recorder)
        with self._lock:
            self._running -= 1
            last = not self._running
        if last:
            self._on_end()

    def check_calls(self, now: float) -> float:
        """Fail the source for a call that runs too long; return when to look again, `inf` for never."""
        if self._timeout_s == math.inf:
            return math.inf
        earliest = math.inf
        for recorder, thread in zip(self._recorders, self._threads, strict=True):
            due = recorder.call_started + self._timeout_s
            if due > now:
                earliest = min(earliest, due)
            elif thread.is_alive():
                recorder.count_error(FetchTimeout.__name__)
                stack = stack_of(thread)
                request = recorder.request
                where = "" if request is None else f", request {request.index}"
                self._fail(
                    Failure(
                        FetchTimeout,
                        f"source {self._source!r}, worker {recorder.worker_id}{where}: a call has run for over "
                        f"{self._timeout_s:g} s (fetch_timeout_s), and a thread cannot be killed; it is in\n{stack}",
                    )
                )
                self._timeout_s = math.inf  # the source has failed: nothing more to watch
                return math.inf
        # A call that begins while nobody looks is found in time by looking once a timeout.
        return min(earliest, now + self._timeout_s)

    def has_thread(self, thread: threading.Thread) -> bool:
        """Whether this is one of the fetchers."""
        return thread in self._threads

    def join(self, deadline: float) -> list[tuple[str, str]]:
        """Wait for the threads that were started; return (name, stack) of those still running."""
        return join_threads([thread for thread in self._threads if thread.ident is not None], deadline)
