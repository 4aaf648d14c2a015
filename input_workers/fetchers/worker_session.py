"""One worker process, spoken to by the thread that serves it: calls and blocks go there, answers come back.

The block for an answer is granted when the chunk before it has been put, so that a source has at most as many blocks as
fetchers and waiting chunks.
"""

from __future__ import annotations

import collections
import math
import pickle
import select
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.contracts import FetchRequest
from input_workers.errors import EndOfData, WorkerDied, describe
from input_workers.fetchers import StartMethod
from input_workers.fetchers.frames import (
    CALL,
    CHUNK,
    END,
    ERROR,
    GRANT,
    INLINE,
    NEED,
    OTHER,
    READY,
    REFUSE,
    REQUEST,
    SPECS,
    TRACE,
    Frame,
    rebuilt,
)
from input_workers.fetchers.process_launch import WorkerProcess
from input_workers.fetchers.worker_output import WorkerOutput
from input_workers.fetchers.worker_settings import WorkerSettings
from input_workers.leases import Block, BlockPool
from input_workers.metrics.fetcher_recorder import FetcherRecorder, Told

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Gone", "TooLong", "WorkerSession"]

# A worker that is told to end gets this long; then it is killed.
END_GRACE_SECONDS = 0.5
# How long the stack of a stuck call, or the last words of a dead worker, are waited for.
LAST_WORDS_SECONDS = 0.3

# poll() counts milliseconds in 32 bits.
MAX_POLL_MS = 1e9


class Gone(Exception):
    """The worker has ended."""


class TooLong(Exception):
    """A call takes too long."""


