"""What runs in a worker process: requests come in by the pipe, the fetch function is called, its arrays go into blocks."""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import os
import pickle
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from input_workers.contracts import ArraySpec, FetchRequest
from input_workers.errors import EndOfData, InputWorkersError
from input_workers.fetchers.call_account import CallAccount
from input_workers.fetchers.frames import (
    CHUNK,
    END,
    GRANT,
    INLINE,
    INLINE_BELOW_NBYTES,
    NEED,
    OTHER,
    READY,
    REFUSE,
    REQUEST,
    SPECS,
    TRACE,
    Frame,
    Link,
    raised,
)
from input_workers.fetchers.packed_calls import SENT, PackedCalls
from input_workers.fetchers.worker_job import Job, die_with_parent
from input_workers.fetchers.worker_seeds import seed_by, seed_late_comers
from input_workers.leases import ALIGNMENT_BYTES, map_block
from input_workers.metrics.timed import fetcher_here

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["STACK_SIGNAL", "Worker", "layout_of", "main", "serve"]

STACK_SIGNAL = signal.SIGUSR2  # shows the stacks of all threads on stderr, also while C code holds the GIL


def layout_of(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype[Any]]) -> tuple[list[int], int]:
    """Return where each array begins in a block, 64-byte aligned, and how many bytes they take."""
    offsets, end = [], 0
    for shape, dtype in zip(shapes, dtypes, strict=True):
        offsets.append(end)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        end += -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return offsets, end


class _Request(FetchRequest):
    """A request whose `out` is memory of the block, once one was granted."""

    __slots__ = ("_worker",)

    def __init__(self, worker: Worker, index: int, epoch: int, rows: NDArray[np.int64], batch_size: int, key: Any) -> None:
        self._worker: Worker | None = None
        super().__init__(index, epoch, rows, worker_id=worker.job.worker_id, batch_size=batch_size)
        self._key = key
        self._worker = worker

    @property
    def out(self) -> list[NDArray[Any]] | None:
        """Memory to write into, one array per input; waits for a block the first time that it is asked for."""
        return self._worker.offer(len(self.rows)) if self._worker is not None else None

    @out.setter
    def out(self, value: Any) -> None:
        pass

    def forget_worker(self) -> None:
        """The call has ended: no memory is offered any more."""
        self._worker = None


