"""Lays out empty batches for the fetchers to fill, and sends each to its device when its last row is in place.

Runs on the source's enqueuer thread. It sleeps in one place, `signal.wake`, whatever it waits for: rows, or room on a device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from input_workers.contracts import ArraySpec, Slot
from input_workers.errors import EndOfData, Failure, FeedFailed, InputWorkersError, QueueClosed, SourceFailed
from input_workers.flow.assembly import Assembly
from input_workers.flow.batches import BatchRules, EpochEnd, OpenBatch, is_usable
from input_workers.flow.device import Device, Target
from input_workers.flow.device_queue import QueuedBatch
from input_workers.lifecycle import StopSignal
from input_workers.metrics.fetcher_recorder import waited
from input_workers.metrics.recorder import SourceRecorder
from input_workers.progress import MARKS

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Enqueuer"]


class _Ended(Exception):
    """The run is being stopped, or a device failed: account for what is held, and end."""


class Enqueuer:
    """Moves complete batches from the assembly to the devices. `run` belongs to one thread.

    Args:
        rules: how rows become batches.
        assembly: has the batches that are being filled.
        devices: where to deliver; complete batches are dealt to them in strict rotation.
        specs: returns the specs of the inputs, or None before the first chunk.
        signal: why and that the run ends.
        recorder: of the source.
    """

    def __init__(
        self,
        rules: BatchRules,
        assembly: Assembly,
        devices: Sequence[Device],
        specs: Callable[[], Sequence[ArraySpec] | None],
        signal: StopSignal,
        recorder: SourceRecorder,
    ) -> None:
        self._rules = rules
        self._assembly = assembly
        self._devices = list(devices)
        self._specs = specs
        self._signal = signal
        self._recorder = recorder
        # The rotation of the next batch to lay out, or, with rebatch=False, to send.
        self._turn = 0
        self._epoch_ends = 0  # that the rotation has begun anew for
        self._is_outdated = False
        # Full batches held back until each device has one, so that a finite end gives all devices equally many.
        self._round: list[tuple[Device, Target, Slot]] = []
        self._partial: OpenBatch | None = None  # the last one before the end of an epoch, or of the data
        self._row_nbytes = 0  # of all inputs; known with the specs, 0 where rows have any shape

    def run(self) -> None:
        """Deliver until the input ends, fails or is stopped. Never raises; always ends the devices' queues."""
        recorder = self._recorder
        recorder.enqueuer_worked = recorder.enqueuer_worked[0], time.monotonic()
        try:
            while not self._signal.stopping:
                if self._round and self._round_is_complete():  # a device was stopped meanwhile
                    self._send_round()
                self._assembly.watch()  # first: whatever happens from here on puts a token
                self._lay_out()
                item = self._assembly.take()
                if isinstance(item, EpochEnd):
                    self._end_epoch(item.epoch)
                elif item is not None:
                    self._accept(item)
                elif self._assembly.drained:
                    self._finish()
                    break
                else:
                    self._await_rows()
        except _Ended:
            pass
        except BaseException as error:
            self._signal.fail(Failure(SourceFailed, f"source {self._rules.source!r}: the enqueuer broke", error))
        finally:
            self._account_for_rest()
            recorder.enqueuer_worked = waited(recorder.enqueuer_worked, time.monotonic()), math.inf

    def lay_out_anew(self) -> None:
        """A device was stopped or has another target: lay out the empty batches once more. Any thread may ask."""
        self._is_outdated = True
        self._signal.wake.put(None)

    def _lay_out(self) -> None:
        """Lay out the empty batches that the assembly lacks, within its bounds."""
        if not self._rules.rebatch:
            return
        if self._is_outdated:
            self._is_outdated = False
            self._turn -= self._assembly.discard_empty()
            for device in self._devices:
                self._shrink_current(device)
        for batch in self._assembly.take_discarded():
            if batch.target is not None:
                batch.target.laid_out -= 1
        for device in self._devices:
            if device.retired:
                device.close_retired_targets()
        if not self._row_nbytes and not self._assembly.has_waiters:
            return  # no memory is taken, and no feed opened, before there is a first chunk
        while True:
            epoch_ends = self._assembly.epoch_ends
            if epoch_ends != self._epoch_ends:
                self._epoch_ends, self._turn = epoch_ends, 0
            device = self._next_device()
            target = device.target
            nbytes = self._row_nbytes * target.batch_size
            if not self._assembly.wants_batch(target.batch_size, nbytes, target.has_own_memory):
                return
            self._open(device, target)
            # Memory of the feed's own is made in this thread; other memory is taken by the fetcher that needs it.
            arrays = self._lease(device, target, target.batch_size).arrays if target.has_own_memory else ()
            batch = OpenBatch(arrays, target.batch_size, device, target, self._row_nbytes * target.batch_size)
            is_laid_out = self._assembly.lay_out(batch, epoch_ends)  # or an epoch has ended: it is another device's turn
            self._turn += is_laid_out
            target.laid_out += is_laid_out

    def _shrink_current(self, device: Device) -> None:
        """Let the batch that is being filled for a device have its new target's size, if it can."""
        before = device.retired[-1] if device.retired else None
        if before is not None and before.opened and before.takes_the_same_as(device.target):
            self._open(device, device.target)
            if self._assembly.shrink(device.target, device):
                before.laid_out -= 1
                device.target.laid_out += 1

    def _next_device(self) -> Device:
        """Return the device whose turn it is. Raises _Ended if all were stopped."""
        while self._devices:
            self._turn %= len(self._devices)
            device = self._devices[self._turn]
            if device.queue.ended:
                del self._devices[self._turn]  # it was stopped: the others share the rest
            elif device.sits_out and not self._assembly.epoch_ends and not all(each.sits_out for each in self._devices):
                self._turn += 1
            else:
                return device
        raise _Ended

    def _open(self, device: Device, target: Target) -> None:
        if target.opened:
            return
        specs = self._specs()
        assert specs is not None  # noqa: S101  a chunk was checked against them
        if all(spec.is_fixed for spec in specs):
            self._row_nbytes = sum(spec.row_nbytes for spec in specs) or 1
        try:
            device.open(target, specs)
        except BaseException as error:
            self._fail(device, f"its feed could not be opened for batches of {target.batch_size} rows", error)

    def _lease(self, device: Device, target: Target, rows: int, arrays: Sequence[NDArray[Any]] | None = None) -> Slot:
        """Return memory for a batch."""
        try:
            return target.lease(rows, arrays)
        except BaseException as error:
            nbytes = rows * self._row_nbytes if arrays is None else sum(array.nbytes for array in arrays)
            what = f"there is no memory for a slot of {rows} rows, {nbytes:,} bytes"
            if target.has_own_memory:
                self._fail(device, what, error)
            self._signal.fail(Failure(SourceFailed, f"source {self._rules.source!r}: {what}", error))
            raise _Ended from error

    def _accept(self, batch: OpenBatch) -> None:
        """A batch has all its rows: send it, or hold it until the round is complete."""
        if not self._rules.rebatch:
            device = self._next_device()
            self._turn += 1
            target = device.target
            self._open(device, target)
            self._dispatch(device, target, self._as_slot(device, target, batch))
        elif batch.filled < batch.rows:
            self._partial = batch
        else:
            self._dispatch(*self._live_device_of(batch), batch)

    def _live_device_of(self, batch: OpenBatch) -> tuple[Device, Target]:
        """Return where to send a batch: another device in place of one that was stopped, if it takes the same batches."""
        device, target = batch.device, batch.target
        assert device is not None and target is not None  # noqa: PT018, S101  laid out for one
        if device.queue.ended:
            held = [id(each) for each, _, _ in self._round]
            for other in sorted(self._devices, key=lambda each: held.count(id(each))):
                same = other.target.takes_the_same_as(target) and other.target.batch_size == batch.rows
                if same and other.target.opened and not other.queue.ended:
                    return other, other.target
        return device, target

    def _as_slot(self, device: Device, target: Target, batch: OpenBatch) -> Slot:
        """Return a chunk that is a batch of its own as the feed takes it: as it is, or copied to the feed's memory."""
        alignment = target.chunk_alignment
        if alignment is not None and all(is_usable(array, alignment) for array in batch.arrays):
            return batch
        slot = self._lease(device, target, batch.rows, batch.arrays)
        for target_array, array in zip(slot.arrays, batch.arrays, strict=True):
            target_array[...] = array
        slot.filled, slot.epoch, slot.parts = batch.filled, batch.epoch, batch.parts
        return slot

    def _dispatch(self, device: Device, target: Target, slot: Slot) -> None:
        self._round.append((device, target, slot))
        if len(self._devices) == 1 or self._round_is_complete():
            self._send_round()

    def _round_is_complete(self) -> bool:
        dealt = {id(device) for device, _, _ in self._round}
        return self._rules.last_batch != "drop" or all(
            device.queue.ended or device.sits_out or id(device) in dealt for device in self._devices
        )

    def _send_round(self) -> None:
        """Send the batches that are held; under "drop", one to each device for each complete round."""
        sent: set[int] = set()  # devices that have had a batch of this round
        index = 0
        while index < len(self._round):
            device, target, slot = self._round[index]
            if id(device) in sent and self._rules.last_batch == "drop":
                index += 1
                continue
            sent.add(id(device))
            if not device.queue.has_room():
                self._await_room(device)
            del self._round[index]
            self._send(device, target, slot)
            del slot  # or this frame would hold the batch's memory until the next one
        if self._round and self._round_is_complete():
            self._send_round()

    def _send(self, device: Device, target: Target, slot: Slot) -> None:
        """Send a batch, and count it."""
        started = time.monotonic()
        try:
            taken = device.send(target, slot)
        except BaseException as error:
            self._recorder.drop("device_error", slot.filled)
            nbytes = sum(array.nbytes for array in slot.arrays)
            self._fail(device, f"a batch of {slot.rows} rows, {nbytes:,} bytes, could not be sent", error)
        if taken:
            recorder = device.queue.recorder
            recorder.rows_padded += slot.rows - slot.filled
            recorder.send.observe(time.monotonic() - started)
        else:
            self._recorder.drop("stopped", slot.filled)
        if isinstance(slot, OpenBatch) and slot.target is not None:
            slot.target.laid_out -= 1

    def _end_epoch(self, epoch: int) -> None:
        """All rows of an epoch were taken: settle what fills no batch, and tell every device."""
        self._settle_remainder()
        for device in self._devices:
            if not device.sits_out:
                self._await_room(device)
                seen = MARKS + device.number
                device.queue.put(QueuedBatch(None, None, 0, 0, epoch, [(epoch, seen, seen + 1)]))
            device.sits_out = False  # it had this end before

    def _finish(self) -> None:
        """The input has ended: settle the remainder, unless it failed."""
        for failure in self._assembly.take_failures():  # in ordered delivery, of the request whose turn it was, and later
            self._signal.fail(failure)
        if self._signal.failure is None:
            self._settle_remainder()
        else:
            self._send_round()

    def _settle_remainder(self) -> None:
        """What fills no batch is dropped, kept short or padded; the rotation begins anew."""
        if self._round_is_complete():
            self._send_round()
        partial, self._partial = self._partial, None
        if partial is not None and partial.target is not None:
            partial.target.laid_out -= self._rules.last_batch != "pad"  # which alone is sent itself
        if self._rules.last_batch == "drop":
            rows = sum(slot.filled for _, _, slot in self._round) + (partial.filled if partial else 0)
            self._round = []
            self._recorder.drop("final_partial", rows)
        elif partial is not None:
            device, target = self._live_device_of(partial)
            axes = self._rules.batch_axes
            slot = partial.cut_short(axes) if self._rules.last_batch == "keep" else partial.pad(axes)
            self._round.append((device, target, slot))
            self._send_round()
        if not self._rules.rebatch:
            self._turn = 0

    def _account_for_rest(self) -> None:
        """Count what is held as `stopped`, and end the devices' queues by what ended the run."""
        held = sum(slot.filled for _, _, slot in self._round) + (self._partial.filled if self._partial is not None else 0)
        self._round, self._partial = [], None
        self._recorder.drop("stopped", held + self._assembly.abort())
        self._signal.ended.set()
        failure = self._signal.failure
        for device in self._devices:
            device.queue.end(self._end_of_data if failure is None else failure.exception)

    def _end_of_data(self) -> InputWorkersError:
        source = f"source {self._rules.source!r}"
        return QueueClosed(f"{source} was stopped") if self._signal.stopping else EndOfData(f"{source}: end of data")

    def _await_room(self, device: Device) -> None:
        """Wait until the device's queue has room; lay out batches meanwhile, so that fetchers go on."""
        recorder, started = self._recorder, time.monotonic()
        recorder.enqueuer_blocked = recorder.enqueuer_blocked[0], started
        try:
            while not device.queue.has_room():
                self._assembly.watch()
                self._lay_out()
                recorder.mark(time.monotonic())
                self._signal.wake.get()
                if self._signal.stopping:
                    raise _Ended
        finally:
            now = time.monotonic()
            recorder.enqueuer_blocked = recorder.enqueuer_blocked[0] + now - started, math.inf
            if (trace := recorder.trace) is not None:
                trace.enqueuer.add("waiting for room", started, now, device.name)

    def _await_rows(self) -> None:
        recorder, started = self._recorder, time.monotonic()
        so_far = recorder.enqueuer_starved[0]
        recorder.enqueuer_starved = so_far, started
        recorder.mark(started)
        self._signal.wake.get()
        now = time.monotonic()
        recorder.enqueuer_starved = so_far + now - started, math.inf
        if (trace := recorder.trace) is not None:
            trace.enqueuer.add("waiting for rows", started, now)

    def _fail(self, device: Device, what: str, error: BaseException) -> NoReturn:
        self._signal.fail(Failure(FeedFailed, f"{device.name}: {what}", error))
        raise _Ended from error
