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
from typing import Any, Literal

from input_workers.contracts import ArraySpec, FetcherBackend
from input_workers.coordinator import exit_hook
from input_workers.coordinator.auto import AutoWorkers
from input_workers.coordinator.fetch_side import FetchSide
from input_workers.coordinator.inline import InlineFetcher
from input_workers.coordinator.settings import DeviceSettings, SourceSettings
from input_workers.cores import usable_cores
from input_workers.errors import EndOfData, Failure, LifecycleError, QueueClosed
from input_workers.fetchers.chunk_check import ChunkCheck, SpecBook
from input_workers.fetchers.processes import ProcessFetchers
from input_workers.fetchers.threads import join_threads
from input_workers.flow.device import Device, Target
from input_workers.flow.device_queue import DeviceQueue
from input_workers.flow.enqueuer import Enqueuer
from input_workers.lifecycle import StopSignal
from input_workers.metrics.recorder import SourceRecorder
from input_workers.metrics.snapshot import StuckThread
from input_workers.metrics.windows import Marks
from input_workers.policy import Quarantine
from input_workers.sources.state import Position

__all__ = ["Run"]


class Run:
    """Wires the parts of a source with callables, and starts and ends them.

    Args:
        settings: of the source.
        devices: where to deliver, by name.
        worker_ids: one for each fetcher; none: everything runs in the trainer's thread. "auto" appends to them.
        working: how many of these begin; the others rest at first.
        new_worker_id: returns an id that nobody has.
        book: the specs of the source, kept from run to run.
        recorder: of the source, kept from run to run.
        make_batch: builds what the trainer gets.
        quarantine: of the source, kept from run to run.
        position: where a Stream begins.
    """

    # Invariant under _lock: `_threads_left` counts the enqueuer, the fetcher group and the thread of "auto" until each has
    # ended.

    def __init__(
        self,
        settings: SourceSettings,
        devices: Mapping[str, DeviceSettings],
        worker_ids: list[int],
        working: int,
        new_worker_id: Callable[[], int],
        book: SpecBook,
        recorder: SourceRecorder,
        make_batch: Callable[[Sequence[Any]], Any],
        quarantine: Quarantine,
        position: Position,
    ) -> None:
        self.forked = False
        self.cores = 1.0
        self.started = time.monotonic()
        self.settings = settings
        self.recorder = recorder
        self.book = book
        self._lock = threading.Lock()
        self._closed = False
        self.signal = StopSignal(queue.SimpleQueue())
        batch_size = max(device.batch_size for device in devices.values())
        inline = not worker_ids
        self._worker_ids = worker_ids
        self.fetching = FetchSide(settings, working, batch_size, book, recorder, self.signal, quarantine, position)
        self.chunks = self.fetching.chunks
        self.signal.close_input = self._close_input
        self.devices = {
            name: self._device(number, name, device, make_batch, inline)
            for number, (name, device) in enumerate(devices.items())
        }
        progress = self.fetching.follow([device.queue.log for device in self.devices.values()])
        for each in self.devices.values():
            each.queue.progress = progress
        recorders = [recorder.fetcher(worker_id) for worker_id in worker_ids or [0]]
        self._fetcher_recorders, resting = (recorders, []) if inline else (recorders[:working], recorders[working:])
        self._fetchers: FetcherBackend | None = None
        self.enqueuer = Enqueuer(
            settings.name,
            self.chunks,
            list(self.devices.values()),
            batch_axes=settings.batch_axes,
            specs=book.known,
            last_batch=settings.last_batch,
            rebatch=settings.rebatch,
            has_epochs=self.fetching.keeps_epochs,
            signal=self.signal,
            recorder=recorder,
            check_calls=self._check_calls,
        )
        self._inline: InlineFetcher | None = None
        if inline:
            self._inline = InlineFetcher(
                settings.name,
                self.fetching.calls,
                ChunkCheck(book),
                self.chunks,
                self.enqueuer,
                self.signal,
                self._fetcher_recorders[0],
                self.fetching.recovery,
                self.fetching.nothing_left,
            )
        else:
            self._fetchers = self.fetching.backend(self._fetcher_recorders, resting, self._input_ended)
        self._thread = threading.Thread(target=self._enqueue, name=f"enqueuer-{settings.name}", daemon=True)
        self.auto: AutoWorkers | None = None
        if settings.num_workers == "auto" and self._fetchers is not None:
            self.auto = AutoWorkers(
                settings,
                working,
                self._fetchers,
                recorder,
                book,
                worker_ids,
                new_worker_id,
                self.fetching.resize,
                self.signal,
                self._thread_ended,
            )
        self._threads_left = 2 if self.auto is None else 3
        self._marks: Marks | None = None

    def _device(
        self, number: int, name: str, device: DeviceSettings, make_batch: Callable[[Sequence[Any]], Any], inline: bool
    ) -> Device:
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
            number=number,
        )

    @property
    def workers(self) -> int:
        """How many fetchers there should be."""
        return len(self._worker_ids) if self.auto is None else self.auto.workers

    def start(self) -> None:
        """Start every thread, or none. Raises what starting a thread raises, after undoing what was started."""
        self.book.begin()
        now = time.monotonic()
        self.recorder.has_enqueuer = self._fetchers is not None
        self._marks = self.recorder.begin(now)
        if self._fetchers is None:
            inline = self._fetcher_recorders[0]
            inline.worked = inline.worked[0], now
            return
        exit_hook.remember(self)
        try:
            self._fetchers.start()  # first: worker processes may be forked as long as there are no threads
            self._thread.start()
            if self.auto is not None:
                self.auto.thread.start()
        except BaseException:
            others = [self._thread] if self.auto is None else [self._thread, self.auto.thread]
            with self._lock:  # what has not begun will not report its end
                self._threads_left -= sum(thread.ident is None for thread in others)
            self.stop(time.monotonic() + 5.0)
            raise

    def next_batch(self, device: Device, timeout_s: float, as_numpy: bool = False) -> Any:
        """Return the next batch of a device; see `Device.next_batch`."""
        if self.forked:
            raise LifecycleError(
                f"source {self.settings.name!r}: this process was forked from the one that reads it; make a source of its own"
            )
        if self._inline is not None:
            self._inline.provide(device.queue, timeout_s)
            if self.signal.ended.is_set():
                self._end_windows()
            timeout_s = 0.0
        return device.next_batch(timeout_s, as_numpy)

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
        device = self.devices[name]
        self._abort_device(device)
        if self.fetching.progress is not None:
            self.fetching.progress.drop_device(device.number)
        if all(device.queue.ended for device in self.devices.values()):
            self.request_stop()

    def retarget(self, name: str, device: DeviceSettings) -> None:
        """Let the next slot that is begun for this device have another feed or batch size."""
        self.devices[name].target = Target(device.make_feed(), device.batch_size)
        largest = max(each.target.batch_size for each in self.devices.values())
        self.fetching.retarget(largest)
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
        self._end_windows()
        self.fetching.close()
        self.recorder.drop("stopped", self.chunks.abort())
        self.book.end()
        self.signal.ended.set()
        if self._fetchers is not None:
            self._fetchers.shut_down()
        for device in self.devices.values():
            self._abort_device(device)

    def stop(self, deadline: float) -> tuple[tuple[StuckThread, ...], tuple[str, ...]]:
        """Abort and wait until `time.monotonic()` reaches the deadline; return (what is stuck, what went wrong)."""
        if self.forked:
            return (), ()
        self.abort()
        backend = self._inline if self._inline is not None else self._fetchers
        assert backend is not None  # noqa: S101  one of them fetches
        adding = [self.auto.thread] if self.auto is not None and self.auto.thread.ident is not None else []
        stuck = join_threads(adding, deadline)  # first: nobody is added any more
        stuck += backend.join(deadline)
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

    @property
    def state(self) -> Literal["starting", "running", "stopped"]:
        """Whether batches come: not yet, now, or no more."""
        if self.signal.stopping or (self.signal.ended.is_set() and all(each.queue.is_over for each in self.devices.values())):
            return "stopped"
        return "running" if self._marks is not None and self._marks.has_begun else "starting"

    @property
    def block_bytes(self) -> int:
        """The shared memory of chunks from worker processes; 0 with threads."""
        return self._fetchers.block_bytes if isinstance(self._fetchers, ProcessFetchers) else 0

    def _close_input(self) -> None:
        """No chunk will be taken any more."""
        self.fetching.close()
        self.chunks.close()
        self.book.end()

    def _input_ended(self) -> None:
        """The last fetcher has ended."""
        self._close_input()
        self._thread_ended()

    def _enqueue(self) -> None:
        self.cores = usable_cores()  # in a thread of ours: Ctrl-C would leave its files open
        self.enqueuer.run()
        self._end_windows()
        if self.signal.stopping:
            self.abort()
        self._thread_ended()

    def _end_windows(self) -> None:
        if self._marks is not None:
            self.recorder.end(self._marks, time.monotonic())

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
