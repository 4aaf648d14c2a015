"""Fetchers as threads: the reference backend. Right for fetch functions that wait or release the GIL."""

from __future__ import annotations

import math
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from input_workers.contracts import FetchRequest
from input_workers.errors import Failure, FetchTimeout, SourceFailed
from input_workers.lifecycle import seconds_left
from input_workers.metrics.fetcher_recorder import FetcherRecorder

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
        resting: of further ones, that rest at first.
        loop: the fetch loop of a fetcher, given what another was at, or None; returns whether it was released, and has
            neither finished its data nor failed. It never raises.
        fail: told a call that runs longer than `fetch_timeout_s`, and its request.
        on_end: called in the last fetcher to end.
        unfinished: whether one that rests may have something left; asked when nobody is at work. Takes no lock.
        fetch_timeout_s: how long a call may take.
        replace: given the recorder of a fetcher whose call was taken away and the failure, returns the recorder of another
            fetcher, and what that has to do first. None: such a call fails the source.
        prepare: called before a fetcher is at work that was not there from the beginning. May raise OSError.
    """

    # Invariant under _lock: `_running` counts the fetchers whose loop has not returned, but for the abandoned ones, and those
    # being added; `_fetchers` are the last threads of all that were ever at work, by worker, but for those whose thread has
    # gone on as another; those of `_resting` are not at work.
    # When `_is_over`, nothing runs and nothing will.

    def __init__(
        self,
        source: str,
        recorders: Sequence[FetcherRecorder],
        resting: Sequence[FetcherRecorder],
        loop: Callable[[FetcherRecorder, Any], bool],
        fail: Callable[[Failure, FetchRequest | None], object],
        on_end: Callable[[], None],
        unfinished: Callable[[], bool],
        fetch_timeout_s: float | None,
        replace: Callable[[FetcherRecorder, Failure], tuple[FetcherRecorder, Any]] | None = None,
        prepare: Callable[[FetcherRecorder], object] = lambda recorder: None,  # noqa: ARG005
    ) -> None:
        self._source = source
        self._loop = loop
        self._fail = fail
        self._on_end = on_end
        self._unfinished = unfinished
        self._timeout_s = math.inf if fetch_timeout_s is None else fetch_timeout_s
        self._replace = replace
        self._prepare = prepare
        self._lock = threading.Lock()
        self._running = len(recorders)
        self._fetchers = {each.worker_id: (each, self._thread(each, None)) for each in recorders}
        self._resting = list(resting)
        self._has_finished = False  # one of them has
        self._is_over = False
        self._earlier: list[threading.Thread] = []  # abandoned ones, and those that have just come to rest
        self._reported: set[int] = set()  # workers whose call has failed the source

    def _thread(self, recorder: FetcherRecorder, interrupted: Any) -> threading.Thread:
        name = f"fetcher-{self._source}-{recorder.worker_id}"
        return threading.Thread(target=self._run, args=(recorder, interrupted), name=name, daemon=True)

    def start(self) -> None:
        """Start every thread. If one cannot be started, those that were see the end of the run by themselves."""
        for _, thread in list(self._fetchers.values()):
            thread.start()

    def add(self, new: Callable[[], FetcherRecorder]) -> bool:
        """Have one more at work; see `FetcherBackend`."""
        with self._lock:
            if self._is_over or (self._has_finished and not self._resting):
                return False
            rested = self._resting.pop() if self._resting else None
            self._running += 1  # or the last to end would end it all meanwhile
        recorder = new() if rested is None else rested
        recorder.released = False
        try:
            self._prepare(recorder)
            thread = self._thread(recorder, None)
            self._put(recorder, thread)
            thread.start()
        except (OSError, RuntimeError) as error:
            # Whoever rests has begun its data. If nobody is left who could go on with them, they are lost.
            if self._ended(rested, finished=False) is not None:
                self._fail(Failure(SourceFailed, f"source {self._source!r}: no worker can be started", error), None)
                self._ended(None, finished=False)
            raise
        return True

    def release(self, count: int) -> None:
        """Ask so many to rest; see `FetcherBackend`."""
        at_work = [each for each in self.at_work() if not each.released]
        for recorder in at_work[max(1, len(at_work) - count) :]:
            recorder.released = True

    def at_work(self) -> list[FetcherRecorder]:
        """Return the recorders of those that are at work, also of those that were asked to rest."""
        with self._lock:
            resting = {id(each) for each in self._resting}
            fetchers = list(self._fetchers.values())
        return [each for each, thread in fetchers if thread.is_alive() and id(each) not in resting]

    def _run(self, recorder: FetcherRecorder, interrupted: Any) -> None:
        following: FetcherRecorder | None = recorder
        while following is not None:
            recorder = following
            rests = self._loop(recorder, interrupted)
            if recorder.abandoned:  # the one in its place goes on
                return
            interrupted = None
            following = self._ended(recorder if rests else None, finished=not rests)
            if following is not None:
                self._take_up(following)

    def _ended(self, rests: FetcherRecorder | None, *, finished: bool) -> FetcherRecorder | None:
        """A fetcher is no longer at work; return one that is to be, because nobody else is, or None."""
        with self._lock:
            self._running -= 1
            if rests is not None:
                self._resting.append(rests)
            self._has_finished = self._has_finished or finished
            if self._running:
                return None
            if self._resting and self._unfinished():
                self._running = 1
                return self._resting.pop(0)
            self._is_over = True
        self._on_end()
        return None

    def _take_up(self, recorder: FetcherRecorder) -> None:
        """Go on in this thread as another fetcher, which rested."""
        recorder.released = False
        self._put(recorder, threading.current_thread())
        try:
            self._prepare(recorder)
        except OSError as error:
            text = f"source {self._source!r}, worker {recorder.worker_id}: it has rested, and cannot be started again"
            self._fail(Failure(SourceFailed, text, error), None)  # which closes the queue: its loop will see that

    def _put(self, recorder: FetcherRecorder, thread: threading.Thread) -> None:
        with self._lock:
            _, before = self._fetchers.get(recorder.worker_id, (None, thread))
            self._earlier = [each for each in (*self._earlier, before) if each.is_alive() and each is not thread]
            # A thread that goes on as another fetcher is no longer the one that it was.
            self._fetchers = {key: each for key, each in self._fetchers.items() if each[1] is not thread}
            self._fetchers[recorder.worker_id] = recorder, thread

    def check_calls(self, now: float) -> float:
        """Fail the source, or replace the fetcher, for a call that runs too long; return when to look again."""
        if self._timeout_s == math.inf:
            return math.inf
        # A call that begins while nobody looks is found in time by looking once a timeout.
        look_again = now + self._timeout_s
        with self._lock:
            fetchers = list(self._fetchers.values())
        for recorder, thread in fetchers:
            due = recorder.call_started + self._timeout_s
            if due > now:
                look_again = min(look_again, due)
            elif thread.is_alive() and recorder.worker_id not in self._reported:
                self._end_call(recorder, thread, now)
        return look_again

    def _end_call(self, recorder: FetcherRecorder, thread: threading.Thread, now: float) -> None:
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
            self._put(other, replacement)
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
        with self._lock:
            return [*self._earlier, *(thread for _, thread in self._fetchers.values())]
