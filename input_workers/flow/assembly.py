"""The batches of an input source while they are filled, as fetchers and enqueuer share them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from input_workers.flow.batches import EpochEnd, OpenBatch
from input_workers.flow.line import closed_gate
from input_workers.flow.placement import Placement

if TYPE_CHECKING:
    from input_workers.flow.device import Device, Target

__all__ = ["Assembly"]


class Assembly(Placement):
    """Both halves: `Placement` is the fetchers', this is the enqueuer's, and how it ends. Thread-safe."""

    def watch(self) -> None:
        """From now on a token is put, once, when the enqueuer has something to do."""
        with self._lock:
            self._is_watched = True

    @property
    def has_waiters(self) -> bool:
        """Whether a fetcher waits: the first chunk is there, so the specs are known."""
        return bool(self._waiters)

    @property
    def epoch_ends(self) -> int:
        """How many epochs have ended. Batches that are laid out after each begin a new rotation of the devices."""
        return self._window.epoch_ends

    def set_max_rows(self, rows: int) -> None:
        """Let the bound be this many rows from now on."""
        with self._lock:
            self._window.max_rows = rows
            self._window.is_limited = False

    def wants_batch(self, rows: int, nbytes: int, has_memory: bool = True) -> bool:
        """Whether an empty batch of this size, with or without memory, should be laid out now."""
        with self._lock:
            return not self.closed and self._window.wants_batch(rows, nbytes, has_memory)

    def lay_out(self, batch: OpenBatch, epoch_ends: int) -> bool:
        """Add an empty batch behind the others; False: an epoch has ended since `epoch_ends` was read, or it is closed."""
        with self._lock:
            if self.closed or epoch_ends != self._window.epoch_ends:
                return False
            self._window.lay_out(batch)
            self._line.call(self.closed)
            return True

    def discard_empty(self) -> int:
        """Take back the batches that have no rows yet, to be laid out anew; return how many there were."""
        with self._lock:
            return self._window.discard_empty()

    def take_discarded(self) -> list[OpenBatch]:
        """Return the empty batches that were taken back since the last time, also at the ends of epochs."""
        if not self._window.discarded:  # the common case, without the lock
            return []
        with self._lock:
            discarded, self._window.discarded = self._window.discarded, []
            return discarded

    def shrink(self, target: Target, device: Device) -> bool:
        """Let the batch that is being filled for a device have the size of another target of it, if that is smaller.

        So rows that wait are delivered at once when the batch size is made smaller, and no more rows come.
        """
        with self._lock:
            packed, self._packed = self._packed, None
            has_shrunk = self._axes is None and self._window.shrink(target, device)
        self._unpack(packed)  # an error breaks the batch, and is told to whoever places rows in it next
        return has_shrunk

    def take(self) -> OpenBatch | EpochEnd | None:
        """Return the oldest batch, if it is complete, or the end of an epoch that comes before the next; else None."""
        with self._lock:
            if self._window.is_ready and not self._window.is_stuck:
                self._is_idle = False
                item = self._window.take()
                self._line.call(self.closed)
                return item
            self._is_idle = True
            self._open_gates()
            return None

    @property
    def drained(self) -> bool:
        """Whether it is closed and nothing is left that will be complete."""
        with self._lock:
            return self.closed and self._window.is_stuck

    def await_sent(self) -> None:
        """Wait until the enqueuer has sent every complete batch and found no other, or the assembly is closed."""
        gate = closed_gate()
        with self._lock:
            if self.closed or (self._is_idle and not self._window.is_ready):
                return
            self._gates.append(gate)
        gate.acquire()

    # ---- ends

    def close(self) -> BaseException | None:
        """Reserve no more rows. What was reserved is copied, and can be taken; returns what failed."""
        with self._lock:
            self._close()
            packed, self._packed = self._packed, None
        error = self._unpack(packed)
        self._wake.put(None)
        return error

    def abort(self) -> int:
        """Close, and forget every batch and parked chunk; return their rows. A copy that still runs harms nothing."""
        with self._lock:
            self._close()
            rows = self._window.forget()
            rows += self._turns.forget_parked() if self._turns is not None else 0
            self._packed = None
        self._wake.put(None)
        return rows

    @property
    def charged(self) -> tuple[int, int]:
        """Rows (chunks with `rebatch=False`) and bytes that were reserved or parked and not yet taken."""
        with self._lock:
            weight, nbytes = self._window.charged
            parked, parked_nbytes = self._turns.parked if self._turns is not None else (0, 0)
            return weight + parked, nbytes + parked_nbytes
