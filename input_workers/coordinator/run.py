"""One run of a source, from start to stop: its queues, fetchers and enqueuer, and the way they end.

Threads, the exit hook and the reporter hold a run; none of them holds a coordinator, so a dropped coordinator is collected
and its run ends.
"""

from __future__ import annotations

import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from input_workers.contracts import ArraySpec, FetcherBackend
from input_workers.coordinator import exit_hook
from input_workers.coordinator.inline import InlineFetcher
from input_workers.coordinator.settings import DeviceSettings, SourceSettings
from input_workers.errors import EndOfData, Failure, LifecycleError, QueueClosed
from input_workers.fetchers.chunk_check import ChunkCheck, SpecBook
from input_workers.fetchers.fetch_loop import FunctionCalls, fetch_loop
from input_workers.fetchers.threads import ThreadFetchers, join_threads
from input_workers.flow.chunk_queue import ChunkQueue
from input_workers.flow.device import Device, Target
from input_workers.flow.device_queue import DeviceQueue
from input_workers.flow.enqueuer import Enqueuer
from input_workers.leases import CopyPool, SlotPool
from input_workers.lifecycle import StopSignal
from input_workers.metrics.recorder import FetcherRecorder, SourceRecorder
from input_workers.metrics.snapshot import StuckThread
from input_workers.sources.stream import Stream, StreamCalls

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Run"]

# Free slabs of one size kept for copies of chunks: enough for a queue of small batches to be emptied at once.
COPY_SLABS_KEPT = 32

# A chunk this small costs less to copy than to hand over. Measured: handing one over costs 1.5 us, which copies 8 KB.
PACK_BELOW_NBYTES = 8192 + 1