class Worker:
    """The loop of a worker process. Belongs to one thread."""

    of_this_process: ClassVar[Worker | None] = None

    def __init__(self, link: Link, job: Job) -> None:
        self.job = job
        self._link = link
        self._fetch: Callable[..., Any] = pickle.loads(job.fetch)  # noqa: S301  cloudpickle's, from our parent
        self._todo: collections.deque[Frame] = collections.deque()
        self._blocks: dict[int, memoryview] = {}
        self._granted: int | None = None
        self._needs = False  # a NEED was sent and not answered yet
        self._refused: tuple[int, str] | None = None  # why no block was granted
        self._is_served = False  # the parent grants blocks by itself
        self._specs: list[ArraySpec] | None = None
        self._offered: list[NDArray[Any]] | None = None
        self._ended = False
        self._account = CallAccount(job.worker_id)
        self._calls = PackedCalls(self._fetch, job.worker_id, self._send_packed, self._account.took)

    def run(self) -> None:
        """Serve until the parent closes the pipe."""
        Worker.of_this_process = self
        with fetcher_here(self._account.recorder):
            self._serve()

    def _serve(self) -> None:
        while True:
            while not self._todo:
                self._receive()
            frame = self._todo.popleft()
            account = self._account
            account.begin_call()
            request: _Request | None = None
            try:
                if frame[0] == REQUEST:
                    request = _Request(self, *frame[1:])
                    result = self._fetch_rows(request)
                elif self._ended:  # the function is not called again
                    raise EndOfData
                else:
                    seed_late_comers()
                    result = self._calls.next(frame[1]) if self.job.packs else self._fetch(self.job.worker_id, frame[1])
                account.end_call()
                if result is SENT:
                    account.was_answered_early()
                else:
                    self._answer(result)
            except (ConnectionError, EOFError) as error:
                if self._link.is_gone():
                    raise EOFError from error
                self._link.send((*raised(error, _dumps), account.take()))
            except SystemExit:
                raise
            except EndOfData:  # of a plain function: a Stream's source does not get through with it
                self._ended = True
                self._link.send((END, account.take()))
            except BaseException as error:
                self._link.send((*raised(error, _dumps), account.take()))
            if request is not None:
                request.forget_worker()
            self._offered = result = request = None

    def _fetch_rows(self, request: _Request) -> Any:
        seed_by(request.key)
        try:
            return self._fetch(request.rows, request)
        except EndOfData as error:
            raise InputWorkersError(
                "the source of a Stream raised EndOfData; a Stream ends by the length of its source"
            ) from error

    def offer(self, rows: int) -> list[NDArray[Any]] | None:
        """Return arrays in the granted block for so many rows; None while the specs are not known."""
        if self._offered is None:
            if self._specs is None or not all(spec.is_fixed for spec in self._specs):
                return None
            shapes = [spec.batch_shape(rows, axis) for spec, axis in zip(self._specs, self.job.axes, strict=True)]
            dtypes = [spec.dtype for spec in self._specs]
            if not layout_of(shapes, dtypes)[1]:
                return None
            self.lend(shapes, dtypes)
        return None if self._offered is None else list(self._offered)

    def lend(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype[Any]]) -> list[NDArray[Any]]:
        """Return arrays in the granted block. Returned as they are by the call that is being made, they are not copied."""
        offsets, nbytes = layout_of(shapes, dtypes)
        self._offered = self._arrays_in(self._block_of(nbytes), shapes, dtypes, offsets)
        return list(self._offered)

    def _answer(self, result: Any) -> None:
        """Send what the function returned."""
        if type(result) not in (list, tuple) or not all(map(_can_be_in_block, result)):
            try:
                content = _dumps(result)
            except Exception:  # no chunk: the parent says what it wants instead
                content = None
            if content is not None and len(content) > MAX_OTHER_NBYTES:
                content = None
            parts = result if type(result) in (list, tuple) else [result]
            kinds = [
                (part.dtype, part.ndim) if _can_be_in_block(part) else type(part).__qualname__ for part in parts[:MAX_KINDS]
            ]
            self._link.send((OTHER, content, kinds, parts is result, self._account.take()))
            return
        if sum(array.nbytes for array in result) < INLINE_BELOW_NBYTES:
            self._link.send((INLINE, [np.asarray(array) for array in result], self._account.take()))
            return
        shapes, dtypes = [array.shape for array in result], [array.dtype for array in result]
        offered = self._offered
        in_place = offered is not None and len(offered) == len(result)
        if in_place and offered is not None:
            in_place = all(array is other for array, other in zip(result, offered, strict=True))
        offsets, nbytes = layout_of(shapes, dtypes)
        if not in_place:
            if offered is not None:  # some of the arrays may lie in the block themselves
                result = [array.copy() if np.may_share_memory(array, offered[0].base) else array for array in result]
            targets = self._arrays_in(self._block_of(nbytes), shapes, dtypes, offsets)
            for target, array in zip(targets, result, strict=True):
                np.copyto(target, array, casting="no")
        block, self._granted = self._granted, None
        self._link.send((CHUNK, block, list(zip(shapes, dtypes, offsets, strict=True)), self._account.take()))
        self._is_served = True

    def _send_packed(self, arrays: Sequence[NDArray[Any]], seconds: float) -> None:
        self._link.send((INLINE, arrays, self._account.of_early_answer(seconds)))

    def _block_of(self, nbytes: int) -> memoryview:
        """Return the granted block; asks for one that is large enough, and waits for it. Raises OSError: no memory."""
        with self._account.waiting():
            while self._is_served and self._granted is None and self._refused is None:
                self._receive()  # it is on its way, or will be when the chunk before this one was put
        if self._refused is None and (self._granted is None or len(self._blocks[self._granted]) < nbytes):
            self._granted = None
            self._needs = True
            self._link.send((NEED, nbytes))
            while self._needs:
                self._receive()
        refused, self._refused = self._refused, None
        if refused is not None or self._granted is None:
            raise OSError(*(refused or ()))
        return self._blocks[self._granted]

    def _arrays_in(
        self, block: memoryview, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype[Any]], offsets: Sequence[int]
    ) -> list[NDArray[Any]]:
        return [np.ndarray(shape, dtype, block, offset) for shape, dtype, offset in zip(shapes, dtypes, offsets, strict=True)]

    def _receive(self) -> None:
        """Take in the next frames from the parent. Raises EOFError when there will be none."""
        for frame in self._link.receive():
            if frame[0] == GRANT:
                _, number, nbytes, is_new, is_needed, gone = frame
                if is_new:
                    descriptor = self._link.receive_descriptor()
                    try:
                        self._blocks[number] = map_block(descriptor, nbytes)
                    finally:
                        os.close(descriptor)
                for each in gone:
                    self._blocks.pop(each, None)
                self._decide(is_needed, number, None)
            elif frame[0] == REFUSE:
                self._decide(frame[3], None, (frame[1], frame[2]))
            elif frame[0] == SPECS:
                self._specs = frame[1]
            elif frame[0] == TRACE:
                self._account.trace(frame[1])
            else:
                self._todo.append(frame)

    def _decide(self, is_needed: bool, granted: int | None, refused: tuple[int, str] | None) -> None:
        """Take in what became of a block; what was sent before the parent read a NEED does not count."""
        if is_needed or not self._needs:
            self._granted, self._refused, self._needs = granted, refused, False