class WorkerSession:
    """Belongs to one thread, but for `process.link.shut_down`. `end` is its owner's duty.

    Args:
        settings: shared by all workers.
        worker_id: of this one.
        output: passes on what it prints.
        start: how to start the process.
        pool: has the blocks.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(
        self, settings: WorkerSettings, worker_id: int, output: WorkerOutput, start: StartMethod, pool: BlockPool
    ) -> None:
        self.worker_id = worker_id
        self._settings = settings
        self._pool = pool
        self._granted: Block | None = None
        self._known: set[int] = set()  # numbers of blocks that it has mapped
        self._frames: collections.deque[Frame] = collections.deque()  # that have come from it
        self._knows_specs = False
        self._traced_until = 0.0
        self._is_ready = False
        self.process = WorkerProcess(start, settings.preload)
        try:
            self._printed = output.add(worker_id, self.process.outputs)
        except BaseException:
            self.process.kill()
            self.process.end(0.0)
            raise
        self._poll = select.poll()
        self._poll.register(self.process.link.socket, select.POLLIN)
        if self.process.ended >= 0:
            self._poll.register(self.process.ended, select.POLLIN)
        if settings.fetch_timeout_s is not None:
            self.process.link.limit_send(settings.fetch_timeout_s)
        self._write(settings.job(worker_id))

    def send(self, requests: Sequence[FetchRequest | None], trace_until: float = 0.0) -> None:
        """Send calls, the specs once they are known, and a block for the next answer. It may have died: `answer` tells.

        Args:
            requests: one for each call.
            trace_until: `time.monotonic()` when the trace that runs ends.
        """
        settings = self._settings
        frames: list[Frame] = []
        if not self._knows_specs:
            specs = settings.specs()
            if specs is not None:
                frames.append((SPECS, list(specs)))
                self._knows_specs = True
        if trace_until > self._traced_until:
            frames.append((TRACE, trace_until))
            self._traced_until = trace_until
        descriptors = self._grant_ahead(frames)
        for request in requests:
            if request is None:
                frames.append((CALL, settings.function.batch_size))
            else:
                frames.append((REQUEST, request.index, request.epoch, request.rows, request.batch_size, request.key))
        self._write(frames, descriptors)

    def answer(self, recorder: FetcherRecorder) -> tuple[Any, Told]:
        """Wait for the answer to the oldest call: a result, or an exception that the function raised; and what it tells.

        Raises:
            Gone: the worker has died.
            TooLong: the call has.
            WorkerDied: the worker could not begin.
        """
        frames: list[Frame] = []
        descriptors = self._grant_ahead(frames)
        if frames:
            self._write(frames, descriptors)
        limit = self._limit()
        while True:
            while not self._frames:
                self._receive(limit)
            frame = self._frames.popleft()
            kind = frame[0]
            if kind == READY:
                self._is_ready = True
                limit = self._limit()
                continue
            if kind == NEED:
                self.take_back_block()
                frames = []
                descriptors = self._grant(frames, frame[1], is_needed=True)
                self._write(frames, descriptors)
                continue
            if not self._is_ready:
                raise self._cannot_begin(frame)
            told: Told = frame[-1]
            recorder.call_started = time.monotonic() - told[0]
            if kind == CHUNK:
                return self._arrays(frame), told
            if kind == INLINE:
                return frame[1], told
            if kind == OTHER:
                return self._other(frame), told
            if kind == END:
                return EndOfData(), told
            assert kind == ERROR  # noqa: S101  there is no other
            return rebuilt(frame[:-1], self._who()), told

    def _receive(self, limit: float) -> None:
        """Wait for frames. Raises Gone; TooLong: none came in time."""
        link = self.process.link
        while True:
            left_ms = min(max(0.0, limit - time.monotonic()) * 1000, MAX_POLL_MS)
            ready = self._poll.poll(left_ms)
            if ready:
                break
            if time.monotonic() >= limit:
                raise TooLong
        if any(descriptor == self.process.ended for descriptor, _ in ready):
            link.shut_down()  # a process that it started may hold the pipe open
        try:
            self._frames += link.receive_now()
        except (EOFError, OSError) as error:
            raise Gone from error

    def _limit(self) -> float:
        """Return until when to wait for an answer. What comes before the first call is none."""
        if self._settings.fetch_timeout_s is None or not self._is_ready:
            return math.inf
        return time.monotonic() + self._settings.fetch_timeout_s

    def _grant_ahead(self, frames: list[Frame]) -> list[int]:
        """Grant a block, if none is and it is known how large; see `_grant`."""
        return self._grant(frames, 0, is_needed=False) if self._granted is None and self._pool.nbytes else []

    def _grant(self, frames: list[Frame], nbytes: int, is_needed: bool) -> list[int]:
        """Add the frame that grants a block, or says why none can be; return the descriptors to send after it."""
        try:
            block = self._pool.take(nbytes)
        except OSError as error:
            note = " ".join(getattr(error, "__notes__", ()))
            frames.append((REFUSE, error.errno, f"{error.strerror}; {note}", is_needed))
            return []
        self._granted = block
        is_new = block.number not in self._known
        self._known.add(block.number)
        gone = [self._pool.gone.popleft() for _ in range(len(self._pool.gone))]
        gone = [number for number in gone if number in self._known]
        self._known.difference_update(gone)
        frames.append((GRANT, block.number, block.nbytes, is_new, is_needed, gone))
        return [block.descriptor] if is_new else []

    def _write(self, frames: Any, descriptors: Sequence[int] = ()) -> None:
        try:
            self.process.link.send(frames, descriptors)
        except OSError:
            pass  # it has died; what it answered before comes first, then the end

    def _arrays(self, frame: Frame) -> list[NDArray[Any]]:
        """Return the chunk's arrays, in the block that was granted; it comes back when the last of them dies."""
        _, number, layout, _ = frame
        block, self._granted = self._granted, None
        assert block is not None  # noqa: S101  answers come in granted blocks
        assert block.number == number  # noqa: S101
        base = self._pool.lease(block)
        arrays, used = [], 0
        for shape, dtype, offset in layout:
            nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            arrays.append(base[offset : offset + nbytes].view(dtype).reshape(shape) if nbytes else np.empty(shape, dtype))
            used = offset + nbytes
        self._pool.used(used)
        return arrays

    def _other(self, frame: Frame) -> Any:
        """Return what is no chunk, or what stands for it."""
        _, content, kinds, is_sequence, _ = frame
        stand_ins = [type(kind, (), {})() if isinstance(kind, str) else np.empty((0,) * kind[1], kind[0]) for kind in kinds]
        stand_in = stand_ins if is_sequence else stand_ins[0]
        try:
            return stand_in if content is None else pickle.loads(content)  # noqa: S301  from our own worker
        except Exception:  # its class can only be had in the worker
            return stand_in

    def _cannot_begin(self, frame: Frame) -> WorkerDied:
        cause = rebuilt(frame[:-1], self._who())
        died = WorkerDied(
            f"source {self._settings.source!r}, worker {self.worker_id}: {self._who()} could not begin: {describe(cause)} "
            "(raised by worker_init_fun, or when the fetch function was loaded there)"
        )
        died.__cause__ = cause
        return died

    def _who(self) -> str:
        return f"worker process {self.process.pid} (worker {self.worker_id})"

    def take_back_block(self) -> None:
        """The worker does not use the granted block: it has died, or wants a larger one."""
        block, self._granted = self._granted, None
        if block is not None:
            self._pool.give_back(block)

    def end(self) -> None:
        """Ask the process to end, kill it if it does not in time, and free its block."""
        self.process.end(END_GRACE_SECONDS)
        self.take_back_block()

    def end_dead(self) -> None:
        """Reap a process that has died, or has closed its pipe, which is as good."""
        if not self.process.has_ended(LAST_WORDS_SECONDS):
            self.process.kill()
        self.end()

    def kill_stuck(self) -> str:
        """Kill the process; return its stack."""
        self.process.show_stacks()
        self.process.has_ended(LAST_WORDS_SECONDS)
        self.process.kill()
        self.end()
        return self.last_words() or "    (a process that was stopped cannot say where)"

    def last_words(self) -> str:
        """Return what the process, which has ended, wrote last to stderr."""
        return self._printed.tail(LAST_WORDS_SECONDS)
