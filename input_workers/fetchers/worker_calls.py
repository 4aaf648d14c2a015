"""Calls made in a worker process: requests go to it ahead of time, its answers come back; should it die, another takes over.

Belongs to one thread of the parent, which runs the fetch loop as if it made the calls itself. While the worker makes one
call, the next is already in its pipe; the block for the answer is granted when the chunk before it has been put, so that a
source has at most as many blocks as fetchers and waiting chunks.
"""

from __future__ import annotations

import collections
import math
import select
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.contracts import FetchRequest
from input_workers.errors import EndOfData, FetchTimeout, WorkerDied
from input_workers.fetchers.frames import CALL, CHUNK, END, ERROR, GRANT, INLINE, NEED, READY, REQUEST, SPECS, Frame, rebuilt
from input_workers.fetchers.process_launch import WorkerProcess
from input_workers.fetchers.worker_output import WorkerOutput
from input_workers.fetchers.worker_settings import WorkerSettings
from input_workers.leases import Block, BlockPool
from input_workers.metrics.recorder import FetcherRecorder

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["WorkerCalls"]

# A worker that died is started again after this long, doubled each time, up to so many times a minute.
FIRST_RESTART_SECONDS = 0.05
RESTART_WINDOW_SECONDS = 60.0

# A worker that is told to end gets this long; then it is killed.
END_GRACE_SECONDS = 0.5
# How long the stack of a stuck call, or the last words of a dead worker, are waited for.
LAST_WORDS_SECONDS = 0.3


class _Gone(Exception):
    """The worker's pipe has ended."""


