"""Fetchers as threads: the reference backend. Right for fetch functions that wait or release the GIL."""

from __future__ import annotations

import math
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from input_workers.contracts import FetchRequest
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
        loop: the fetch loop of a fetcher, given what another was at, or None; it never raises.
        fail: told a call that runs longer than `fetch_timeout_s`, and its request.
        on_end: called in the last fetcher to end.
        fetch_timeout_s: how long a call may take.
        replace: given the recorder of a fetcher whose call was taken away and the failure, returns the recorder of another
            fetcher, and what that has to do first. None: such a call fails the source.
    """

    # Invariant under _lock: `_running` counts the fetchers whose loop has not returned, but for the abandoned ones.

    def __init__(
        self,
        source: str,
        recorders: Sequence[FetcherRecorder],
        loop: Callable[[FetcherRecorder, Any], None],
        fail: Callable[[Failure, FetchRequest | None], object],
        on_end: Callable[[], None],
        fetch_timeout_s: float | None,
        replace: Callable[[FetcherRecorder, Failure], tuple[FetcherRecorder, Any]] | None = None,
    ) -> None:
        self._source = source
        self._loop = loop
        self._fail = fail
        self._on_end = on_end
        self._timeout_s = math.inf if fetch_timeout_s is None else fetch_timeout_s
        self._replace = replace
        self._lock = threading.Lock()
        self._running = len(recorders)
        self._fetchers = [(recorder, self._thread(recorder, None)) for recorder in recorders]
        self._abandoned: list[threading.Thread] = []
        self._reported: set[int] = set()  # workers whose call has failed the source

    def _thread(self, recorder: FetcherRecorder, interrupted: Any) -> threading.Thread:
        name = f"fetcher-{self._source}-{recorder.worker_id}"
        return threading.Thread(target=self._run, args=(recorder, interrupted), name=name, daemon=True)

    def start(self) -> None:
        """Start every thread. If one cannot be started, those that were see the end of the run by themselves."""
        for _, thread in self._fetchers:
            thread.start()

    def _run(self, recorder: FetcherRecorder, interrupted: Any) -> None:
        self._loop(recorder, interrupted)
        if recorder.abandoned:  # the one in its place goes on
            return
        with self._lock:
            self._running -= 1
            last = not self._running
        if last:
            self._on_end()

    def check_calls(self, now: float) -> float:
        """Fail the source, or replace the fetcher, for a call that runs too long; return when to look again."""
        if self._timeout_s == math.inf:
            return math.inf
        # A call that begins while nobody looks is found in time by looking once a timeout.
        look_again = now + self._timeout_s
        for index, (recorder, thread) in enumerate(self._fetchers):
            due = recorder.call_started + self._timeout_s
            if due > now:
                look_again = min(look_again, due)
            elif thread.is_alive() and recorder.worker_id not in self._reported:
                self._end_call(index, recorder, thread, now)
        return look_again

    def _end_call(self, index: int, recorder: FetcherRecorder, thread: threading.Thread, now: float) -> None:
        stack, request = stack_of(thread), recorder.request
        where = "" if request is None else f", request {request.index}"
        failure = Failure(
            FetchTimeout,
            f"source {self._source!r}, worker {recorder.worker_id}{where}: a call has run for over "
            f"{self._timeout_s:g} s (fetch_timeout_s), and a thread cannot be killed; it is in\n{stack}",
        )
        if self._replace is None:
            self._reported.add(recorder.worker_id)
            recorder.count_error(FetchTimeout.__name__)
            self._fail(failure, request)
        elif recorder.abandon(now - self._timeout_s):
            other, interrupted = self._replace(recorder, failure)
            replacement = self._thread(other, interrupted)
            self._abandoned = [*(each for each in self._abandoned if each.is_alive()), thread]
            self._fetchers[index] = other, replacement
            replacement.start()

    def has_thread(self, thread: threading.Thread) -> bool:
        """Whether this is one of the fetchers."""
        return thread in self._threads()

    def shut_down(self) -> None:
        """Nothing: the loops see the closed queue by themselves."""

    def join(self, deadline: float) -> list[tuple[str, str]]:
        """Wait for the threads that were started; return (name, stack) of those still running."""
        return join_threads([thread for thread in self._threads() if thread.ident is not None], deadline)

    def _threads(self) -> list[threading.Thread]:
        return [*self._abandoned, *(thread for _, thread in self._fetchers)]
