"""Fetchers as threads: the reference backend. Right for fetch functions that wait or release the GIL."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Sequence

from input_workers.errors import Failure, SourceFailed
from input_workers.fetchers.context import FetchContext
from input_workers.fetchers.fetch_loop import fetch_loop
from input_workers.fetchers.fetcher import Fetcher
from input_workers.fetchers.recovery import Attempt
from input_workers.fetchers.watchdog import Watchdog
from input_workers.lifecycle import seconds_left
from input_workers.metrics.fetcher_recorder import FetcherRecorder
from input_workers.metrics.timed import fetcher_here

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
    """Runs the fetch loop in daemon threads. Other backends are subclasses: their threads serve those who make the calls.

    A fetcher that is released finishes its call, delivers it, and rests: it has not finished its data. It is at work again
    when more are needed, or when no other is at work and something may be left of what it was at. The data end when none is
    at work then.

    Args:
        context: what the fetchers share.
        recorders: one for each fetcher.
        resting: of further ones, that rest at first.
        on_end: called in the last fetcher to end.
    """

    # Invariant under _lock: `_running` counts the fetchers whose loop has not returned, except abandoned ones, and those
    # being added; `_fetchers` has the last thread of every fetcher that was ever at work, by worker, except those whose
    # thread goes on as another; those of `_resting` are not at work. When `_is_over`, nothing runs and nothing will.

    def __init__(
        self,
        context: FetchContext,
        recorders: Sequence[FetcherRecorder],
        resting: Sequence[FetcherRecorder],
        on_end: Callable[[], None],
    ) -> None:
        self.context = context
        self._on_end = on_end
        self._lock = threading.RLock()  # re-entrant, for a signal handler that stops the source
        self._running = len(recorders)
        fetchers = [Fetcher(recorder) for recorder in recorders]
        self._fetchers = {each.worker_id: (each, self._thread(each)) for each in fetchers}
        self._resting = [Fetcher(recorder) for recorder in resting]
        self._has_finished = False  # one of them has
        self._is_over = False
        self._earlier: list[threading.Thread] = []  # abandoned ones, and those that have just come to rest
        self._watchdog: Watchdog | None = None
        if self.watches_calls and context.fetch_timeout_s is not None:
            self._watchdog = Watchdog(context, self._with_threads, self._give_to_another, stack_of)

    # ---- what other backends change

    watches_calls = True
    block_bytes = 0  # shared memory of chunks

    def prepare(self, fetcher: Fetcher) -> None:
        """Called before a fetcher is at work that was not there from the beginning. May raise OSError."""

    def serve(self, fetcher: Fetcher) -> bool:
        """Run the fetch loop of a fetcher; return whether it is through: its data have ended, or it has failed."""
        return fetch_loop(fetcher, self.context, self.context.calls)

    def ended(self) -> None:
        """The last fetcher has ended."""
        self._on_end()

    def shut_down(self) -> None:
        """No more is needed: end whatever can be ended from here, without waiting for it. Idempotent."""
        # The loops of threads see the closed assembly by themselves.

    # ---- the same for all

    def start(self) -> None:
        """Start every thread. If one cannot be started, those that were see the end of the run by themselves."""
        for _, thread in list(self._fetchers.values()):
            thread.start()
        if self._watchdog is not None:
            self._watchdog.thread.start()

    def add(self, new: Callable[[], FetcherRecorder]) -> bool:
        """Have one more at work: one that rests, else a new one with the recorder that `new` makes.

        Returns:
            False: there can be none, because some have finished their data, or the run has ended.

        Raises:
            OSError, RuntimeError: it cannot be started; all others go on.
        """
        with self._lock:
            if self._is_over or (self._has_finished and not self._resting):
                return False
            rested = self._resting.pop() if self._resting else None
            self._running += 1  # or the last to end would end it all meanwhile
        fetcher = Fetcher(new()) if rested is None else rested
        fetcher.released = False
        try:
            self.prepare(fetcher)
            thread = self._thread(fetcher)
            self._put(fetcher, thread)
            thread.start()
        except (OSError, RuntimeError) as error:
            # One that rests has begun its data. If no other is left to go on with them, they are lost.
            if self._leave(rested, finished=False) is not None:
                self.context.fail(Failure(SourceFailed, f"source {self.context.source!r}: no worker can be started", error))
                self._leave(None, finished=False)
            raise
        return True

    def release(self, count: int) -> None:
        """Ask this many to rest, but never the last one; those that came last first. It is not waited for."""
        at_work = [each for each in self.at_work() if not each.released]
        for fetcher in at_work[max(1, len(at_work) - count) :]:
            fetcher.released = True

    def at_work(self) -> list[Fetcher]:
        """Return the fetchers that are at work, also those that were asked to rest."""
        with self._lock:
            resting = {id(each) for each in self._resting}
            fetchers = list(self._fetchers.values())
        return [each for each, thread in fetchers if thread.is_alive() and id(each) not in resting]

    def has_thread(self, thread: threading.Thread) -> bool:
        """Whether this is one of the fetchers, which then must not wait for its own end."""
        return thread in self._threads()

    def join(self, deadline: float) -> list[tuple[str, str]]:
        """Wait until the threads that were started end, or the deadline; return (name, stack) of those still running."""
        return join_threads([thread for thread in self._threads() if thread.ident is not None], deadline)

    def _thread(self, fetcher: Fetcher) -> threading.Thread:
        name = f"fetcher-{self.context.source}-{fetcher.worker_id}"
        return threading.Thread(target=self._run, args=(fetcher,), name=name, daemon=True)

    def _run(self, fetcher: Fetcher) -> None:
        following: Fetcher | None = fetcher
        while following is not None:
            fetcher = following
            fetcher.recorder.begin_work()
            try:
                with fetcher_here(fetcher.recorder):
                    is_through = self.serve(fetcher)
            finally:
                fetcher.recorder.end_work()
            if fetcher.abandoned:  # the one in its place goes on
                return
            rests = fetcher.released and not is_through
            following = self._leave(fetcher if rests else None, finished=not rests)
            if following is not None:
                self._take_up(following)

    def _leave(self, rests: Fetcher | None, *, finished: bool) -> Fetcher | None:
        """A fetcher is no longer at work; return one that is to be, because no other is, or None."""
        with self._lock:
            self._running -= 1
            if rests is not None:
                self._resting.append(rests)
            self._has_finished = self._has_finished or finished
            if self._running:
                return None
            if self._resting and self.context.has_pending_work:
                self._running = 1
                return self._resting.pop(0)
            self._is_over = True
        self.ended()
        return None

    def _take_up(self, fetcher: Fetcher) -> None:
        """Go on in this thread as another fetcher, which rested."""
        fetcher.released = False
        self._put(fetcher, threading.current_thread())
        try:
            self.prepare(fetcher)
        except OSError as error:
            text = f"source {self.context.source!r}, worker {fetcher.worker_id}: it has rested, and cannot be started again"
            self.context.fail(Failure(SourceFailed, text, error))  # which closes the assembly: its loop will see that

    def _give_to_another(self, fetcher: Fetcher, failure: Failure) -> None:
        """A fetcher's call took too long and was taken away: start another fetcher that goes on with it."""
        other = Fetcher(self.context.recorder.fetcher(fetcher.worker_id))
        other.request = fetcher.request
        other.attempt = fetcher.attempt or Attempt(self.context.policy, fetcher.request)
        other.resumes = failure.exception()
        self.context.recorder.count_restart()
        thread = self._thread(other)
        self._put(other, thread)
        thread.start()

    def _put(self, fetcher: Fetcher, thread: threading.Thread) -> None:
        with self._lock:
            _, before = self._fetchers.get(fetcher.worker_id, (None, thread))
            self._earlier = [each for each in (*self._earlier, before) if each.is_alive() and each is not thread]
            # A thread that goes on as another fetcher is no longer the one that it was.
            self._fetchers = {key: each for key, each in self._fetchers.items() if each[1] is not thread}
            self._fetchers[fetcher.worker_id] = fetcher, thread

    def _with_threads(self) -> list[tuple[Fetcher, threading.Thread]]:
        with self._lock:
            return list(self._fetchers.values())

    def _threads(self) -> list[threading.Thread]:
        with self._lock:
            threads = [*self._earlier, *(thread for _, thread in self._fetchers.values())]
        return threads if self._watchdog is None else [*threads, self._watchdog.thread]
