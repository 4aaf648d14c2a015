"""`num_workers=0`: the fetch function is called in the trainer's own thread, for breakpoints and tests.

Everything else stays in threads of ours: one fetcher, whose calls the trainer makes while it waits for a batch. Signal
handlers, and so Ctrl-C, only ever interrupt the trainer's thread, where nothing happens but the call itself.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from input_workers.contracts import FetchRequest
from input_workers.errors import EndOfData, LifecycleError
from input_workers.fetchers.context import FetchContext
from input_workers.fetchers.fetch_loop import fetch_loop
from input_workers.fetchers.fetcher import Fetcher
from input_workers.fetchers.threads import ThreadFetchers, stack_of
from input_workers.lifecycle import refuse_inside, seconds_left
from input_workers.metrics.fetcher_recorder import FetcherRecorder
from input_workers.metrics.timed import fetcher_here

__all__ = ["InlineFetchers"]


class InlineFetchers(ThreadFetchers):
    """One fetcher whose calls are made by trainers that wait for a batch.

    The fetcher asks for its next call only when every complete batch was sent, so no call is made ahead of the trainer.

    Args:
        context: of the run.
        recorder: of the one fetcher.
        on_end: called when it has ended.
        nudge: lets trainers that wait look again.
        await_sent: waits until every complete batch was sent, or the run ends.
    """

    watches_calls = False

    def __init__(
        self,
        context: FetchContext,
        recorder: FetcherRecorder,
        on_end: Callable[[], None],
        nudge: Callable[[], None],
        await_sent: Callable[[], None],
    ) -> None:
        super().__init__(context, [recorder], [], on_end)
        self.calls = _TrainerCalls(context, nudge, await_sent)

    def serve(self, fetcher: Fetcher) -> bool:
        """Run the fetch loop, with calls that the trainer makes."""
        return fetch_loop(fetcher, self.context, self.calls)

    def shut_down(self) -> None:
        """Let the fetcher end, which may wait for the trainer to make a call."""
        self.calls.close()

    def has_thread(self, thread: threading.Thread) -> bool:
        """Whether this is the fetcher, or the trainer in a call of the fetch function."""
        return super().has_thread(thread) or self.calls.caller is thread

    def join(self, deadline: float) -> list[tuple[str, str]]:
        """Wait for the fetcher, and for a trainer in the fetch function; return (name, stack) of who is still there."""
        stuck = super().join(deadline)
        caller = self.calls.await_caller(deadline)
        return stuck if caller is None else [*stuck, (caller.name, stack_of(caller))]


class _TrainerCalls:
    """Hands calls from the fetcher to whichever trainer waits. `next` is the fetcher's, `serve` the trainers'."""

    # Invariant under lock: `_call` is the call that waits to be made, or is being made by `caller`; what comes of it is put
    # into `_results`, once. The fetcher waits at `_answered` while there is a call; a token too many does no harm.
    # A signal may interrupt a trainer anywhere in `serve`: at worst the call, or handing over its result, is left to the
    # next trainer that waits.

    owns_results = False
    has_pending_work = False

    def __init__(self, context: FetchContext, nudge: Callable[[], None], await_sent: Callable[[], None]) -> None:
        self.is_stream: bool = context.calls.is_stream
        self.caller: threading.Thread | None = None
        self._context = context
        self._calls = context.calls
        self._nudge = nudge
        self._await_sent = await_sent
        self.lock = threading.RLock()
        self._answered: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._gates: list[threading.Lock] = []  # of those who wait until no trainer makes a call
        self._call: Callable[[], Any] | None = None
        self._fetcher: Fetcher | None = None
        self._results: list[tuple[bool, Any]] = []
        self._handed_over: list[Any] | None = None  # the results that the fetcher was last told of
        self._is_closed = False

    @property
    def batch_size(self) -> int:
        """Of the source, a hint for the function."""
        return int(self._calls.batch_size)

    def next(self, fetcher: Fetcher) -> tuple[Any, FetchRequest | None]:
        """Have the next call made, and return its result. Raises what it raised; EndOfData: the run has ended."""
        self._fetcher = fetcher
        if not self.is_stream:
            return self._make(fetcher, None, lambda: self._calls.function(fetcher.worker_id, self._calls.batch_size)), None
        request = self._calls.deal(fetcher)
        return self._make(fetcher, request, lambda: self._calls.fetch(request)), request

    def make_retry_call(self, fetcher: Fetcher) -> Callable[[FetchRequest | None], Any]:
        """Return what has a call made once more."""
        retry_call = self._calls.make_retry_call(fetcher)
        return lambda request: self._make(fetcher, fetcher.request, lambda: retry_call(request))

    def _make(self, fetcher: Fetcher, request: FetchRequest | None, call: Callable[[], Any]) -> Any:
        """Wait until a trainer has made the call; return what it returned, or raise what it raised."""
        fetcher.begin_call(request)
        fetcher.recorder.call_started = math.inf  # it begins when the trainer makes it
        self._await_sent()
        with self.lock:
            self._results, self._call = [], call
        self._nudge()
        while not self._results and not self._is_closed:
            self._answered.get()
        with self.lock:
            self._call = None
        if not self._results:
            raise EndOfData
        is_error, result = self._results.pop()
        if is_error:
            raise result
        return result

    def serve(self, limit: float) -> float | None:
        """Make the call that waits, in the trainer's thread, unless it is later than `limit`.

        Returns:
            None after a call; else until when to wait: `limit`, or without an end while the fetcher is at work.

        Raises:
            LifecycleError: the fetch function itself asks for a batch.
            BaseException: Ctrl-C in the fetch function, which is then called again for the same request.
        """
        me = threading.current_thread()
        is_caller = False
        refuse_inside(self.lock)
        try:
            with self.lock:
                call, fetcher, results = self._call, self._fetcher, self._results
                if self.caller is me:
                    raise LifecycleError(
                        f"source {self._context.source!r}: with num_workers=0 the fetch function is called in the trainer's "
                        "thread, and must not ask for a batch of its own source"
                    )
                if call is None or fetcher is None or self._handed_over is results or self._is_closed:
                    waits_for_request = fetcher is not None and fetcher.recorder.blocked[1] != math.inf
                    return limit if waits_for_request else math.inf
                if self.caller is not None or time.monotonic() >= limit:
                    return limit
                is_caller = True
                self.caller = me
            if not results:  # else it was made, and a signal came before its result was handed over
                cpu = time.thread_time()
                fetcher.recorder.call_started = time.monotonic()
                with fetcher_here(fetcher.recorder):
                    # In one step: no signal is handled between the return of the function and its place in the list.
                    results.extend(map(_outcome, (call,)))
                ended, *clock = fetcher.recorder.cpu
                fetcher.recorder.cpu = ended + time.thread_time() - cpu, *clock  # type: ignore[assignment]
            self._answered.put(None)
            self._handed_over = results
            return None
        finally:
            if is_caller:
                self.caller = None
                gates, self._gates = self._gates, []
                for gate in gates:
                    gate.release()
                self._nudge()

    def close(self) -> None:
        """Let the fetcher end. A call that is being made goes on, and its result is not used."""
        self._is_closed = True
        self._answered.put(None)

    def await_caller(self, deadline: float) -> threading.Thread | None:
        """Wait until no trainer is in the fetch function; return who still is, at the deadline."""
        gate = threading.Lock()
        gate.acquire()
        self._gates.append(gate)
        if self.caller is not None and self.caller is not threading.current_thread():
            gate.acquire(timeout=seconds_left(deadline))
        return self.caller


def _outcome(call: Callable[[], Any]) -> tuple[bool, Any]:
    """Return (whether it raised, what the call returned or raised). Ctrl-C and SystemExit are the trainer's own."""
    try:
        return False, call()
    except Exception as error:
        return True, error
