"""Times of a worker process's calls, of which its parent is told with each answer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from input_workers.metrics.fetcher_recorder import FetcherRecorder
from input_workers.metrics.fetcher_recorder import Told as CallReport
from input_workers.metrics.trace import Room, Span, Track

__all__ = ["CallAccount", "CallReport"]


class CallAccount:
    """The times of a worker's calls. Belongs to its thread.

    Attributes:
        recorder: where `timed` puts its parts.
    """

    def __init__(self, worker_id: int) -> None:
        self.recorder = FetcherRecorder(worker_id)
        self._cpu = time.process_time()
        self._began = self._ended = 0.0
        self._waited = 0.0  # of the running call, for shared memory: no time of the function's
        self._took: float | None = None  # where the answer is not of the whole time since it began, and of no other
        self._until = 0.0  # a trace goes on

    def begin_call(self) -> None:
        """A call begins."""
        self._began, self._ended, self._waited, self._took = time.monotonic(), 0.0, 0.0, None

    def end_call(self) -> None:
        """It has returned."""
        self._ended = time.monotonic()

    @property
    def times(self) -> tuple[float, float]:
        """When the call that has returned began and ended; one that was made before its answer was due is taken as made now."""
        return (self._began if self._took is None else self._ended - self._took), self._ended

    def was_answered_early(self) -> None:
        """Another thread has sent the rows of the call that has returned: the next answer tells that it was made."""
        if self.recorder.trace is not None:
            self.recorder.trace.add("call", self._began, self._ended)

    def took(self, seconds: float) -> None:
        """Set the seconds of the calls that are answered now: others were made meanwhile, or these before."""
        self._took = seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for shared memory."""
        started = time.monotonic()
        try:
            yield
        finally:
            now = time.monotonic()
            if not self._ended:
                self._waited += now - started
            if self.recorder.trace is not None:
                self.recorder.trace.add("waiting for memory", started, now)

    def trace(self, until: float) -> None:
        """Record parts one by one, until then."""
        self._until = until
        self.recorder.trace = Track("", Room())

    def take(self) -> CallReport:
        """Return what has happened since the last time."""
        recorder = self.recorder
        ended = self._ended or time.monotonic()
        before, self._cpu = self._cpu, time.process_time()
        taken = [(name, part.take()) for name, part in recorder.parts.items()] if recorder.parts else ()
        parts = [(name, durations) for name, durations in taken if durations[2] or any(durations[0])] if taken else ()
        spans: Sequence[Span] = ()
        if recorder.trace is not None:
            spans, recorder.trace.spans = recorder.trace.spans, []
            if ended > self._until:
                recorder.trace = None
        seconds = ended - self._began if self._took is None else self._took
        return max(0.0, seconds - self._waited), self._began, ended, self._cpu - before, parts, spans
