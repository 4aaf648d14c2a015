"""Calls made in a worker process: requests go to it ahead of time, its answers come back; should it die, another takes over.

Belongs to one thread of the parent, which runs the fetch loop as if it made the calls itself. While the worker makes one
call, the next is already in its pipe.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from typing import Any

from input_workers.contracts import FetchRequest
from input_workers.errors import EndOfData, FetchTimeout, WorkerDied, describe
from input_workers.fetchers.worker_output import WorkerOutput
from input_workers.fetchers.worker_session import Gone, TooLong, WorkerSession
from input_workers.fetchers.worker_settings import WorkerSettings
from input_workers.leases import BlockPool
from input_workers.metrics.fetcher_recorder import FetcherRecorder, Released
from input_workers.metrics.trace import FetcherTrack

__all__ = ["WorkerCalls"]

# A worker that died is started again after this long, doubled for each that died without having answered a call.
FIRST_RESTART_SECONDS = 0.05
LAST_RESTART_SECONDS = 5.0
RESTART_WINDOW_SECONDS = 60.0

# The call in the making, and the one after it.
CALLS_AHEAD = 2
MAX_NBYTES_AHEAD = 32 * 1024


class _Call:
    """A call that was sent and not answered yet. `is_again`: in place of one that failed, and nobody else's to make."""

    __slots__ = ("is_again", "request")

    def __init__(self, request: FetchRequest | None, is_again: bool = False) -> None:
        self.request = request
        self.is_again = is_again


