"""One worker process, as the thread that serves it sees it: calls are sent, each with an extent for its answer, and answered.

An extent belongs to its call until the answer comes: a chunk in it is lent on, and any other answer gives it back.
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
from input_workers.fetchers import StartMethod, frames
from input_workers.fetchers.arena import Arena, Extent
from input_workers.fetchers.frames import BadFrame, Frame, rebuilt
from input_workers.fetchers.process_launch import WorkerProcess
from input_workers.fetchers.recovery import AttemptReport, AttemptState, Skipped
from input_workers.fetchers.worker_job import Job, WorkerSettings, process_name
from input_workers.leases import aligned_bytes
from input_workers.metrics.fetcher_recorder import Told as CallReport

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["CallTimedOut", "WorkerGone", "WorkerSession"]

# A worker that is told to end gets this long; then it is killed.
END_GRACE_SECONDS = 0.5
# How long the stack of a stuck call, or the last words of a dead worker, are waited for.
LAST_WORDS_SECONDS = 0.3

# An array that has less than this share of its chunk's bytes is copied out of the extent: who keeps the labels of a batch
# does not keep its pictures.
SMALL_SHARE = 8

# poll() counts milliseconds in 32 bits.
MAX_POLL_MS = 1e9


class WorkerGone(Exception):
    """The worker has ended."""


class CallTimedOut(Exception):
    """A call takes longer than `fetch_timeout_s`."""


class WorkerSession:
    """One worker process from its start to its end. Belongs to one thread, except for `process.link.shut_down` and `arena`.

    The owner must call `end`, `end_dead` or `kill_stuck`.

    Args:
        settings: shared by all workers.
        worker_id: of this one.
        start: how to start the process.

    Attributes:
        arena: the memory of its chunks.
        has_delivered: it has answered a call with rows.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(self, settings: WorkerSettings, worker_id: int, start: StartMethod) -> None:
        self.worker_id = worker_id
        self.has_delivered = False
        self._context = settings.context
        self._timeout_s = math.inf if self._context.fetch_timeout_s is None else self._context.fetch_timeout_s
        self._extents: collections.deque[Extent | None] = collections.deque()  # of the calls that are not answered, in order
        self._frames: collections.deque[Frame] = collections.deque()  # that have come from it
        self._knows_specs = False
        self._traced_until = 0.0
        self._is_ready = False
        self.arena = Arena()
        try:
            self.process = WorkerProcess(start, settings.options.preload)
            try:
                self._printed = settings.output.add(worker_id, self.process.outputs)
            except BaseException:
                self.process.kill()
                self.process.end(0.0)
                raise
        except BaseException:
            self.arena.close()
            raise
        self._poll = select.poll()
        self._poll.register(self.process.link.socket, select.POLLIN)
        if self.process.ended >= 0:
            self._poll.register(self.process.ended, select.POLLIN)
        if self._timeout_s != math.inf:
            self.process.link.limit_send(self._timeout_s)
        self._write((process_name(self._context.source, worker_id), Job(settings, worker_id)))
        try:
            self.process.link.send_descriptor(self.arena.descriptor)
        except OSError:
            pass  # it has died: `answer` tells
        self.arena.close_descriptor()

    def send(
        self, requests: Sequence[FetchRequest | None], trace_until: float = 0.0, state: AttemptState | None = None
    ) -> None:
        """Send calls, and the specs once they are known. The process may have died: `answer` tells.

        Args:
            requests: one for each call.
            trace_until: `time.monotonic()` when the trace that runs ends.
            state: what is left of an attempt that another process has begun for the one request.
        """
        messages: list[Frame] = []
        specs = self._context.book.specs
        if specs is not None and not self._knows_specs:
            messages.append((frames.SPECS, specs))
            self._knows_specs = True
        if trace_until > self._traced_until:
            messages.append((frames.TRACE, trace_until))
            self._traced_until = trace_until
        for each in requests:
            # How large it must be is known when the first chunk has come. Before, the worker asks for one.
            extent = self.arena.take() if self.arena.expected_nbytes else None
            self._extents.append(extent)
            sent = _sent_as(extent)
            if each is None:
                messages.append((frames.CALL, sent, state, self._context.calls.batch_size))
            else:
                messages.append((frames.REQUEST, sent, state, each.index, each.epoch, each.rows, each.batch_size, each.key))
        self._write(messages)

    def answer(self, is_calling: bool = True) -> tuple[Any, CallReport | None]:
        """Wait for the answer to the oldest call: a result, or an exception that the function raised; and a report.

        Without a report: the call has failed, and calls are made in its place. What is returned is an AttemptReport, its
        errors rebuilt.

        Args:
            is_calling: a call begins now; if not, the worker may take any time.

        Raises:
            WorkerGone: the worker has died.
            CallTimedOut: the call takes too long.
            WorkerDied: the worker could not begin, or has sent something that is not a frame.
        """
        limit = time.monotonic() + self._timeout_s if is_calling and self._is_ready else math.inf
        while True:
            while not self._frames:
                self._receive(limit)
            frame = self._frames.popleft()
            kind = frame[0]
            if kind == frames.READY:
                self._is_ready = True
                limit = time.monotonic() + self._timeout_s  # what comes before the first call is none
                continue
            if kind == frames.NEED:
                self._grant(frame[1])
                continue
            if not self._is_ready:
                raise self._cannot_begin(frame)
            if kind == frames.ATTEMPT:
                report: AttemptReport = frame[1]
                skipped = [Skipped(rows, text, rebuilt(error, self._who())) for rows, text, error in report.skipped]
                return report._replace(skipped=skipped), None
            extent = self._extents.popleft()
            if kind == frames.CHUNK:
                assert extent is not None  # noqa: S101  a chunk comes in the extent of its call
                self.has_delivered = True
                return self._arrays(extent, frame[1]), frame[-1]
            if extent is not None:
                self.arena.give_back(extent)
            if kind == frames.INLINE:
                self.has_delivered = True
                return frame[1], frame[-1]
            if kind == frames.OTHER:
                return self._other(frame), frame[-1]
            if kind == frames.END:
                return EndOfData(), frame[-1]
            assert kind == frames.ERROR  # noqa: S101  there is no other
            return rebuilt(frame[:-1], self._who()), frame[-1]

    def _receive(self, limit: float) -> None:
        """Wait for frames. Raises WorkerGone; CallTimedOut: none came in time; WorkerDied: what came is not a frame."""
        link = self.process.link
        while True:
            left_ms = min(max(0.0, limit - time.monotonic()) * 1000, MAX_POLL_MS)
            ready = self._poll.poll(left_ms)
            if ready:
                break
            if time.monotonic() >= limit:
                raise CallTimedOut
        if any(descriptor == self.process.ended for descriptor, _ in ready):
            link.shut_down()  # a process that it started may hold the pipe open
        try:
            self._frames += link.receive_now()
        except (EOFError, OSError) as error:
            raise WorkerGone from error
        except BadFrame as error:
            # Where the next frame begins cannot be known any more.
            self.process.kill()
            raise WorkerDied(
                f"source {self._context.source!r}, worker {self.worker_id}: process {self.process.pid} was killed: its pipe "
                f"to the trainer must carry frames, got {error}; does the fetch function write to a descriptor that it did "
                "not open?"
            ) from error

    def _grant(self, nbytes: int) -> None:
        """Replace the extent of the oldest call, which needs `nbytes`."""
        extent = self._extents[0]
        if extent is not None:
            self.arena.give_back(extent)
        self._extents[0] = extent = self.arena.take(nbytes)
        self._write([(frames.GRANT, _sent_as(extent))])

    def _write(self, messages: Any) -> None:
        try:
            self.process.link.send(messages)
        except OSError:
            pass  # it has died; what it answered before comes first, then the end

    def _arrays(self, extent: Extent, layout: Sequence[tuple[tuple[int, ...], np.dtype[Any], int]]) -> list[NDArray[Any]]:
        """Return the chunk's arrays, in its extent, which comes back when the last of them dies."""
        sizes = [int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype, _ in layout]
        used = max(offset + nbytes for (_, _, offset), nbytes in zip(layout, sizes, strict=True))
        base = self.arena.lease(extent, used)
        arrays = []
        for (shape, dtype, offset), nbytes in zip(layout, sizes, strict=True):
            if not nbytes:
                arrays.append(np.empty(shape, dtype))
                continue
            values = base[offset : offset + nbytes]
            if nbytes * SMALL_SHARE < used:
                copied = aligned_bytes(nbytes)  # a batch is lent on only if all of its arrays are aligned
                copied[:] = values
                values = copied
            arrays.append(values.view(dtype).reshape(shape))
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
            f"source {self._context.source!r}, worker {self.worker_id}: {self._who()} could not begin: {describe(cause)} "
            "(raised by worker_init_fun, or when the fetch function was loaded there)"
        )
        died.__cause__ = cause
        return died

    def _who(self) -> str:
        return f"worker process {self.process.pid} (worker {self.worker_id})"

    def end(self) -> None:
        """Ask the process to end, kill it if it does not in time, and free its memory. Idempotent."""
        self.process.end(END_GRACE_SECONDS)
        self.arena.close()
        while self._extents:
            extent = self._extents.popleft()
            if extent is not None:
                self.arena.give_back(extent)

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


def _sent_as(extent: Extent | None) -> tuple[int, int, bool] | None:
    """Return what the worker is sent of an extent."""
    return None if extent is None else (extent.offset, extent.nbytes, extent.is_cold)
