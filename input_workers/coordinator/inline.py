"""`num_workers=0`: fetch and re-chunk in the trainer's own thread, for breakpoints and tests. A wish for a batch goes in,
calls are made until one is there."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.contracts import Chunk, FetchRequest
from input_workers.errors import Failure, LifecycleError
from input_workers.fetchers.chunk_check import ChunkCheck
from input_workers.fetchers.fetch_loop import Calls, fetch_loop
from input_workers.fetchers.recovery import Recovery
from input_workers.fetchers.threads import stack_of
from input_workers.flow.chunk_queue import ChunkQueue
from input_workers.flow.device_queue import DeviceQueue
from input_workers.flow.enqueuer import Enqueuer
from input_workers.lifecycle import StopSignal, seconds_left
from input_workers.metrics.fetcher_recorder import FetcherRecorder
from input_workers.metrics.timed import fetcher_here

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["InlineFetcher"]


class InlineFetcher:
    """The fetch loop and the enqueuer, driven by `provide`. One thread at a time."""

    pack_below_nbytes = 0  # a breakpoint shows chunks as they came

    def __init__(
        self,
        source: str,
        calls: Calls,
        check: ChunkCheck,
        chunks: ChunkQueue,
        enqueuer: Enqueuer,
        signal: StopSignal,
        recorder: FetcherRecorder,
        recovery: Recovery | None,
        nothing_left: Callable[[FetchRequest], object],
    ) -> None:
        self._source = source
        self._calls = calls
        self._check = check
        self._chunks = chunks
        self._enqueuer = enqueuer
        self._signal = signal
        self._recorder = recorder
        self._recovery = recovery
        self._nothing_left = nothing_left
        self._in_use = threading.Lock()  # held while foreign code runs, but never waited for
        self._user: threading.Thread | None = None
        self._wanted_by: DeviceQueue | None = None
        self._deadline = math.inf
        self._tried = False  # one call is made even where no time is given

    def provide(self, device: DeviceQueue, timeout_s: float) -> None:
        """Fetch until the device has a batch, the data end, a call fails, or no data came in time.

        Raises:
            LifecycleError: another thread, or the fetch function itself, is in here.
        """
        if not device.is_empty:
            return
        thread, started = threading.get_ident(), time.monotonic()
        if not self._in_use.acquire(blocking=False):
            raise LifecycleError(
                f"source {self._source!r}: with num_workers=0 one thread reads at a time, and not from its own fetch function"
            )
        try:
            device.recorder.begin_wait(thread, started)
            self._user = threading.current_thread()
            self._wanted_by = device
            device.asked()
            self._deadline = time.monotonic() + timeout_s
            self._tried = False
            self._enqueuer.deliver(self._chunks.take(0))  # end marks of epochs that an earlier run delivered
            with fetcher_here(self._recorder):
                ended = fetch_loop(
                    self._source,
                    self._calls,
                    self._check,
                    self,
                    self._recorder,
                    self._idle,
                    self._fail,
                    np.array,
                    self._recovery,
                    None,
                    self._skip,
                )
            if ended or self._signal.failure is not None:
                self._chunks.close()
                self._enqueuer.finish()
                self._enqueuer.put_down()
            elif self._signal.stopping:
                self._enqueuer.put_down()
        finally:
            self._user = None
            self._in_use.release()
            now = time.monotonic()
            device.recorder.end_wait(thread, now)
            if (trace := device.recorder.trace) is not None:
                trace.whole.trainer().add("waiting for a batch", started, now)

    def join(self, deadline: float) -> list[tuple[str, str]]:
        """Wait until nobody is in `provide`, and account for what is held; return (name, stack) of who still is."""
        user = self._user
        if user is threading.current_thread() or not self._in_use.acquire(timeout=seconds_left(deadline)):
            return [(user.name, stack_of(user))] if user is not None else []
        try:
            self._enqueuer.put_down()
        finally:
            self._in_use.release()
        return []

    def pack(self, arrays: Sequence[NDArray[Any]], rows: int, nbytes: int) -> bool:
        """Never packs."""
        return False

    def offer(self, chunk: Chunk) -> bool:
        """Deliver the chunk at once."""
        self._tried = True
        if self._signal.stopping or not self._chunks.put(chunk):
            return False
        self._enqueuer.deliver(self._chunks.take(0))
        return True  # it was taken, whatever became of it: `closed` says whether to go on

    def put(self, chunk: Chunk) -> bool:
        """An offer is refused only when the run has ended."""
        return False

    @property
    def closed(self) -> bool:
        """Whether to stop fetching, for now or for good."""
        assert self._wanted_by is not None  # noqa: S101  set by provide
        if not self._wanted_by.is_empty or self._signal.stopping or self._signal.failure is not None:
            return True
        return self._tried and time.monotonic() >= self._deadline

    def _idle(self, seconds: float) -> None:
        self._tried = True
        self._signal.ended.wait(min(seconds, max(0.0, self._deadline - time.monotonic())))

    def _skip(self, request: FetchRequest) -> None:
        self._tried = True
        self._nothing_left(request)
        self._enqueuer.deliver(self._chunks.take(0))

    def _fail(self, failure: Failure, request: FetchRequest | None) -> None:
        if failure.cause is not None and not isinstance(failure.cause, Exception):
            raise failure.cause  # Ctrl-C in the trainer's own thread is the trainer's
        self._signal.fail(failure)
