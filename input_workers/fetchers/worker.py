"""The loop of a worker process: receives requests, calls the fetch function, and writes its arrays into shared memory."""

from __future__ import annotations

import collections
import errno
import os
import pickle
import select
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np

from input_workers.contracts import FetchRequest
from input_workers.errors import EndOfData, InputWorkersError
from input_workers.fetchers import frames
from input_workers.fetchers.arena import map_arena
from input_workers.fetchers.attempt_reporter import AttemptReporter
from input_workers.fetchers.call_account import CallAccount
from input_workers.fetchers.chunk_check import ChunkCheck, SpecBook
from input_workers.fetchers.frames import INLINE_BELOW_NBYTES, Frame, Link, dumps, raised
from input_workers.fetchers.packed_calls import SENT, PackedCalls
from input_workers.fetchers.recovery import Attempt, AttemptState
from input_workers.fetchers.worker_job import Job
from input_workers.fetchers.worker_seeds import seed_by, seed_late_comers
from input_workers.leases import ALIGNMENT_BYTES
from input_workers.metrics.timed import fetcher_here

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Worker", "layout_of"]

SentExtent: TypeAlias = tuple[int, int, bool]  # offset, nbytes, is_cold


def layout_of(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype[Any]]) -> tuple[list[int], int]:
    """Return where each array begins in an extent, 64-byte aligned, and how many bytes they take."""
    offsets, end = [], 0
    for shape, dtype in zip(shapes, dtypes, strict=True):
        offsets.append(end)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        end += -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return offsets, end


class _Request(FetchRequest):
    """A request whose `out` is the shared memory of its call."""

    __slots__ = ("_worker",)

    def __init__(self, worker: Worker, index: int, epoch: int, rows: NDArray[np.int64], batch_size: int, key: Any) -> None:
        self._worker: Worker | None = None
        super().__init__(index, epoch, rows, worker_id=worker.job.worker_id, batch_size=batch_size)
        self._key = key
        self._worker = worker

    @property
    def out(self) -> list[NDArray[Any]] | None:
        """Memory to write into, one array per input."""
        return self._worker.offer(len(self.rows)) if self._worker is not None else None

    @out.setter
    def out(self, value: Any) -> None:
        pass

    def forget_worker(self) -> None:
        """The call has ended: no memory is offered any more."""
        self._worker = None


