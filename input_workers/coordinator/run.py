"""One run of a source, from start to stop: its queues, fetchers and enqueuer, and the way they end.

Threads, the exit hook and the reporter hold a run; none of them holds a coordinator, so a dropped coordinator is collected
and its run ends.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Literal

from input_workers.contracts import ArraySpec, DeviceFeed
from input_workers.coordinator import exit_hook
from input_workers.coordinator.auto import AutoWorkers
from input_workers.coordinator.fetch_side import FetchSide, SourceParts
from input_workers.coordinator.settings import DeviceSettings
from input_workers.cores import usable_cores
from input_workers.errors import EndOfData, Failure, LifecycleError, QueueClosed, SourceFailed, WaitTimeout
from input_workers.fetchers.inline import InlineFetchers
from input_workers.fetchers.threads import ThreadFetchers, join_threads
from input_workers.flow.device import Device, Target
from input_workers.flow.device_queue import DeviceQueue
from input_workers.flow.enqueuer import Enqueuer
from input_workers.lifecycle import StopSignal
from input_workers.metrics.snapshot import StuckThread
from input_workers.metrics.windows import Marks
from input_workers.sources.state import Position

__all__ = ["Run"]


class Run:
    """Wires the parts of a source, and starts and ends them.

    Args:
        parts: what the source keeps from run to run.
        devices: where to deliver, with the feeds that were made for them, by name.
        workers: how many fetchers are at work at first; the others rest.
        position: where a Stream begins.
    """

    # Invariant under _lock: `_threads_left` counts the enqueuer, the fetcher group and the thread of "auto" until each has
    # ended.

    def __init__(
        self,
        parts: SourceParts,
        devices: Mapping[str, tuple[DeviceSettings, DeviceFeed]],
        workers: int,
        position: Position,
    ) -> None:
        settings = self.settings = parts.settings
        self.parts = parts
        self.forked = False
        self.cores = 1.0
        self.started = time.monotonic()
        self.recorder = parts.recorder
        self.book = parts.book
        self._lock = threading.RLock()
        self._closed = False
        self.signal = StopSignal(queue.SimpleQueue())
        batch_size = max(device.batch_size for device, _ in devices.values())
        self.is_inline = not parts.worker_ids
        self.fetching = FetchSide(parts, workers, batch_size, self.signal, position)
        self.assembly = self.fetching.assembly
        self.signal.close_input = self._close_input
        self.devices = {
            name: self._device(number, name, device, feed) for number, (name, (device, feed)) in enumerate(devices.items())
        }
        progress = self.fetching.follow([device.queue.log for device in self.devices.values()])
        ended = self.fetching.ended_devices(len(self.devices))
        for each in self.devices.values():
            each.queue.progress = progress
            each.sits_out = each.number in ended
        devices_in_order = list(self.devices.values())
        self.enqueuer = Enqueuer(
            self.fetching.rules, self.assembly, devices_in_order, lambda: self.book.specs, self.signal, self.recorder
        )
        self._fetchers = self._make_fetchers(workers)
        self._thread = threading.Thread(target=self._enqueue, name=f"enqueuer-{settings.name}", daemon=True)
        self.auto: AutoWorkers | None = None
        if settings.num_workers == "auto":
            self.auto = AutoWorkers(parts, workers, self._fetchers, self.signal, self.fetching.resize, self._thread_ended)
        self._threads_left = 2 if self.auto is None else 3
        self._marks: Marks | None = None

    def _make_fetchers(self, workers: int) -> ThreadFetchers:
        """Return what runs the fetchers. Raises ConfigError: the function cannot be sent to processes."""
        parts, context = self.parts, self.fetching.context
        recorders = [self.recorder.fetcher(worker_id) for worker_id in parts.worker_ids or [0]]
        if self.is_inline:
            fetchers = InlineFetchers(context, recorders[0], self._input_ended, self._nudge, self.assembly.await_sent)
            for device in self.devices.values():
                device.queue.serve = fetchers.calls.serve
            return fetchers
        return self.settings.fetchers.make_backend(context, recorders[:workers], recorders[workers:], self._input_ended)

    def _device(self, number: int, name: str, device: DeviceSettings, feed: DeviceFeed) -> Device:
        # With num_workers=0 no batch is made ahead of a trainer, and one must not wait for room on another device.
        depth = sys.maxsize if self.is_inline else self.settings.device_queue_depth
        queue_of_device = DeviceQueue(depth, self.signal.wake, self.recorder.devices[name])
        return Device(name, number, queue_of_device, self._target(device, feed), self.parts.make_batch, self._receive_failed)

    def _target(self, device: DeviceSettings, feed: DeviceFeed) -> Target:
        # Free slots that are kept: what the window and the queue hold, one in the trainer's hands, one that is being sent.
        keep_slots = self.settings.max_buffered_batches + self.settings.device_queue_depth + 2
        return Target(feed, device.batch_size, self.settings.batch_axes, keep_slots)

    @property
    def workers(self) -> int:
        """How many fetchers there should be."""
        return len(self.parts.worker_ids) if self.auto is None else self.auto.workers

    def start(self) -> None:
        """Start every thread, or none. Raises what starting a thread raises, after undoing what was started."""
        if self.signal.stopping:  # stopped before it was started
            return
        self.book.begin()
        self._marks = self.recorder.begin(time.monotonic())
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
        return device.next_batch(timeout_s, as_numpy)

    def await_specs(self, timeout_s: float) -> tuple[ArraySpec, ...]:
        """Return the specs, waiting for the first chunk; see `DataInputCoordinator.specs`."""
        try:
            if self.is_inline and self.book.specs is None:
                self._make_first_batch(timeout_s)
                timeout_s = 0.0
            return self.book.wait(timeout_s)
        except EndOfData:
            if self.signal.failure is not None:
                raise self.signal.failure.exception() from self.signal.failure.cause
            if self.signal.stopping:
                raise self._stopped() from None
            raise

    def _make_first_batch(self, timeout_s: float) -> None:
        """With num_workers=0: have calls made until there is a batch. What ends that is told when the specs are asked for."""
        device = next(iter(self.devices.values()))
        try:
            device.queue.put_back(device.queue.get(timeout_s, device.name))
        except (EndOfData, SourceFailed, QueueClosed, WaitTimeout):
            pass

    def stop_device(self, name: str) -> None:
        """Take a device out of the rotation; with the last one, the run ends."""
        device = self.devices[name]
        self._abort_device(device)
        if self.fetching.progress is not None:
            self.fetching.progress.drop_device(device.number)
        if all(device.queue.ended for device in self.devices.values()):
            self.request_stop()
        self.enqueuer.lay_out_anew()

    def retarget(self, name: str, device: DeviceSettings, feed: DeviceFeed) -> None:
        """Let the next batch that is laid out for this device have another feed or batch size."""
        self.devices[name].replace_target(self._target(device, feed))
        self.fetching.set_batch_size(max(each.target.batch_size for each in self.devices.values()))
        self.enqueuer.lay_out_anew()

    def has_thread(self, thread: threading.Thread) -> bool:
        """Whether a stop waits for this thread."""
        return thread is self._thread or self._fetchers.has_thread(thread)

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
        self.recorder.drop("stopped", self.assembly.abort())
        for failure in self.assembly.take_failures():  # a stop does not hide them
            self.signal.fail(failure)
        self.book.end()
        self.signal.ended.set()
        self._fetchers.shut_down()
        for device in self.devices.values():
            self._abort_device(device)

    def stop(self, deadline: float) -> tuple[tuple[StuckThread, ...], tuple[str, ...]]:
        """Abort and wait until `time.monotonic()` reaches the deadline; return (what is stuck, what went wrong)."""
        if self.forked:
            return (), ()
        self.abort()
        adding = [self.auto.thread] if self.auto is not None and self.auto.thread.ident is not None else []
        stuck = join_threads(adding, deadline)  # first: nobody is added any more
        stuck += self._fetchers.join(deadline)
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

    def locks(self) -> list[Any]:
        """Return the re-entrant locks in which a trainer's thread may be when a signal handler interrupts it."""
        locks = [self.signal.lock, self.recorder.lock, *(device.queue.lock for device in self.devices.values())]
        if self.fetching.progress is not None:
            locks.append(self.fetching.progress.lock)
        if isinstance(self._fetchers, InlineFetchers):
            locks.append(self._fetchers.calls.lock)
        return locks

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
        return self._fetchers.block_bytes

    def _close_input(self) -> None:
        """No chunk will be taken any more."""
        self.fetching.close()
        error = self.assembly.close()
        if error is not None:
            self.signal.fail(Failure(SourceFailed, f"source {self.settings.name!r}: rows could not be copied", error))
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

    def _nudge(self) -> None:
        """Let every trainer that waits look again."""
        for device in self.devices.values():
            device.queue.nudge()
