"""A device of a running source: batches go through its feed, and leave its queue for the trainer."""

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
    """A feed and a batch size, fixed for every batch that is laid out with it; opened for the first.

    Args:
        feed: where batches go.
        batch_size: rows of a batch.
        batch_axes: the batch axis of each input.
        keep_slots: free slots that are kept for the next batches.

    Attributes:
        has_own_memory: the feed makes the memory of its slots.
        laid_out: batches that are being filled or held for it. Written by the enqueuer.
        sent: batches that went through the feed. Written by the enqueuer.
        received: of these, how many the trainer received, or will never receive. Written under the device queue's lock.
    """

    __slots__ = (
        "_batch_axes", "_keep_slots", "_make_memory", "_pool", "batch_size", "chunk_alignment", "feed", "laid_out", "opened",
        "received", "sent",
    )  # fmt: skip

    def __init__(self, feed: DeviceFeed, batch_size: int, batch_axes: Sequence[int], keep_slots: int) -> None:
        self.feed = feed
        self.batch_size = batch_size
        self.chunk_alignment: int | None = getattr(feed, "chunk_alignment", None)
        self.opened = False
        self.laid_out = self.sent = self.received = 0
        self._batch_axes = tuple(batch_axes)
        self._keep_slots = keep_slots
        self._make_memory = getattr(feed, "slot_memory", None)
        self._pool: SlotPool | None = None

    @property
    def has_own_memory(self) -> bool:
        """Whether the feed makes the memory of its slots."""
        return self._make_memory is not None

    def takes_the_same_as(self, other: Target) -> bool:
        """Whether a batch that was laid out for the other can be sent here, if its size fits."""
        return type(self.feed) is type(other.feed)

    def open(self, specs: Sequence[ArraySpec]) -> None:
        """Open the feed and make the pool of slots; there is none where rows have any shape."""
        self.feed.open(specs, self.batch_size)
        self.opened = True
        if all(spec.is_fixed for spec in specs):
            self._pool = SlotPool(specs, self._batch_axes, self.batch_size, self._keep_slots, self._make_memory)

    def lease(self, rows: int, like: Sequence[NDArray[Any]] | None = None) -> Slot:
        """Return an empty slot for `rows` rows: one of the pool's, where it is a batch, else with rows as in `like`."""
        pool = self._pool
        if pool is not None and rows == pool.rows:
            return pool.lease()
        assert like is not None  # noqa: S101  only with rebatch=False, where the chunk shows its shape
        specs = [ArraySpec.of(array, axis) for array, axis in zip(like, self._batch_axes, strict=True)]
        return SlotPool(specs, self._batch_axes, rows, 0, self._make_memory).lease()

    def forget_memory(self) -> None:
        """Let go of the free slots; no more are leased."""
        if self._pool is not None:
            self._pool.keep(0)
            self._pool = None

    def close(self) -> None:
        """Let go of the free slots and close the feed. Nothing is leased or sent any more."""
        self.forget_memory()
        self.feed.close()


class Device:
    """Where a source delivers. `open`, `send` and `close_retired_targets` belong to the enqueuer, `next_batch` to trainers.

    Args:
        name: as errors and metrics call it.
        number: of the device among those of its source, from 0.
        queue: of batches on the device.
        target: its first feed and batch size.
        make_batch: builds what the trainer gets from the device's arrays.
        on_failure: told when a batch cannot be received, with its rows, unless a stop has accounted for them.

    Attributes:
        retired: targets that were replaced and are not closed yet.
        sits_out: it was given the end of the first epoch in an earlier run, and takes part from the next epoch on.
    """

    def __init__(
        self,
        name: str,
        number: int,
        queue: DeviceQueue,
        target: Target,
        make_batch: Callable[[Sequence[Any]], Any],
        on_failure: Callable[[Failure, int], None],
    ) -> None:
        self.name = name
        self.number = number
        self.queue = queue
        self.target = target
        self.retired: list[Target] = []
        self.sits_out = False
        self._make_batch = make_batch
        self._on_failure = on_failure
        self._opened: list[Target] = []
        self._interrupted: list[QueuedBatch] = []  # they were delivered to a call that Ctrl-C ended

    def open(self, target: Target, specs: Sequence[ArraySpec]) -> None:
        """Open the target's feed; `close` will close it."""
        target.open(specs)
        self._opened.append(target)

    def replace_target(self, target: Target) -> None:
        """Let the batches that are laid out from now on have another feed or batch size. Any thread may call this."""
        before, self.target = self.target, target
        self.retired.append(before)

    def close_retired_targets(self) -> None:
        """Give back the memory of targets that were replaced, and close their feeds when their last batch was received."""
        for target in list(self.retired):
            if target.laid_out:
                continue
            target.forget_memory()
            # A batch that Ctrl-C took back was counted as received, and is received again.
            if target.received >= target.sent and not self._interrupted:
                self.retired.remove(target)
                if target in self._opened:
                    self._opened.remove(target)
                    target.close()

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
        target.sent += 1
        recorder.count_sent(now)
        return self.queue.put(QueuedBatch(ticket, target, slot.filled, slot.rows, slot.epoch, slot.parts))

    def next_batch(self, timeout_s: float, as_numpy: bool = False) -> Any:
        """Return the next batch, its arrays as the feed delivers them, or as NumPy arrays.

        Raises:
            WaitTimeout: none came within `timeout_s`; the stream is as it was.
            EndOfData: no batch is left, in this epoch or, if raised again, at all.
            SourceFailed, FeedFailed: the source broke; the cause is the first failure.
            QueueClosed: the source was stopped.
            LifecycleError: a signal handler has interrupted another such call in this thread.
        """
        if self._interrupted and (batch := self._receive_again(as_numpy)) is not None:
            return batch
        queued = self.queue.get(timeout_s, self.name)
        batch = None
        try:
            ready = True
            if queued.target is not None:
                is_ready = getattr(queued.target.feed, "is_ready", None)
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
        assert queued.target is not None  # noqa: S101  the mark at the end of an epoch is nothing to receive
        feed = queued.target.feed
        arrays = feed.receive(queued.ticket)
        if as_numpy:
            arrays = [*map(getattr(feed, "to_numpy", np.asarray), arrays)]
        batch = self._make_batch(arrays)
        batch.epoch = queued.epoch
        batch.valid_rows = queued.rows
        return batch

    def _receive_again(self, as_numpy: bool) -> Any:
        """Return a batch that was counted as delivered, but did not reach the trainer; None: another thread was faster."""
        queued: QueuedBatch | None = None
        try:
            with self.queue.lock:
                if self._interrupted:
                    queued = self._interrupted[0]
                    del self._interrupted[0]
            batch = None if queued is None else self._receive(queued, as_numpy)
        except BaseException:
            if queued is not None:
                self._interrupted.insert(0, queued)
            raise
        if queued is not None:
            self.queue.log.taken_back -= 1
        return batch

    def close(self) -> list[BaseException]:
        """Close every feed that is open; return what they raised."""
        errors: list[BaseException] = []
        for target in self._opened:
            try:
                target.close()
            except Exception as error:
                errors.append(error)
        self._opened = []
        return errors
