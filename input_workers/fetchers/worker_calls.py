"""Calls made in a worker process: requests are sent ahead of time, and answered; should the process die, another takes over.

Belongs to one thread of the parent, which runs the fetch loop as if it made the calls itself. While the worker makes one
call, the next is already in its pipe. A call that fails is made again, or split, in the worker: see `recovery.Attempt`.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Sequence
from typing import Any

from input_workers.contracts import FetchRequest
from input_workers.errors import EndOfData, FetchTimeout, WorkerDied, describe
from input_workers.fetchers.arena import Arena
from input_workers.fetchers.fetcher import Fetcher
from input_workers.fetchers.recovery import Attempt, AttemptReport, AttemptState
from input_workers.fetchers.worker_job import WorkerSettings
from input_workers.fetchers.worker_session import CallTimedOut, WorkerGone, WorkerSession
from input_workers.metrics.fetcher_recorder import FetcherRecorder
from input_workers.metrics.trace import FetcherTrack

__all__ = ["WorkerCalls"]

# A worker that died is started again after this long, doubled for each that died without having answered a call.
FIRST_RESTART_SECONDS = 0.05
LAST_RESTART_SECONDS = 5.0
RESTART_WINDOW_SECONDS = 60.0

# The call in the making, and the one after it.
CALLS_AHEAD = 2
MAX_NBYTES_AHEAD = 32 * 1024


class WorkerCalls:
    """One worker, seen from the fetch loop of its thread. `shut_down` may be called by any thread.

    Args:
        settings: shared by all workers.
        worker_id: of this one.
    """

    owns_results = True  # arrays in an arena are leases, and those that came in a frame have no other owner
    make_retry_call = None  # the worker makes the retries

    # `_sent` has the requests that are not answered, in their order: None for a call of a plain function. `_attempt` adds up
    # what the worker has reported of the oldest; `_state` is what is left of it, to be sent to another process.

    def __init__(self, settings: WorkerSettings, worker_id: int) -> None:
        self.worker_id = worker_id
        self._settings = settings
        self._context = settings.context
        self._calls = settings.context.calls
        self.is_stream: bool = self._calls.is_stream
        self._arenas: list[Arena] = []  # of the process, and of earlier ones while the trainer holds some of their memory
        self._session: WorkerSession | None = None
        self._sent: collections.deque[FetchRequest | None] = collections.deque()
        self._attempt: Attempt | None = None
        self._state: AttemptState | None = None
        self._deaths: collections.deque[float] = collections.deque()
        self._idle_deaths = 0  # without an answer to any call between them
        self._was_killed = False  # the process was, and another is needed
        self._is_shut_down = False

    @property
    def block_bytes(self) -> int:
        """The shared memory of this worker's chunks, wherever they are. Any thread may ask."""
        return sum(arena.held_nbytes for arena in self._arenas)

    def launch(self, beside_threads: bool = False) -> None:
        """Start the process, while the source runs or before. Raises OSError."""
        start = self._settings.options.start_method
        if start == "fork" and beside_threads:
            start = "spawn"  # threads run by now, and the child would inherit a lock that one of them holds, for ever
        self._session = WorkerSession(self._settings, self.worker_id, start)
        # Replaced, not changed: another thread may be adding up their bytes.
        self._arenas = [*(arena for arena in self._arenas if arena.held_nbytes), self._session.arena]
        self._was_killed = False
        if self._is_shut_down:
            self._session.process.link.shut_down()

    def shut_down(self) -> None:
        """Have the worker end, and the thread that waits for it. Takes no lock."""
        self._is_shut_down = True
        session = self._session
        if session is not None:
            session.process.link.shut_down()

    def close(self) -> None:
        """End the worker for good. Called by its thread, or after that has ended."""
        self._is_shut_down = True
        if self._session is not None:
            self._session.end()

    def next(self, fetcher: Fetcher) -> tuple[Any, FetchRequest | None] | None:
        """Return the next answer and its request; None: the fetcher was released, and everything sent has been answered.

        `fetcher.attempt` is set where the call has failed at first: it knows what was skipped.

        Raises EndOfData at the end, what the function raised, FetchTimeout, or WorkerDied.
        """
        while True:
            # As it is now: the answers to what was sent are still used. If a worker has died, though, this one must go on:
            # others may all wait for what that was to fetch.
            released = fetcher.released and not (self.is_stream and self._calls.has_given_back)
            if released and not self._sent:
                return None
            try:
                self._begin(fetcher)
                if not released:
                    self._deal_ahead(fetcher)
                if not self._sent:
                    raise EndOfData
                request = self._sent[0]
                fetcher.request = request
                fetcher.recorder.request = None if request is None else request.index
                answer = self._answer(fetcher)
            except WorkerGone:
                fetcher.attempt = None
                self._replace()
                continue
            except CallTimedOut:
                self._time_out(fetcher)
                if self._state is not None:
                    continue
                answer = None if request is None else ()  # everything was skipped
            self._sent.popleft()
            attempt = fetcher.attempt = self._attempt
            self._attempt = None
            if isinstance(answer, BaseException):
                raise answer
            if attempt is not None and answer and request is not None:
                answer = attempt.keep(answer, self._context.book.batch_axes)
            return answer, request

    def _begin(self, fetcher: Fetcher) -> None:
        """Start another process in the place of one that was killed, and have it go on with what that was at."""
        if self._was_killed:
            self._restart("process was killed")
        if self._state is not None:
            state, self._state = self._state, None
            self._send(list(self._sent), fetcher, state)

    def _deal_ahead(self, fetcher: Fetcher) -> None:
        """Send requests, so that the worker has one to go on with when it has answered. Waits for one if it has none."""
        dealt: list[FetchRequest | None] = []
        calls = self._calls
        while (pending := len(self._sent) + len(dealt)) < CALLS_AHEAD:
            if not self.is_stream:
                dealt.append(None)
                continue
            try:
                request = calls.deal_now(self.worker_id) if pending else calls.deal(fetcher)
            except EndOfData:
                break
            if request is None:
                break
            last = (dealt or self._sent)[-1] if pending else None
            if last is not None and (request.ordinal < last.ordinal or request.rows.nbytes > MAX_NBYTES_AHEAD):
                # It was given back, and is for a worker with nothing before it: in order, this one's might wait for it.
                # Or it might not fit into the pipe, while the answer that comes the other way does not either.
                calls.give_back([request])
                break
            dealt.append(request)
        if dealt:
            self._sent.extend(dealt)
            self._send(dealt, fetcher)

    def _answer(self, fetcher: Fetcher) -> Any:
        """Return the answer to the oldest call, which may be an exception. Raises what `WorkerSession.answer` raises."""
        session, recorder = self._session, fetcher.recorder
        assert session is not None  # noqa: S101  it was launched
        answer, report = session.answer()
        while report is None:
            self._note_attempt(answer, recorder, session.process.pid)
            answer, report = session.answer(answer.is_calling)
        self._idle_deaths = 0
        recorder.call_started = time.monotonic() - report[0]
        call = "call" if self._attempt is None else ""  # those of an attempt that it has reported are noted
        if isinstance(answer, BaseException):
            call = "" if isinstance(answer, EndOfData) else "failed call"
        recorder.add_told(report, session.process.pid, call, recorder.request)
        return answer

    def _send(self, requests: Sequence[FetchRequest | None], fetcher: Fetcher, state: AttemptState | None = None) -> None:
        assert self._session is not None  # noqa: S101  it was launched
        track = fetcher.recorder.trace
        until = track.trace.until if isinstance(track, FetcherTrack) else 0.0
        self._session.send(requests, until, state)

    def _note_attempt(self, report: AttemptReport, recorder: FetcherRecorder, pid: int) -> None:
        """The oldest call has failed, and the worker makes others in its place."""
        if self._attempt is None:
            self._attempt = Attempt(self._context.policy, self._sent[0])
        self._attempt.add_report(report)
        track = recorder.trace
        for name, began, ended in report.calls:
            if name:
                recorder.count_error(name)
                recorder.failed = recorder.failed[0] + 1, recorder.failed[1] + ended - began
            if isinstance(track, FetcherTrack):
                track.add_from(pid, [("failed call" if name else "call", began, ended, recorder.request)])
        recorder.call_started = time.monotonic() if report.is_calling else math.inf

    def _time_out(self, fetcher: Fetcher) -> None:
        """The oldest call takes too long: kill the process. Raises FetchTimeout, if the policy is to raise it."""
        context, session, where = self._context, self._session, self._where()
        assert session is not None  # noqa: S101  it was launched
        stack = session.kill_stuck()
        self._was_killed = True
        request = self._sent.popleft()
        self._give_back_sent()
        attempt = fetcher.attempt = self._attempt = self._attempt or Attempt(context.policy, request)
        fetcher.end_call(failed=True)
        error = FetchTimeout(
            f"{where}: a call has run for over {context.fetch_timeout_s:g} s (fetch_timeout_s); "
            f"process {session.process.pid} was killed; it was in\n{stack}"
        )
        attempt.rewind()
        attempt.failed(error, fetcher)
        self._sent.append(request)
        self._state = None if attempt.is_over else attempt.state

    def _where(self) -> str:
        request = self._sent[0] if self._sent else None
        where = "" if request is None else f", request {request.index}"
        return f"source {self._context.source!r}, worker {self.worker_id}{where}"

    def _replace(self) -> None:
        """The worker has died: start another. Raises EndOfData if the run has ended, WorkerDied if it dies too often."""
        restarts, session, where = self._settings.options.restarts, self._session, self._where()
        assert session is not None  # noqa: S101  it was launched
        if self._is_shut_down:
            session.end()
        else:
            session.end_dead()
        self._give_back_sent()
        self._attempt = self._state = None
        if self._has_ended():
            raise EndOfData
        ending = f"process {session.process.pid} {session.process.describe_exit()}"
        now = time.monotonic()
        self._deaths.append(now)
        while now - self._deaths[0] > RESTART_WINDOW_SECONDS:
            self._deaths.popleft()
        if len(self._deaths) > restarts:
            last_words = session.last_words()
            raise WorkerDied(
                f"{where}: {ending}; deaths within a minute: {len(self._deaths)}, of which {restarts} are made good (restarts)"
                + (f"; its last words on stderr:\n{last_words}" if last_words else "")
            )
        self._context.pause(min(FIRST_RESTART_SECONDS * 2 ** min(self._idle_deaths, 10), LAST_RESTART_SECONDS))
        self._idle_deaths += 1
        self._restart(ending)

    def _give_back_sent(self) -> None:
        """The process is gone: what it was sent is for another one."""
        if self.is_stream and self._sent:
            self._calls.give_back(list(self._sent))
        self._sent.clear()

    def _has_ended(self) -> bool:
        return self._is_shut_down or self._context.assembly.closed

    def _restart(self, ending: str) -> None:
        """Start another process. Raises EndOfData if the run has ended, WorkerDied if it cannot be started."""
        if self._has_ended():
            raise EndOfData
        if not self.is_stream and self._session is not None and self._session.has_delivered:
            self._settings.warn_of_repeated_rows(self.worker_id, ending)
        self._context.recorder.count_restart()
        try:
            self.launch(beside_threads=True)
        except OSError as error:
            raise WorkerDied(
                f"source {self._context.source!r}, worker {self.worker_id}: its process has ended, and another cannot be "
                f"started: {describe(error)}"
            ) from error
