"""A device of a running source: slots come from here, go through its feed, and leave its queue as batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.contracts import ArraySpec, DeviceFeed, Slot
from input_workers.errors import EndOfData, Failure, FeedFailed, QueueClosed
from input_workers.flow.device_queue import DeviceQueue, QueuedBatch
from input_workers.leases import SlotPool

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Device", "Target"]


class Target:
    """A feed and a batch size, fixed for every slot that is begun with it; opened at the first."""

    __slots__ = ("_batch_axes", "_make_memory", "_pool", "batch_size", "chunk_alignment", "feed", "opened")

    def __init__(self, feed: DeviceFeed, batch_size: int) -> None:
        self.feed = feed
        self.batch_size = batch_size
        self.chunk_alignment: int | None = getattr(feed, "chunk_alignment", None)
        self.opened = False
        self._batch_axes: Sequence[int] = ()
        self._make_memory = getattr(feed, "slot_memory", None)
        self._pool: SlotPool | None = None

    def open(self, specs: Sequence[ArraySpec], batch_axes: Sequence[int], keep: int) -> None:
        """Open the feed and make the pool of slots, of which `keep` free ones are kept; none where rows have any shape."""
        self.feed.open(specs, self.batch_size)
        self.opened = True
        self._batch_axes = batch_axes
        if all(spec.is_fixed for spec in specs):
            self._pool = SlotPool(specs, batch_axes, self.batch_size, keep, self._make_memory)

    def lease(self, rows: int, like: Sequence[NDArray[Any]]) -> Slot:
        """Return an empty slot for `rows` rows as these arrays have them: one of the pool's, where it is a batch."""
        pool = self._pool
        if pool is not None and rows == pool.rows:
            return pool.lease()
        specs = [ArraySpec.of(array, axis) for array, axis in zip(like, self._batch_axes, strict=True)]
        return SlotPool(specs, self._batch_axes, rows, 0, self._make_memory).lease()

    def close(self) -> None:
        """Let go of the free slots and close the feed. Nothing is leased or sent any more."""
        self._pool = None
        self.feed.close()


class Device:
    """Where a source delivers. `open`, `send` and `close` belong to the enqueuer, `next_batch` to any trainer's thread.

    Args:
        name: as errors and metrics call it.
        queue: of batches on the device.
        target: replaced as a whole to change feed or batch size; a slot in the making keeps the one it began with.
        make_batch: builds what the trainer gets from the device's arrays.
        batch_axes: the batch axis of each input.
        on_failure: told when a batch cannot be received, with its rows, unless a stop has accounted for them.
        keep_slots: free slots that are kept for the next batches.
        number: of the device among those of its source, from 0.
    """

    def __init__(
        self,
        name: str,
        queue: DeviceQueue,
        target: Target,
        make_batch: Callable[[Sequence[Any]], Any],
        batch_axes: Sequence[int],
        on_failure: Callable[[Failure, int], None],
        keep_slots: int,
        number: int = 0,
    ) -> None:
        self.name = name
        self.number = number
        self.queue = queue
        self.target = target
        self._make_batch = make_batch
        self._batch_axes = tuple(batch_axes)
        self._on_failure = on_failure
        self._keep_slots = keep_slots
        self._opened: list[Target] = []
        self._interrupted: list[QueuedBatch] = []  # they were delivered to a call that Ctrl-C ended

    def open(self, target: Target, specs: Sequence[ArraySpec]) -> None:
        """Open the target's feed; `close` will close it."""
        target.open(specs, self._batch_axes, self._keep_slots)
        self._opened.append(target)

    def send(self, target: Target, slot: Slot) -> bool:
        """Move the slot to the device and queue it; False: the device was stopped. There must be room."""
        recorder, started = self.queue.recorder, time.monotonic()
        so_far, _ = recorder.feed
        recorder.feed = so_far, started
        try:
            ticket = target.feed.send(slot)
        finally:
            now = time.monotonic()
            recorder.feed = so_far + now - started, math.inf
            if (trace := recorder.trace) is not None:
                trace.enqueuer.add("send", started, now, self.name)
        recorder.count_sent(now)
        return self.queue.put(QueuedBatch(ticket, target.feed, slot.filled, slot.rows, slot.epoch, slot.parts))

    def next_batch(self, timeout_s: float, as_numpy: bool = False) -> Any:
        """Return the next batch, its arrays as the feed delivers them, or as NumPy arrays.

        Raises:
            WaitTimeout: none came within `timeout_s`; the stream is as it was.
            EndOfData: no batch is left, in this epoch or, if raised again, at all.
            SourceFailed, FeedFailed: the source broke; the cause is the first failure.
            QueueClosed: the source was stopped.
        """
        if self._interrupted:
            try:
                queued = self._interrupted.pop(0)
            except IndexError:  # another thread was faster
                pass
            else:
                return self._receive_again(queued, as_numpy)
        queued = self.queue.get(timeout_s, self.name)
        batch = None
        try:
            ready = True
            if queued.feed is not None:
                is_ready = getattr(queued.feed, "is_ready", None)
                ready = is_ready is None or is_ready(queued.ticket)
                batch = self._receive(queued, as_numpy)
            self.queue.commit(queued, ready)
            if batch is not None:
                return batch
        except QueueClosed:
            raise
        except Exception as error:
            what = f"{self.name}: a batch of {queued.slot_rows} rows was sent but not received"
            failure = Failure(FeedFailed, what, error)
            if self.queue.give_up(queued):
                self._on_failure(failure, queued.rows)
            raise failure.exception() from error
        except BaseException:  # Ctrl-C: the batch is the next one again, or was just counted, and is kept for the next call
            if not self.queue.put_back(queued) and batch is not None:
                self._interrupted.append(queued)
                self.queue.log.taken_back += 1
            raise
        raise EndOfData(f"{self.name}: end of epoch {queued.epoch}")

    def _receive(self, queued: QueuedBatch, as_numpy: bool) -> Any:
        assert queued.feed is not None  # noqa: S101  the mark at the end of an epoch is nothing to receive
        arrays = queued.feed.receive(queued.ticket)
        if as_numpy:
            arrays = [*map(getattr(queued.feed, "to_numpy", np.asarray), arrays)]
        batch = self._make_batch(arrays)
        batch.epoch = queued.epoch
        batch.valid_rows = queued.rows
        return batch

    def _receive_again(self, queued: QueuedBatch, as_numpy: bool) -> Any:
        """Return a batch that was counted as delivered, but did not reach the trainer."""
        try:
            batch = self._receive(queued, as_numpy)
        except BaseException:
            self._interrupted.insert(0, queued)
            raise
        self.queue.log.taken_back -= 1
        return batch

    def close(self) -> list[BaseException]:
        """Close every feed that was opened; return what they raised."""
        errors: list[BaseException] = []
        for target in self._opened:
            try:
                target.close()
            except Exception as error:
                errors.append(error)
        self._opened = []
        return errors
