"""What runs in a worker process: requests come in by the pipe, the fetch function is called, its arrays go into blocks."""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import fcntl
import os
import pickle
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.contracts import ArraySpec, FetchRequest
from input_workers.errors import EndOfData
from input_workers.fetchers.frames import (
    CHUNK,
    END,
    GRANT,
    INLINE,
    INLINE_BELOW_NBYTES,
    NEED,
    READY,
    REQUEST,
    SPECS,
    Frame,
    Link,
    raised,
)
from input_workers.fetchers.packed_calls import SENT, PackedCalls
from input_workers.leases import ALIGNMENT_BYTES, map_block

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Job", "layout_of", "main", "serve"]

STACK_SIGNAL = signal.SIGUSR2  # shows the stacks of all threads on stderr, also while C code holds the GIL


class Job:
    """What a worker is for. Sent to it once, as its first frame.

    Args:
        fetch: a plain function, or `fetch(rows, request)` of a Stream's plan, pickled by cloudpickle.
        worker_init_fun: called once, with the worker's id, before the first call; pickled too.
        worker_id: of this worker.
        is_stream: whether requests will come, or calls.
        axes: the batch axis of each input.
        packs: small chunks of a plain function may be sent as one.
    """

    __slots__ = ("axes", "fetch", "is_stream", "packs", "worker_id", "worker_init_fun")

    def __init__(
        self,
        fetch: bytes,
        worker_init_fun: bytes | None,
        worker_id: int,
        is_stream: bool,
        axes: Sequence[int],
        packs: bool,
    ) -> None:
        self.fetch = fetch
        self.worker_init_fun = worker_init_fun
        self.worker_id = worker_id
        self.is_stream = is_stream
        self.axes = tuple(axes)
        self.packs = packs


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


class Worker:
    """The loop of a worker process. Belongs to one thread."""

    def __init__(self, link: Link, job: Job) -> None:
        self.job = job
        self._link = link
        self._fetch: Callable[..., Any] = pickle.loads(job.fetch)  # noqa: S301  cloudpickle's, from our parent
        self._todo: collections.deque[Frame] = collections.deque()
        self._blocks: dict[int, memoryview] = {}
        self._granted: int | None = None
        self._specs: list[ArraySpec] | None = None
        self._offered: list[NDArray[Any]] | None = None
        self._ended = False
        self._calls = PackedCalls(self._fetch, job.worker_id, self._send_packed)

    def run(self) -> None:
        """Serve until the parent closes the pipe."""
        while True:
            while not self._todo:
                self._receive()
            frame = self._todo.popleft()
            started = time.monotonic()
            try:
                if frame[0] == REQUEST:
                    request = _Request(self, *frame[1:])
                    _seed(request.key)
                    result = self._fetch(request.rows, request)
                elif self._ended:  # the function is not called again
                    raise EndOfData
                elif self.job.packs:
                    result = self._calls.next(frame[1])
                else:
                    result = self._fetch(self.job.worker_id, frame[1])
                seconds = time.monotonic() - started
                if result is not SENT:
                    self._answer(result, seconds)
            except (BrokenPipeError, ConnectionError, EOFError) as error:
                if self._link.is_gone():
                    raise EOFError from error
                self._link.send((*raised(error, _dumps), time.monotonic() - started))
            except SystemExit:
                raise
            except EndOfData as error:
                self._ended = True
                seconds = time.monotonic() - started
                self._link.send((END, seconds) if not self.job.is_stream else (*raised(error, _dumps), seconds))
            except BaseException as error:
                self._link.send((*raised(error, _dumps), time.monotonic() - started))
            self._offered = result = request = None  # type: ignore[assignment]

    def offer(self, rows: int) -> list[NDArray[Any]] | None:
        """Return arrays in the granted block for so many rows; None while the specs are not known."""
        if self._offered is None:
            if self._specs is None:
                return None
            shapes = [spec.batch_shape(rows, axis) for spec, axis in zip(self._specs, self.job.axes, strict=True)]
            dtypes = [spec.dtype for spec in self._specs]
            offsets, nbytes = layout_of(shapes, dtypes)
            if not nbytes:
                return None
            self._offered = self._arrays_in(self._block_of(nbytes), shapes, dtypes, offsets)
        return list(self._offered)

    def _answer(self, result: Any, seconds: float) -> None:
        """Send what the function returned."""
        is_chunk = type(result) in (list, tuple) and all(type(each) is np.ndarray for each in result)
        is_chunk = is_chunk and not any(array.dtype.hasobject for array in result)
        if not is_chunk or sum(array.nbytes for array in result) < INLINE_BELOW_NBYTES:
            try:
                self._link.send((INLINE, result, seconds))
            except (pickle.PicklingError, TypeError, AttributeError):  # no chunk: the parent says what it wants instead
                self._link.send((INLINE, _Unpicklable(type(result).__qualname__), seconds))
            return
        shapes, dtypes = [array.shape for array in result], [array.dtype for array in result]
        offered = self._offered
        in_place = offered is not None and len(offered) == len(result)
        if in_place and offered is not None:
            in_place = all(array is other for array, other in zip(result, offered, strict=True))
        offsets, nbytes = layout_of(shapes, dtypes)
        if not in_place:
            targets = self._arrays_in(self._block_of(nbytes), shapes, dtypes, offsets)
            if offered is not None:  # some of the arrays may lie in the block themselves
                result = [array.copy() if np.may_share_memory(array, offered[0].base) else array for array in result]
            for target, array in zip(targets, result, strict=True):
                np.copyto(target, array, casting="no")
        block, self._granted = self._granted, None
        self._link.send((CHUNK, block, list(zip(shapes, dtypes, offsets, strict=True)), seconds))

    def _send_packed(self, arrays: Sequence[NDArray[Any]], seconds: float) -> None:
        self._link.send((INLINE, arrays, seconds))

    def _block_of(self, nbytes: int) -> memoryview:
        """Return the granted block; asks for one that is large enough, and waits for it."""
        while self._granted is None or len(self._blocks[self._granted]) < nbytes:
            if self._granted is not None or not self._is_waiting_for_grant(nbytes):
                self._granted = None
                self._link.send((NEED, nbytes))
            self._receive()
        return self._blocks[self._granted]

    def _is_waiting_for_grant(self, nbytes: int) -> bool:
        """Whether the parent, who grants a block by itself once it knows how large, will do so."""
        return any(len(block) >= nbytes for block in self._blocks.values())

    def _arrays_in(
        self, block: memoryview, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype[Any]], offsets: Sequence[int]
    ) -> list[NDArray[Any]]:
        return [np.ndarray(shape, dtype, block, offset) for shape, dtype, offset in zip(shapes, dtypes, offsets, strict=True)]

    def _receive(self) -> None:
        """Take in the next frames from the parent. Raises EOFError when there will be none."""
        for frame in self._link.receive():
            if frame[0] == GRANT:
                _, number, nbytes, is_new = frame
                if is_new:
                    descriptor = self._link.receive_descriptor()
                    try:
                        self._blocks[number] = map_block(descriptor, nbytes)
                    finally:
                        os.close(descriptor)
                    self._forget_smaller(nbytes)
                self._granted = number
            elif frame[0] == SPECS:
                self._specs = frame[1]
            else:
                self._todo.append(frame)

    def _forget_smaller(self, nbytes: int) -> None:
        for number in [number for number, block in self._blocks.items() if len(block) < nbytes]:
            del self._blocks[number]