class Worker:
    """The loop of a worker process. Belongs to one thread.

    Args:
        link: to the parent.
        job: what to do.
        arena: a descriptor of the shared memory; it is kept open.
    """

    of_this_process: ClassVar[Worker | None] = None

    def __init__(self, link: Link, job: Job, arena: int) -> None:
        self.job = job
        self._link = link
        self._fetch: Callable[..., Any] = pickle.loads(job.fetch)  # noqa: S301  cloudpickle's, from our parent
        self._todo: collections.deque[Frame] = collections.deque()
        self._arena = arena
        self._memory = map_arena(arena)
        self._extent: SentExtent | None = None  # of the call that is being made
        self._grants: collections.deque[SentExtent | None] = collections.deque()  # answers to a NEED
        self._book = SpecBook(job.source, job.input_names, job.axes)
        self._check = ChunkCheck(self._book)  # of the calls of an attempt; the parent checks every answer
        self._offered: list[NDArray[Any]] | None = None
        self._ended = False
        self._account = CallAccount(job.worker_id)
        self._calls = PackedCalls(self._fetch, job.worker_id, link, self._account)

    def run(self) -> None:
        """Serve until the parent closes the pipe."""
        Worker.of_this_process = self
        with fetcher_here(self._account.recorder):
            while True:
                while not self._todo:
                    self._receive()
                self._serve(self._todo.popleft())

    def _serve(self, frame: Frame) -> None:
        """Make the call of a frame, and answer it."""
        account = self._account
        account.begin_call()
        kind, self._extent, state, *call = frame
        try:
            result = self._result_of(_Request(self, *call) if kind == frames.REQUEST else None, state, call)
            if result is SENT:
                account.was_answered_early()
            else:
                self._answer(result)
        except SystemExit:
            raise
        except EndOfData:  # of a plain function: a Stream's source does not get through with it
            self._ended = True
            self._link.send((frames.END, account.take()))
        except BaseException as error:
            if isinstance(error, (ConnectionError, EOFError)) and self._link.is_gone():
                raise EOFError from error
            self._link.send((*raised(error), account.take()))
        self._offered = None

    def _result_of(self, request: _Request | None, state: AttemptState | None, call: Sequence[Any]) -> Any:
        """Fetch a request, or call the plain function; if that fails, make the calls in its place that the policy says.

        Args:
            request: to fetch.
            state: what is left of an attempt that another process has begun.
            call: of a plain function, the batch size.
        """
        if self._ended:  # the function is not called again
            raise EndOfData
        failure: Exception | None = None
        if state is None:
            try:
                if request is not None:
                    result = self._fetch_rows(request)
                else:
                    seed_late_comers()
                    result = self._calls.next(*call) if self.job.packs else self._fetch(self.job.worker_id, *call)
            except Exception as error:
                if self.job.policy.raises_at_once or isinstance(error, EndOfData):
                    raise
                failure = error
            else:
                self._account.end_call()
                return result

        def fetch(part: FetchRequest | None) -> Any:
            if part is None:  # its rows are not packed with others: the attempt is that of one answer
                return self._fetch(self.job.worker_id, *call)
            self._offered = None  # it has the size of another part
            return self._fetch_rows(_Request(self, part.index, part.epoch, part.rows, part.batch_size, part.key))

        attempt = Attempt(self.job.policy, request, state)
        reporter = AttemptReporter(attempt, self._account, self._link)
        try:
            if failure is not None:
                reporter.end_call(failed=True)
                attempt.failed(failure, reporter)
            return attempt.run(fetch, self._check, reporter, lambda seconds: self._pause(seconds, reporter), lambda: True)
        finally:
            reporter.send()

    def _pause(self, seconds: float, reporter: AttemptReporter) -> bool:
        """Wait before a retry, and take in what comes meanwhile. Raises EOFError: the parent has closed the pipe."""
        reporter.send()  # a pause is no call that takes long
        until = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._link.socket, select.POLLIN)
        while (left := until - time.monotonic()) > 0:
            if poll.poll(min(left * 1000, MAX_POLL_MS)):
                self._receive()
        return False

    def _fetch_rows(self, request: _Request) -> Any:
        seed_by(request.key)
        try:
            return self._fetch(request.rows, request)
        except EndOfData as error:
            raise InputWorkersError(
                "the source of a Stream raised EndOfData; a Stream ends by the length of its source"
            ) from error
        finally:
            request.forget_worker()

    def offer(self, rows: int) -> list[NDArray[Any]] | None:
        """Return arrays in the extent of the call for this number of rows; None while the specs are not known."""
        if self._offered is None:
            specs = self._book.specs
            if specs is None or not all(spec.is_fixed for spec in specs):
                return None
            shapes = [spec.batch_shape(rows, axis) for spec, axis in zip(specs, self.job.axes, strict=True)]
            dtypes = [spec.dtype for spec in specs]
            if not layout_of(shapes, dtypes)[1]:
                return None
            self.lend(shapes, dtypes)
        return None if self._offered is None else list(self._offered)

    def lend(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype[Any]]) -> list[NDArray[Any]]:
        """Return arrays in the extent of the call. If the call returns them as they are, they are not copied.

        Raises OSError: there is no memory.
        """
        # Rows of earlier calls may already have answered this one, and its extent would be the parent's again.
        assert not self.job.packs  # noqa: S101
        offsets, nbytes = layout_of(shapes, dtypes)
        self._offered = self._arrays_in(self._room_for(nbytes), shapes, dtypes, offsets)
        return list(self._offered)

    def _answer(self, result: Any) -> None:
        """Send what the function returned."""
        if type(result) not in (list, tuple) or not all(map(_is_plain_array, result)):
            try:
                content = dumps(result)
            except Exception:  # no chunk: the parent says what it must be
                content = None
            if content is not None and len(content) > MAX_OTHER_NBYTES:
                content = None
            parts = result if type(result) in (list, tuple) else [result]
            kinds = [
                (part.dtype, part.ndim) if _is_plain_array(part) else type(part).__qualname__ for part in parts[:MAX_KINDS]
            ]
            self._link.send((frames.OTHER, content, kinds, parts is result, self._account.take()))
            return
        if sum(array.nbytes for array in result) < INLINE_BELOW_NBYTES:
            # Contiguous, because pickle changes the byte order of others.
            self._link.send((frames.INLINE, [np.asarray(array, order="C") for array in result], self._account.take()))
            return
        shapes, dtypes = [array.shape for array in result], [array.dtype for array in result]
        offered = self._offered
        in_place = offered is not None and len(offered) == len(result)
        if in_place and offered is not None:
            in_place = all(array is other for array, other in zip(result, offered, strict=True))
        offsets, nbytes = layout_of(shapes, dtypes)
        if not in_place:
            if offered is not None:  # some of the arrays may lie in the extent themselves
                result = [array.copy() if np.may_share_memory(array, offered[0].base) else array for array in result]
            targets = self._arrays_in(self._room_for(nbytes), shapes, dtypes, offsets)
            for target, array in zip(targets, result, strict=True):
                np.copyto(target, array, casting="no")
        self._link.send((frames.CHUNK, list(zip(shapes, dtypes, offsets, strict=True)), self._account.take()))

    def _room_for(self, nbytes: int) -> memoryview:
        """Return the memory of the call's extent; asks for another one if it is too small. Raises OSError: no memory."""
        extent = self._extent
        if extent is None or extent[1] < nbytes:
            self._extent = None
            self._link.send((frames.NEED, nbytes))
            with self._account.waiting():
                while not self._grants:
                    self._receive()
            extent = self._grants.popleft()
            if extent is None:
                raise OSError(
                    errno.ENOMEM,
                    f"no room for a chunk of {nbytes} bytes in the worker's shared memory of {len(self._memory)} bytes "
                    "(limited by ulimit -v and -f, and by the physical memory)",
                )
        offset, size, is_cold = extent
        if is_cold:
            # Allocated before the first write, which would otherwise end this process by SIGBUS if there is no memory.
            try:
                os.posix_fallocate(self._arena, offset, size)
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror}: shared memory of {size} bytes for a chunk") from error
        self._extent = offset, size, False
        return self._memory[offset : offset + size]

    def _arrays_in(
        self, memory: memoryview, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype[Any]], offsets: Sequence[int]
    ) -> list[NDArray[Any]]:
        return [np.ndarray(shape, dtype, memory, offset) for shape, dtype, offset in zip(shapes, dtypes, offsets, strict=True)]

    def _receive(self) -> None:
        """Take in the next frames from the parent. Raises EOFError when there will be none."""
        for frame in self._link.receive():
            if frame[0] == frames.GRANT:
                self._grants.append(frame[1])
            elif frame[0] == frames.SPECS:
                self._book.specs = frame[1]
            elif frame[0] == frames.TRACE:
                self._account.trace(frame[1])
            else:
                self._todo.append(frame)


# poll() counts milliseconds in 32 bits.
MAX_POLL_MS = 1e9

# What is no chunk is refused by the parent, who says what it is; of something large, its type must do.
MAX_OTHER_NBYTES = 64 * 1024
MAX_KINDS = 1000


def _is_plain_array(array: Any) -> bool:
    """Whether this is plain values; a memory-mapped array, or another view of them, will do."""
    if not isinstance(array, np.ndarray) or isinstance(array, (np.ma.MaskedArray, np.matrix)):
        return False
    return not array.dtype.hasobject and array.dtype.itemsize > 0