class Run:
    """Wires the parts of a source with callables, and starts and ends them.

    Args:
        settings: of the source.
        devices: where to deliver, by name.
        worker_ids: one for each fetcher; none: everything runs in the trainer's thread.
        book: the specs of the source, kept from run to run.
        recorder: of the source, kept from run to run.
        make_batch: builds what the trainer gets.
    """

    # Invariant under _lock: `_threads_left` counts the enqueuer and the fetcher group until each has ended.

    def __init__(
        self,
        settings: SourceSettings,
        devices: Mapping[str, DeviceSettings],
        worker_ids: Sequence[int],
        book: SpecBook,
        recorder: SourceRecorder,
        make_batch: Callable[[Sequence[Any]], Any],
    ) -> None:
        self.forked = False
        self.started = time.monotonic()
        self.settings = settings
        self.recorder = recorder
        self.book = book
        self._lock = threading.Lock()
        self._closed = False
        self.signal = StopSignal(queue.SimpleQueue())
        batch_size = max(device.batch_size for device in devices.values())
        stream = settings.fetch_fun if isinstance(settings.fetch_fun, Stream) else None
        inline = not worker_ids
        if stream is not None:
            self.calls: StreamCalls | FunctionCalls = StreamCalls(stream, batch_size, self._lend)
            requests_per_epoch = self.calls.requests_per_epoch if stream.epoch_end == "break" else None
        else:
            assert not isinstance(settings.fetch_fun, Stream)  # noqa: S101
            self.calls = FunctionCalls(settings.fetch_fun, batch_size)
            requests_per_epoch = None
        self._copies = CopyPool(COPY_SLABS_KEPT)
        self._out_pools: dict[int, SlotPool] = {}
        self._out_keep = len(worker_ids) + 2
        self.chunks = ChunkQueue(
            settings.max_buffered_batches * (batch_size if settings.rebatch else 1),
            settings.max_buffered_bytes,
            self.signal.wake,
            by_rows=settings.rebatch,
            requests_per_epoch=requests_per_epoch,
            pack_below_nbytes=PACK_BELOW_NBYTES if settings.rebatch and not any(settings.batch_axes) else 0,
        )
        self.signal.close_input = self._close_input
        self.devices = {name: self._device(name, device, make_batch, inline) for name, device in devices.items()}
        self._fetcher_recorders = [recorder.fetcher(worker_id) for worker_id in worker_ids or [0]]
        self._fetchers: FetcherBackend | None = None
        self.enqueuer = Enqueuer(
            settings.name,
            self.chunks,
            list(self.devices.values()),
            batch_axes=settings.batch_axes,
            specs=book.known,
            last_batch=settings.last_batch,
            rebatch=settings.rebatch,
            has_epochs=requests_per_epoch is not None,
            signal=self.signal,
            recorder=recorder,
            check_calls=self._check_calls,
        )
        self._inline: InlineFetcher | None = None
        if inline:
            self._inline = InlineFetcher(
                settings.name,
                self.calls,
                ChunkCheck(book),
                self.chunks,
                self.enqueuer,
                self.signal,
                self._fetcher_recorders[0],
            )
        else:
            self._fetchers = ThreadFetchers(
                settings.name,
                self._fetcher_recorders,
                self._fetch,
                self.signal.fail,
                self._input_ended,
                settings.fetch_timeout_s,
            )
        self._thread = threading.Thread(target=self._enqueue, name=f"enqueuer-{settings.name}", daemon=True)
        self._threads_left = 2

    def _device(self, name: str, device: DeviceSettings, make_batch: Callable[[Sequence[Any]], Any], inline: bool) -> Device:
        depth = self.settings.device_queue_depth
        return Device(
            name,
            # In the trainer's own thread nobody could wait for room.
            DeviceQueue(sys.maxsize if inline else depth, self.signal.wake, self.recorder.devices[name]),
            Target(device.make_feed(), device.batch_size),
            make_batch,
            self.settings.batch_axes,
            self._receive_failed,
            # Free slots kept: what the queue holds, one in the trainer's hands, one in the making.
            keep_slots=depth + 2,
        )

    def start(self) -> None:
        """Start every thread, or none. Raises what starting a thread raises, after undoing what was started."""
        self.book.begin()
        if self._fetchers is None:
            return
        exit_hook.remember(self)
        try:
            self._thread.start()
            self._fetchers.start()
        except BaseException:
            self._threads_left = 1  # the fetcher group will not report its end
            self.stop(time.monotonic() + 5.0)
            raise

    def next_batch(self, device: Device, timeout_s: float) -> Any:
        """Return the next batch of a device; see `Device.next_batch`."""
        if self.forked:
            raise LifecycleError(
                f"source {self.settings.name!r}: this process was forked from the one that reads it; make a source of its own"
            )
        if self._inline is not None:
            self._inline.provide(device.queue, timeout_s)
            timeout_s = 0.0
        return device.next_batch(timeout_s)

    def await_specs(self, timeout_s: float) -> tuple[ArraySpec, ...]:
        """Return the specs, waiting for the first chunk; see `DataInputCoordinator.specs`."""
        if self._inline is not None:
            self._inline.provide(next(iter(self.devices.values())).queue, timeout_s)
            timeout_s = 0.0
        try:
            return self.book.wait(timeout_s)
        except EndOfData:
            if self.signal.failure is not None:
                raise self.signal.failure.exception() from self.signal.failure.cause
            if self.signal.stopping:
                raise self._stopped() from None
            raise

    def stop_device(self, name: str) -> None:
        """Take a device out of the rotation; with the last one, the run ends."""
        self._abort_device(self.devices[name])
        if all(device.queue.ended for device in self.devices.values()):
            self.request_stop()

    def retarget(self, name: str, device: DeviceSettings) -> None:
        """Let the next slot that is begun for this device have another feed or batch size."""
        self.devices[name].target = Target(device.make_feed(), device.batch_size)
        largest = max(each.target.batch_size for each in self.devices.values())
        self.calls.batch_size = largest
        if self.settings.rebatch:
            self.chunks.max_weight = self.settings.max_buffered_batches * largest
        self.signal.wake.put(None)  # what waits may be a batch now

    def has_thread(self, thread: threading.Thread) -> bool:
        """Whether a stop waits for this thread."""
        return thread is self._thread or (self._fetchers is not None and self._fetchers.has_thread(thread))

    def request_stop(self) -> None:
        """Ask every thread to end. Takes no lock: a finalizer calls it."""
        self.signal.request_stop()

    def abort(self) -> None:
        """End both queues: what waits in them is `stopped`, and whoever waits for them is woken. Idempotent."""
        if self.forked:  # a lock may be held for ever by a thread that only the parent has
            return
        self.signal.request_stop()
        self.recorder.drop("stopped", self.chunks.abort())
        self.book.end()
        self.signal.ended.set()
        for device in self.devices.values():
            self._abort_device(device)

    def stop(self, deadline: float) -> tuple[tuple[StuckThread, ...], tuple[str, ...]]:
        """Abort and wait until `time.monotonic()` reaches the deadline; return (what is stuck, what went wrong)."""
        if self.forked:
            return (), ()
        self.abort()
        backend = self._inline if self._inline is not None else self._fetchers
        assert backend is not None  # noqa: S101  one of them fetches
        stuck = backend.join(deadline)
        if self._thread.ident is not None:
            stuck += join_threads([self._thread], deadline)
        wrong: list[str] = []
        with self._lock:
            first = not self._closed and not stuck
            self._closed = self._closed or first
        if first:
            for device in self.devices.values():
                wrong += [f"{device.name}: its feed could not be closed: {error!r}" for error in device.close()]
            exit_hook.forget(self)
        return tuple(StuckThread(name, stack) for name, stack in stuck), tuple(wrong)

    def _abort_device(self, device: Device) -> None:
        self.recorder.drop("stopped", device.queue.abort(self._stopped))

    def _stopped(self) -> Exception:
        error = QueueClosed(f"source {self.settings.name!r} was stopped")
        failure = self.signal.failure
        if failure is not None:
            error.__cause__ = failure.exception()
        return error

    def _fetch(self, recorder: FetcherRecorder) -> None:
        fetch_loop(
            self.settings.name,
            self.calls,
            ChunkCheck(self.book),
            self.chunks,
            recorder,
            self.signal.ended.wait,
            self.signal.fail,
            self._copies.copy,
        )

    def _close_input(self) -> None:
        """No chunk will be taken any more."""
        self.chunks.close()
        self.book.end()

    def _input_ended(self) -> None:
        """The last fetcher has ended."""
        self._close_input()
        self._thread_ended()

    def _enqueue(self) -> None:
        self.enqueuer.run()
        if self.signal.stopping:
            self.abort()
        self._thread_ended()

    def _thread_ended(self) -> None:
        with self._lock:
            self._threads_left -= 1
            left = self._threads_left
        if not left:
            exit_hook.forget(self)

    def _receive_failed(self, failure: Failure, rows: int) -> None:
        self.recorder.drop("device_error", rows)
        self.signal.fail(failure)

    def _check_calls(self, now: float) -> float:
        return self._fetchers.check_calls(now) if self._fetchers is not None else math.inf

    def _lend(self, rows: int) -> list[NDArray[Any]] | None:
        """Return memory for a request's rows, once the specs are known."""
        specs = self.book.specs
        if specs is None:
            return None
        pool = self._out_pools.get(rows)
        if pool is None:
            pool = self._out_pools.setdefault(rows, SlotPool(specs, self.settings.batch_axes, rows, self._out_keep))
        return list(pool.lease().arrays)
