"""Watches how long calls of the fetch function take, with a wake-up of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from input_workers.errors import Failure, FetchTimeout
from input_workers.fetchers.context import FetchContext
from input_workers.fetchers.fetcher import Fetcher

__all__ = ["Watchdog"]


class Watchdog:
    """Reports calls that take longer than `fetch_timeout_s`, each once.

    Args:
        context: of the run.
        fetchers: returns the fetchers that are at work, with their threads.
        give_to_another: gives a call to another fetcher, where the policy skips. Else the source fails.
        stack_of: returns the stack of a thread.

    Attributes:
        thread: to be started with the fetchers, and joined after them.
    """

    def __init__(
        self,
        context: FetchContext,
        fetchers: Callable[[], Sequence[tuple[Fetcher, threading.Thread]]],
        give_to_another: Callable[[Fetcher, Failure], None],
        stack_of: Callable[[threading.Thread], str],
    ) -> None:
        assert context.fetch_timeout_s is not None  # noqa: S101  else there is nothing to watch
        self._context = context
        self._timeout_s = context.fetch_timeout_s
        self._fetchers = fetchers
        self._give_to_another = give_to_another
        self._stack_of = stack_of
        self._reported: set[int] = set()  # fetchers whose call has failed the source
        self.thread = threading.Thread(target=self._run, name=f"watchdog-{context.source}", daemon=True)

    def _run(self) -> None:
        ended = self._context.signal.ended
        look_again = self._timeout_s
        # A call that begins while nothing is watched is found in time by looking once a timeout.
        while not ended.wait(min(look_again, threading.TIMEOUT_MAX)):
            look_again = self._look(time.monotonic())

    def _look(self, now: float) -> float:
        """Report the calls that take too long; return in how many seconds to look again."""
        look_again = self._timeout_s
        for fetcher, thread in self._fetchers():
            due = fetcher.call_started + self._timeout_s
            if due > now:
                look_again = min(look_again, due - now)
            elif thread.is_alive() and id(fetcher) not in self._reported:
                self._report(fetcher, thread, now)
        return max(look_again, 0.0)

    def _report(self, fetcher: Fetcher, thread: threading.Thread, now: float) -> None:
        stack, request = self._stack_of(thread), fetcher.request
        where = "" if request is None else f", request {request.index}"
        failure = Failure(
            FetchTimeout,
            f"source {self._context.source!r}, worker {fetcher.worker_id}{where}: a call has run for over "
            f"{self._timeout_s:g} s (fetch_timeout_s), and a thread cannot be killed; it is in\n{stack}",
        )
        if not self._context.abandons:
            self._reported.add(id(fetcher))
            fetcher.recorder.count_error(FetchTimeout.__name__)
            self._context.fail(failure, request)
        elif fetcher.abandon(now - self._timeout_s):
            self._give_to_another(fetcher, failure)