class _Unpicklable:
    """Stands for a result that is no chunk and cannot be sent."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return self.kind


def _dumps(value: Any) -> bytes:
    import cloudpickle

    return bytes(cloudpickle.dumps(value))


def _seed(key: tuple[int, ...]) -> None:
    """Seed the random numbers that a function may use without asking, by the request alone."""
    words = np.random.SeedSequence((*key, SEED_OF_GLOBALS)).generate_state(2)
    random.seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words)
    for name, seed in (("torch", "manual_seed"), ("tensorflow", "random")):
        module = sys.modules.get(name)
        if module is not None:
            with contextlib.suppress(AttributeError):  # half imported
                target = getattr(module, seed)
                (target if name == "torch" else target.set_seed)(int(words[0]))


# Unlike any seed of request.rng's own key, which has three or four numbers.
SEED_OF_GLOBALS = 0x5EED


def _die_with_parent(life: int) -> None:
    """Have the kernel kill this process when the parent's end of the silent pipe closes, whatever Python is doing then."""
    if not hasattr(fcntl, "F_SETSIG"):  # not Linux: the closed pipe of requests ends it between two calls
        return
    # A description of its own: signals go to whom the last F_SETOWN on it named.
    own = os.open(f"/proc/self/fd/{life}", os.O_RDONLY | os.O_NONBLOCK)
    os.close(life)
    fcntl.fcntl(own, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(own, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(own, fcntl.F_SETFL, fcntl.fcntl(own, fcntl.F_GETFL) | os.O_ASYNC)
    with contextlib.suppress(BlockingIOError):
        if not os.read(own, 1):  # it was closed before we listened
            os.kill(os.getpid(), signal.SIGKILL)


def serve(end: int, life: int) -> int:
    """Be a worker on these descriptors until the parent closes the pipe; return the exit code."""
    _die_with_parent(life)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # handled once, in the parent
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
            random.seed()
            np.random.seed()
            worker = Worker(link, job)
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
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        # The function's daemon threads, or what it registered at exit, must not hold this process up.
        os._exit(code)
