"""Chunks come in, batches go out to the devices in strict rotation. Runs on the source's enqueuer thread.

It sleeps in one place, `signal.wake`, whatever it waits for: chunks, room on a device, or a call that takes too long.
"""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable, Sequence
from typing import Literal, NoReturn, TypeAlias

from input_workers.contracts import ArraySpec, Chunk, Slot
from input_workers.errors import EndOfData, Failure, FeedFailed, InputWorkersError, QueueClosed, SourceFailed
from input_workers.flow.chunk_queue import ChunkQueue
from input_workers.flow.device import Device, Target
from input_workers.flow.device_queue import QueuedBatch
from input_workers.flow.rechunker import Rechunker, rows_between
from input_workers.lifecycle import StopSignal, seconds_left
from input_workers.metrics.fetcher_recorder import waited
from input_workers.metrics.recorder import SourceRecorder
from input_workers.progress import MARKS

__all__ = ["Enqueuer", "LastBatch"]

LastBatch = Literal["drop", "keep", "pad"]


_Making: TypeAlias = tuple[Device, Target, Slot]


class _Ended(Exception):
    """The run is being stopped, or a device failed: put down what is held."""


class Enqueuer:
    """Re-chunks into slots and hands them to the devices. All methods but `__init__` belong to one thread.

    Args:
        source: the name, for errors.
        chunks: the queue it takes from.
        devices: where to deliver; complete batches are dealt to them in strict rotation.
        batch_axes: the batch axis of each input.
        specs: returns the specs of the inputs; called when the first chunk is there.
        last_batch: what becomes of rows that fill no batch at the end.
        rebatch: False delivers chunks as they come.
        has_epochs: marks at the end of each epoch come with the chunks.
        signal: why and that the run ends.
        recorder: of the source.
        check_calls: given the time, fails the source for calls that run too long; returns when to look again.
    """

    def __init__(
        self,
        source: str,
        chunks: ChunkQueue,
        devices: Sequence[Device],
        *,
        batch_axes: Sequence[int],
        specs: Callable[[], Sequence[ArraySpec]],
        last_batch: LastBatch,
        rebatch: bool,
        has_epochs: bool,
        signal: StopSignal,
        recorder: SourceRecorder,
        check_calls: Callable[[float], float],
    ) -> None:
        self._source = source
        self._chunks = chunks
        self._devices = list(devices)
        self._turn = 0
        self._batch_axes = tuple(batch_axes)
        self._specs = specs
        self._last_batch = last_batch
        self._rebatch = rebatch
        self._has_epochs = has_epochs
        self._signal = signal
        self._recorder = recorder
        self._check_calls = check_calls
        self._rechunker = Rechunker(batch_axes)
        self._making: _Making | None = None  # the slot that is not full yet
        # Full slots held back until each device has one, so that a finite end gives all equally many.
        self._round: list[_Making] = []
        self._pending: list[Chunk] = []  # taken, and not yet held by the re-chunker
        self._row_nbytes = 0  # known with the first chunk; stays 0 where rows have any shape
        self._fill_seconds = 0.0  # spent so far on the slot in the making

    def run(self) -> None:
        """Deliver until the input ends, fails or is stopped. Never raises; always ends the devices' queues."""
        recorder = self._recorder
        recorder.enqueuer_worked = recorder.enqueuer_worked[0], time.monotonic()
        try:
            while True:
                if self._round and self._round_is_complete():  # a device was stopped meanwhile
                    self._send_round(time.monotonic())
                chunks = self._chunks.take(self._rows_wanted())
                if self._signal.stopping:
                    self._recorder.drop("stopped", sum(chunk[1] for chunk in chunks))
                    break
                if chunks:
                    self._accept(chunks)
                elif self._chunks.drained:
                    self.finish()
                    break
                else:
                    self._await_chunks()
        except _Ended:
            pass
        except BaseException as error:
            self._signal.fail(Failure(SourceFailed, f"source {self._source!r}: the enqueuer broke", error))
        finally:
            self.put_down()
            recorder.enqueuer_worked = waited(recorder.enqueuer_worked, time.monotonic()), math.inf

    def deliver(self, chunks: list[Chunk]) -> None:
        """Deliver in the caller's thread, once. Where that ends the run, the signal says so, and `put_down` is next."""
        try:
            self._accept(chunks)
        except _Ended:
            pass

    def _accept(self, chunks: list[Chunk]) -> None:
        """Deliver what these chunks complete; copy the rest into the slot in the making. The list is emptied."""
        self._pending = chunks
        while chunks:
            mark = next((index for index, chunk in enumerate(chunks) if not chunk[1]), None) if self._has_epochs else None
            if mark is None:
                self._rechunker.add(chunks)
                chunks.clear()  # or the chunks would live until the last of them is copied
                self._deal()
            else:
                self._rechunker.add(chunks[:mark])
                _, _, _, request = chunks[mark]
                del chunks[: mark + 1]
                self._deal()
                self._settle_remainder()
                for device in self._devices:
                    self._await_room(device)
                    epoch, seen = request.epoch if request is not None else 0, MARKS + device.number
                    device.queue.put(QueuedBatch(None, None, 0, 0, epoch, [(epoch, seen, seen + 1)]))

    def finish(self) -> None:
        """The input has ended: settle the remainder, unless it failed. `put_down` is next."""
        try:
            if self._signal.failure is None:
                self._settle_remainder()
            else:
                self._send_round(time.monotonic())
        except _Ended:
            pass

    def put_down(self) -> None:
        """Account for what is held as `stopped`, and end the devices' queues by what ended the run."""
        held = self._rechunker.rows + sum(chunk[1] for chunk in self._pending) + sum(slot.filled for _, _, slot in self._round)
        if self._making is not None:
            held += self._making[2].filled
        self._making, self._round, self._pending = None, [], []
        self._rechunker = Rechunker(self._batch_axes)
        self._recorder.drop("stopped", held + self._chunks.abort())
        self._signal.ended.set()
        failure = self._signal.failure
        for device in self._devices:
            device.queue.end(self._end_of_data if failure is None else failure.exception)

    def _end_of_data(self) -> InputWorkersError:
        if self._signal.stopping:
            return QueueClosed(f"source {self._source!r} was stopped")
        return EndOfData(f"source {self._source!r}: end of data")

    def _rows_wanted(self) -> int:
        if not self._rebatch:
            return 1
        if self._making is not None:
            return self._making[2].rows - self._making[2].filled
        return self._devices[self._turn % len(self._devices)].target.batch_size if self._devices else 1

    def _deal(self) -> None:
        rechunker, recorder = self._rechunker, self._recorder
        while rechunker.rows:
            started = time.monotonic()
            if self._making is None:
                self._making = self._begin_slot()
            slot = self._making[2]
            if slot.filled < slot.rows:
                copied, rows = rechunker.fill(slot)
                if rows:
                    self._chunks.release(copied, rows, rows * self._row_nbytes or sum(chunk[2] for chunk in copied))
                del copied  # or they would live until the next batch
            if (trace := recorder.trace) is not None:
                trace.enqueuer.add("filling", started, time.monotonic())
            full = slot.filled == slot.rows
            del slot  # the trainer may let go of the batch before this frame ends
            if full:
                self._dispatch(started)
            else:
                self._fill_seconds += time.monotonic() - started

    def _begin_slot(self) -> _Making:
        """Return the next slot to fill, or one that is full, because it is the next chunk itself."""
        device, target = self._next_target()
        arrays, rows, nbytes, _ = self._rechunker.next_chunk()
        if self._rebatch:
            rows = target.batch_size
        if target.chunk_alignment is not None:
            slot = self._rechunker.adopt(rows, target.chunk_alignment)
            if slot is not None:
                self._chunks.release([None], rows, nbytes)
                return device, target, slot
        try:
            return device, target, target.lease(rows, arrays)
        except Exception as error:
            self._fail(
                device, f"there is no memory for a slot of {rows} rows, {rows * self._row_nbytes or nbytes:,} bytes", error
            )

    def _next_target(self) -> tuple[Device, Target]:
        """Return the device whose turn it is, and its target, opened."""
        while self._devices:
            self._turn %= len(self._devices)
            device = self._devices[self._turn]
            if device.queue.ended:  # it was stopped: the others share the rest
                del self._devices[self._turn]
                continue
            self._turn += 1
            target = device.target
            if not target.opened:
                specs = self._specs()
                if all(spec.is_fixed for spec in specs):
                    self._row_nbytes = sum(spec.row_nbytes for spec in specs)
                try:
                    device.open(target, specs)
                except Exception as error:
                    self._fail(device, f"its feed could not be opened for batches of {target.batch_size} rows", error)
            return device, target
        raise _Ended

    def _dispatch(self, started: float) -> None:
        """The slot in the making is full."""
        assert self._making is not None  # noqa: S101  it is what was filled
        self._round.append(self._making)
        self._making = None
        if len(self._devices) == 1 or self._round_is_complete():
            self._send_round(started)
        else:
            self._fill_seconds += time.monotonic() - started

    def _round_is_complete(self) -> bool:
        dealt = {id(device) for device, _, _ in self._round}
        return self._last_batch != "drop" or all(device.queue.ended or id(device) in dealt for device in self._devices)

    def _send_round(self, started: float) -> None:
        """Send the full slots; `started` is when the last of them was begun to be filled."""
        while self._round:
            device, target, slot = self._round[0]
            if not device.queue.has_room():
                self._fill_seconds += time.monotonic() - started
                self._await_room(device)
                started = time.monotonic()
            del self._round[0]
            try:
                taken = device.send(target, slot)
            except Exception as error:
                self._recorder.drop("device_error", slot.filled)
                nbytes = sum(array.nbytes for array in slot.arrays)
                self._fail(device, f"a batch of {slot.rows} rows, {nbytes:,} bytes, could not be sent", error)
            if taken:
                now = time.monotonic()
                recorder = device.queue.recorder
                recorder.rows_padded += slot.rows - slot.filled
                recorder.send.observe(self._fill_seconds + now - started)
                self._fill_seconds, started = 0.0, now
            else:
                self._recorder.drop("stopped", slot.filled)

    def _settle_remainder(self) -> None:
        """What fills no batch is dropped, kept short or padded; the rotation begins anew."""
        if self._round_is_complete():
            self._send_round(time.monotonic())
        making, self._making = self._making, None
        if self._last_batch == "drop":
            held_back, self._round = self._round, []
            rows = sum(slot.filled for _, _, slot in held_back) + (making[2].filled if making else 0)
            self._recorder.drop("final_partial", rows)
        elif making is not None:
            device, target, slot = making
            if self._last_batch == "keep":
                slot = self._cut_short(slot)
            else:
                self._pad(slot)
            self._round.append((device, target, slot))
            self._send_round(time.monotonic())
        self._turn = 0

    def _cut_short(self, slot: Slot) -> Slot:
        arrays = [array[rows_between(axis, 0, slot.filled)] for array, axis in zip(slot.arrays, self._batch_axes, strict=True)]
        if any(self._batch_axes):  # then a part of the rows is not contiguous
            arrays = [array.copy() for array in arrays]
        short = Slot(arrays, slot.filled, slot.filled, slot.epoch)
        short.parts = slot.parts
        return short

    def _pad(self, slot: Slot) -> None:
        for array, axis in zip(slot.arrays, self._batch_axes, strict=True):
            last = array[rows_between(axis, slot.filled - 1, slot.filled)]
            array[rows_between(axis, slot.filled, slot.rows)] = last

    def _await_room(self, device: Device) -> None:
        recorder = self._recorder
        started = time.monotonic()
        recorder.enqueuer_blocked = recorder.enqueuer_blocked[0], started
        try:
            while not device.queue.has_room():
                self._sleep(time.monotonic())
                if self._signal.stopping:
                    raise _Ended
        finally:
            now = time.monotonic()
            recorder.enqueuer_blocked = recorder.enqueuer_blocked[0] + now - started, math.inf
            if (trace := recorder.trace) is not None:
                trace.enqueuer.add("waiting for room", started, now, device.name)

    def _await_chunks(self) -> None:
        recorder = self._recorder
        so_far, started = recorder.enqueuer_starved[0], time.monotonic()
        recorder.enqueuer_starved = so_far, started
        self._sleep(started)
        now = time.monotonic()
        recorder.enqueuer_starved = so_far + now - started, math.inf
        if (trace := recorder.trace) is not None:
            trace.enqueuer.add("waiting for chunks", started, now)

    def _sleep(self, now: float) -> None:
        self._recorder.mark(now)
        look_again = self._check_calls(now)
        try:
            self._signal.wake.get(timeout=None if look_again == math.inf else seconds_left(look_again))
        except queue.Empty:
            pass

    def _fail(self, device: Device, what: str, error: BaseException) -> NoReturn:
        self._signal.fail(Failure(FeedFailed, f"{device.name}: {what}", error))
        raise _Ended from error