# What is no chunk is refused by the parent, who says what it is; of something large, its type must do.
MAX_OTHER_NBYTES = 64 * 1024
MAX_KINDS = 1000


def _can_be_in_block(array: Any) -> bool:
    """Whether this is plain values; a memory-mapped array, or another view of them, will do."""
    if not isinstance(array, np.ndarray) or isinstance(array, (np.ma.MaskedArray, np.matrix)):
        return False
    return not array.dtype.hasobject and array.dtype.itemsize > 0


def _dumps(value: Any) -> bytes:
    import cloudpickle

    return bytes(cloudpickle.dumps(value))


def serve(end: int, life: int) -> int:
    """Be a worker on these descriptors until the parent closes the pipe; return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # handled once, in the parent
    for descriptor in (end, life):  # not for what the function starts
        os.set_inheritable(descriptor, False)
    die_with_parent(life)
    faulthandler.enable()
    faulthandler.register(STACK_SIGNAL, all_threads=True)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    link = Link(socket.socket(fileno=end))
    try:
        started = time.monotonic()
        job: Job = link.receive()
        try:
            job.settle()
            random.seed()
            np.random.seed()
            worker = Worker(link, job)
            seed_late_comers()
            if job.worker_init_fun is not None:
                pickle.loads(job.worker_init_fun)(job.worker_id)  # noqa: S301
        except BaseException as error:
            link.send((*raised(error, _dumps), time.monotonic() - started))
            return 1
        link.send((READY, time.monotonic() - started))
        worker.run()
    except (EOFError, ConnectionError, BrokenPipeError):
        return 0
    return 0


def main(end: int, life: int, path: Sequence[str]) -> None:
    """Entry of a spawned worker."""
    sys.path[:] = path
    code = 1
    try:
        code = serve(end, life)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code and code is not error.code:
            sys.stderr.write(f"SystemExit: {error.code}\n")
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        # The function's daemon threads, or what it registered at exit, must not hold this process up.
        os._exit(code)