class WorkerCalls:
    """One worker, seen from the fetch loop of its thread. `shut_down` may be called by any thread.

    Args:
        settings: shared by all workers.
        worker_id: of this one.
        output: passes on what it prints.
    """

    owns_results = True  # arrays in blocks are leases, and those that came in a frame are nobody else's

    def __init__(self, settings: WorkerSettings, worker_id: int, output: WorkerOutput) -> None:
        self.worker_id = worker_id
        self._settings = settings
        self._output = output
        self._pool = BlockPool(settings.keep_blocks)
        self._recorder: FetcherRecorder | None = None  # of the fetcher whose calls these are
        self._session: WorkerSession | None = None
        self._sent: collections.deque[_Call] = collections.deque()  # in the order of their answers
        self._early: collections.deque[tuple[_Call, Any]] = collections.deque()  # answers that came before one wanted now
        self._deaths: collections.deque[float] = collections.deque()
        self._idle_deaths = 0  # without an answer to any call between them
        self._was_killed = False  # the process was, and another is wanted
        self._is_shut_down = False

    @property
    def block_bytes(self) -> int:
        """The shared memory of this worker's chunks, wherever they are. Any thread may ask."""
        return self._pool.held_nbytes

    def launch(self, beside_threads: bool = False) -> None:
        """Start the process, while the source runs or before. Raises OSError."""
        start = self._settings.start
        if start == "fork" and beside_threads:
            start = "spawn"  # threads run by now, and one of them may hold a lock, which nobody would open in the child
        self._session = WorkerSession(self._settings, self.worker_id, self._output, start, self._pool)
        self._was_killed = False
        if self._is_shut_down:
            self._session.process.link.shut_down()

    def shut_down(self) -> None:
        """Have the worker end, and whoever waits for it. Takes no lock."""
        self._is_shut_down = True
        session = self._session
        if session is not None:
            session.process.link.shut_down()

    def close(self) -> None:
        """End the worker for good. The thread's own, or after it has ended."""
        self._is_shut_down = True
        if self._session is not None:
            self._session.end()
        self._early.clear()
        self._pool.close()

    def next(self, recorder: FetcherRecorder) -> tuple[Any, FetchRequest | None]:
        """Return the next answer and its request.

        Raises EndOfData at the end, Released after the last answer to a released one, what the function raised, or WorkerDied.
        """
        self._recorder = recorder
        return self._next(recorder)

    def _next(self, recorder: FetcherRecorder) -> tuple[Any, FetchRequest | None]:
        while True:
            if self._early:
                call, answer = self._early.popleft()
                recorder.request = call.request
                return self._result(answer), call.request
            released = recorder.released  # as it is now: the answers to what was sent are still wanted
            requests = self._settings.requests
            if released and requests is not None and requests.has_given_back:
                released = False  # a worker has died: others may all wait for what it was to fetch
            if released and not self._sent:
                raise Released
            try:
                self._begin()
                if not released:
                    self._deal_ahead(recorder)
                if not self._sent:
                    raise EndOfData
                recorder.request = self._sent[0].request
                answer = self._answer(recorder)
            except Gone:
                self._replace()
                continue
            call = self._sent.popleft()
            return self._result(answer), call.request

    def fetch(self, request: FetchRequest | None) -> Any:
        """Make the call for a request, or for a part of one, or of a plain function, and return its result."""
        recorder = FetcherRecorder(self.worker_id)
        if request is None:  # one call is as good as another
            return self._next(recorder)[0]
        call = _Call(request, is_again=True)
        while True:
            try:
                self._begin()
                if call not in self._sent:
                    self._send([call])
                answer = self._answer(recorder)
            except Gone:
                self._replace()
                continue
            head = self._sent.popleft()
            if head is call:
                return self._result(answer)
            self._early.append((head, answer))

    def _begin(self) -> None:
        """Start another process in the place of one that was killed."""
        if self._was_killed:
            if self._is_shut_down or self._settings.ended():
                raise EndOfData
            self._restart()

    def _deal_ahead(self, recorder: FetcherRecorder) -> None:
        """Send requests, so that the worker has one to go on with when it has answered. Waits for one if it has none."""
        calls: list[_Call] = []
        requests = self._settings.requests
        while len(self._sent) + len(calls) < CALLS_AHEAD:
            if requests is None:
                calls.append(_Call(None))
                continue
            last = (calls or self._sent)[-1].request if self._sent or calls else None
            try:
                request = requests.deal_now(self.worker_id) if last is not None else requests.deal(recorder)
            except EndOfData:
                break
            if request is None:
                break
            if last is not None and (request.ordinal < last.ordinal or request.rows.nbytes > MAX_NBYTES_AHEAD):
                # It was given back, and is for a worker with nothing before it: in order, this one's might wait for it.
                # Or it might not fit into the pipe, while the answer that comes the other way does not either.
                requests.give_back([request])
                break
            calls.append(_Call(request))
        if calls:
            self._send(calls)

    def _send(self, calls: Sequence[_Call]) -> None:
        assert self._session is not None  # noqa: S101  it was launched
        self._sent.extend(calls)
        track = self._recorder.trace if self._recorder is not None else None
        until = track.trace.until if isinstance(track, FetcherTrack) else 0.0
        self._session.send([call.request for call in calls], until)

    def _answer(self, recorder: FetcherRecorder) -> Any:
        """Return the answer to the oldest call, which may be an exception. Raises Gone, or WorkerDied: it cannot begin."""
        assert self._session is not None  # noqa: S101  it was launched
        try:
            answer, told = self._session.answer(recorder)
        except TooLong:
            return self._too_long()
        self._idle_deaths = 0
        if self._recorder is not None:
            request = self._sent[0].request
            call = "call" if not isinstance(answer, BaseException) else "" if isinstance(answer, EndOfData) else "failed call"
            self._recorder.add_told(told, self._session.process.pid, call, None if request is None else request.index)
        return answer

    def _result(self, answer: Any) -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _too_long(self) -> FetchTimeout:
        """The oldest call takes too long: kill the worker; return the answer to the call."""
        settings, session, where = self._settings, self._session, self._where()
        assert session is not None  # noqa: S101  it was launched
        stack = session.kill_stuck()
        self._forget_sent(answered=self._sent[0])
        self._was_killed = True
        return FetchTimeout(
            f"{where}: a call has run for over {settings.fetch_timeout_s:g} s (fetch_timeout_s); "
            f"process {session.process.pid} was killed; it was in\n{stack}"
        )

    def _where(self) -> str:
        request = self._sent[0].request if self._sent else None
        where = "" if request is None else f", request {request.index}"
        return f"source {self._settings.source!r}, worker {self.worker_id}{where}"

    def _replace(self) -> None:
        """The worker has died: start another. Raises EndOfData if the run has ended, WorkerDied if it dies too often."""
        settings, session, where = self._settings, self._session, self._where()
        assert session is not None  # noqa: S101  it was launched
        if self._is_shut_down:
            session.end()
        else:
            session.end_dead()
        self._forget_sent()
        if self._is_shut_down or settings.ended():
            raise EndOfData
        now = time.monotonic()
        self._deaths.append(now)
        while now - self._deaths[0] > RESTART_WINDOW_SECONDS:
            self._deaths.popleft()
        if len(self._deaths) > settings.restarts:
            last_words = session.last_words()
            raise WorkerDied(
                f"{where}: process {session.process.pid} {session.process.end_in_words()}; "
                f"deaths within a minute: {len(self._deaths)}, of which {settings.restarts} are made good (restarts)"
                + (f"; its last words on stderr:\n{last_words}" if last_words else "")
            )
        settings.idle(min(FIRST_RESTART_SECONDS * 2 ** min(self._idle_deaths, 10), LAST_RESTART_SECONDS))
        self._idle_deaths += 1
        if self._is_shut_down or settings.ended():
            raise EndOfData
        self._restart()

    def _forget_sent(self, answered: _Call | None = None) -> None:
        """The process is gone: what it was sent is for another one, but for a call that has its answer."""
        rest = [call for call in self._sent if call is not answered]
        self._sent.clear()
        if answered is not None:
            self._sent.append(answered)
        requests = [call.request for call in rest if call.request is not None and not call.is_again]
        if requests and self._settings.requests is not None:
            self._settings.requests.give_back(requests)

    def _restart(self) -> None:
        self._settings.count_restart()
        try:
            self.launch(beside_threads=True)
        except OSError as error:
            raise WorkerDied(
                f"source {self._settings.source!r}, worker {self.worker_id}: its process has ended, and another cannot be "
                f"started: {describe(error)}"
            ) from error