class _Call:
    """A call that was sent and not answered yet."""

    __slots__ = ("request",)

    def __init__(self, request: FetchRequest | None) -> None:
        self.request = request


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
        self.process: WorkerProcess | None = None
        self._settings = settings
        self._output = output
        self._pool = BlockPool(settings.keep_blocks)
        self._sent: collections.deque[_Call] = collections.deque()  # in the order of their answers
        self._early: collections.deque[tuple[_Call, Any]] = collections.deque()  # answers that came before one wanted now
        self._known: set[int] = set()  # numbers of blocks that the process has mapped
        self._granted: Block | None = None
        self._knows_specs = False
        self._deaths: collections.deque[float] = collections.deque()
        self._is_shut_down = False
        self._was_started = False
        self._poll = select.poll()

    def launch(self) -> None:
        """Start the process. Raises OSError."""
        start = self._settings.start
        # Threads run by now: a fork beside them could inherit a lock that nobody opens.
        process = WorkerProcess("spawn" if start == "fork" and self._was_started else start)
        self._was_started = True
        self._output.add(self.worker_id, process.outputs)
        self._known = set()
        self._knows_specs = False
        self._poll = select.poll()
        self._poll.register(process.link.socket, select.POLLIN)
        if process.ended >= 0:
            self._poll.register(process.ended, select.POLLIN)
        self.process = process
        try:
            process.link.send(self._settings.job(self.worker_id))
        except OSError:  # it has died already, as the first call will find
            pass
        if self._is_shut_down:
            process.link.shut_down()

    def shut_down(self) -> None:
        """Have the worker end, and whoever waits for it. Takes no lock."""
        self._is_shut_down = True
        process = self.process
        if process is not None:
            process.link.shut_down()

    def close(self) -> None:
        """End the worker for good. The thread's own, or after it has ended."""
        self._is_shut_down = True
        if self.process is not None:
            self.process.end(END_GRACE_SECONDS)
            self.process = None
        self._take_back_block()
        self._early.clear()
        self._pool.close()

    def next(self, recorder: FetcherRecorder) -> tuple[Any, FetchRequest | None]:
        """Return the next answer and its request. Raises EndOfData at the end, what the function raised, or WorkerDied."""
        while True:
            if self._early:
                call, answer = self._early.popleft()
                recorder.request = call.request
                return self._result(answer), call.request
            try:
                self._deal_ahead(recorder)
                if not self._sent:
                    raise EndOfData
                recorder.request = self._sent[0].request
                answer = self._answer(recorder)
            except _Gone:
                self._replace(recorder.request)
                continue
            call = self._sent.popleft()
            return self._result(answer), call.request

    def fetch(self, request: FetchRequest | None) -> Any:
        """Make the call for a request, or for a part of one, or of a plain function, and return its result."""
        recorder = FetcherRecorder(self.worker_id)
        call = _Call(request)
        while True:
            try:
                if call not in self._sent:
                    self._send([call])
                answer = self._answer(recorder)
            except _Gone:
                if call in self._sent:
                    self._sent.remove(call)
                self._replace(request)
                continue
            head = self._sent.popleft()
            if head is call:
                return self._result(answer)
            self._early.append((head, answer))

    def _deal_ahead(self, recorder: FetcherRecorder) -> None:
        """Send requests, so that the worker has one to go on with when it has answered."""
        calls: list[_Call] = []
        requests = self._settings.requests
        while len(self._sent) + len(calls) < CALLS_AHEAD:
            if requests is None:
                calls.append(_Call(None))
                continue
            if self._sent or calls:
                last = (calls or self._sent)[-1].request
                if last is not None and len(last.rows) > MAX_ROWS_AHEAD:  # it might not fit into the pipe
                    break
            try:
                calls.append(_Call(requests.deal(self.worker_id)))
            except EndOfData:
                break
        if calls or (self._granted is None and self._pool.nbytes and self._sent):
            self._send(calls)

    def _send(self, calls: Sequence[_Call]) -> None:
        """Send these calls, the specs, and a block for the next answer. Raises _Gone, or OSError: no memory for a block."""
        settings = self._settings
        self._sent.extend(calls)
        frames: list[Frame] = []
        if not self._knows_specs:
            specs = settings.specs()
            if specs is not None:
                frames.append((SPECS, list(specs)))
                self._knows_specs = True
        descriptors = self._grant(frames, 0) if self._granted is None and self._pool.nbytes else []
        for call in calls:
            request = call.request
            if request is None:
                frames.append((CALL, settings.function.batch_size))
            else:
                frames.append((REQUEST, request.index, request.epoch, request.rows, request.batch_size, request.key))
        self._write(frames, descriptors)

    def _grant(self, frames: list[Frame], nbytes: int) -> list[int]:
        """Add the frame that grants a block; return the descriptors to send after it."""
        self._granted = block = self._pool.take(nbytes)
        is_new = block.number not in self._known
        self._known.add(block.number)
        frames.append((GRANT, block.number, block.nbytes, is_new))
        return [block.descriptor] if is_new else []

    def _write(self, frames: list[Frame], descriptors: Sequence[int]) -> None:
        assert self.process is not None  # noqa: S101  it was launched
        try:
            self.process.link.send(frames, descriptors)
        except OSError as error:
            raise _Gone from error

    def _answer(self, recorder: FetcherRecorder) -> Any:
        """Wait for the answer to the oldest call: a result, or an exception. Raises _Gone, EndOfData, FetchTimeout."""
        assert self.process is not None  # noqa: S101  it was launched
        link = self.process.link
        limit = math.inf if self._settings.fetch_timeout_s is None else time.monotonic() + self._settings.fetch_timeout_s
        while True:
            timeout_ms = None if limit == math.inf else max(0.0, limit - time.monotonic()) * 1000
            if not self._poll.poll(timeout_ms):
                raise self._too_long()
            try:
                frame = link.receive()
            except (EOFError, OSError) as error:
                raise _Gone from error
            kind = frame[0]
            if kind == READY:
                continue
            if kind == NEED:
                self._take_back_block()
                frames: list[Frame] = []
                self._write(frames, self._grant(frames, frame[1]))
                continue
            recorder.call_started = time.monotonic() - frame[-1]
            if kind == CHUNK:
                return self._arrays(frame)
            if kind == INLINE:
                return frame[1]
            if kind == END:
                return EndOfData()
            assert kind == ERROR  # noqa: S101  there is no other
            return rebuilt(frame[:-1], f"worker process {self.process.pid} (worker {self.worker_id})")

    def _result(self, answer: Any) -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _arrays(self, frame: Frame) -> list[NDArray[Any]]:
        """Return the chunk's arrays, in the block that was granted; it comes back when the last of them dies."""
        _, number, layout, _ = frame
        block, self._granted = self._granted, None
        assert block is not None  # noqa: S101  answers come in granted blocks
        assert block.number == number  # noqa: S101
        base = self._pool.lease(block)
        arrays = []
        for shape, dtype, offset in layout:
            nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            arrays.append(base[offset : offset + nbytes].view(dtype).reshape(shape) if nbytes else np.empty(shape, dtype))
        return arrays

    def _take_back_block(self) -> None:
        """The worker does not use the granted block: it has died, or wants a larger one."""
        block, self._granted = self._granted, None
        if block is not None:
            self._pool.give_back(block)

    def _too_long(self) -> Exception:
        """A call takes too long: kill the worker and start another; return the error."""
        settings, process = self._settings, self.process
        assert process is not None  # noqa: S101  it was launched
        process.show_stacks()
        process.has_ended(LAST_WORDS_SECONDS)
        process.kill()
        process.end(END_GRACE_SECONDS)
        stack = self._output.tail(self.worker_id, LAST_WORDS_SECONDS)
        call = self._sent.popleft()
        where = "" if call.request is None else f", request {call.request.index}"
        self._forget_sent()
        self._restart()
        return FetchTimeout(
            f"source {settings.source!r}, worker {self.worker_id}{where}: a call has run for over "
            f"{settings.fetch_timeout_s:g} s (fetch_timeout_s); process {process.pid} was killed; it was in\n{stack}"
        )

    def _replace(self, request: FetchRequest | None) -> None:
        """The worker has died: start another. Raises EndOfData if the run has ended, WorkerDied if it dies too often."""
        settings, process = self._settings, self.process
        assert process is not None  # noqa: S101  it was launched
        if not self._is_shut_down and not process.has_ended(LAST_WORDS_SECONDS):
            process.kill()
        process.end(END_GRACE_SECONDS)
        self._forget_sent()
        if self._is_shut_down or settings.ended():
            raise EndOfData
        now = time.monotonic()
        self._deaths.append(now)
        while now - self._deaths[0] > RESTART_WINDOW_SECONDS:
            self._deaths.popleft()
        if len(self._deaths) > settings.restarts:
            last_words = self._output.tail(self.worker_id, LAST_WORDS_SECONDS)
            where = "" if request is None else f", request {request.index}"
            raise WorkerDied(
                f"source {settings.source!r}, worker {self.worker_id}{where}: process {process.pid} {process.end_in_words()}; "
                f"it was the {len(self._deaths)}. death within a minute, {settings.restarts} of which are made good (restarts)"
                + (f"; its last words on stderr:\n{last_words}" if last_words else "")
            )
        settings.idle(FIRST_RESTART_SECONDS * 2 ** (len(self._deaths) - 1))
        if self._is_shut_down or settings.ended():
            raise EndOfData
        self._restart()

    def _forget_sent(self) -> None:
        """The process is gone: what it was sent is for another one, and its block is free."""
        requests = [call.request for call in self._sent if call.request is not None]
        self._sent.clear()
        if requests and self._settings.requests is not None:
            self._settings.requests.give_back(requests)
        self._take_back_block()

    def _restart(self) -> None:
        self._settings.count_restart()
        self.launch()


# The call in the making, and the one after it.
CALLS_AHEAD = 2
MAX_ROWS_AHEAD = 4096
