"""An assembly whose enqueuer is played by the test, and fetchers in threads that place self-certifying chunks in it."""

from __future__ import annotations

import math
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from self_certifying import FIELDS, ROW, WORKER, check_batch, make_chunk

from input_workers.contracts import FetchRequest
from input_workers.feeds.numpy_feed import NumpyFeed
from input_workers.flow.assembly import Assembly
from input_workers.flow.batches import BatchRules, EpochEnd, OpenBatch, Unplaced
from input_workers.flow.device import Target
from input_workers.flow.turns import Turns
from input_workers.flow.window import ChunkWindow, Window
from input_workers.metrics.fetcher_recorder import FetcherRecorder

# No step of these tests takes longer than a few milliseconds. Whatever waits this long waits for ever.
LIMIT_SECONDS = 10.0

INPUTS = 2
ROW_NBYTES = INPUTS * FIELDS * 8


class WatchedArray(np.ndarray):
    """An input of a batch that tells of every copy into it: `on_copy(key, value)` is called before the copy is made."""

    on_copy: Callable[[Any, Any], object] | None = None

    def __array_finalize__(self, base: Any) -> None:
        self.on_copy = getattr(base, "on_copy", None)

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.on_copy is not None:
            self.on_copy(key, value)
        super().__setitem__(key, value)


class CopyGate:
    """Holds back the copies of some workers' rows until they are let through."""

    def __init__(self, *workers: int) -> None:
        self.arrived: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._open = {worker: threading.Event() for worker in workers}

    def __call__(self, key: Any, value: Any) -> None:
        worker = int(np.asarray(value).flat[1])  # the field WORKER of the first row
        if worker in self._open and not self._open[worker].is_set():
            self.arrived.put(worker)
            assert self._open[worker].wait(LIMIT_SECONDS), f"the copy of worker {worker} was never let through"

    def await_arrival(self) -> int:
        """Wait until a copy is held back, and return whose."""
        return self.arrived.get(timeout=LIMIT_SECONDS)

    def let_through(self, worker: int) -> None:
        """Let this worker's copies be made."""
        self._open[worker].set()


def make_request(ordinal: int, rows: int, epoch: int = 0, begin: int = 0) -> FetchRequest:
    """Return the request of a Stream with this ordinal."""
    return FetchRequest(ordinal, epoch, np.arange(begin, begin + rows), ordinal=ordinal, begin=begin)


def keep_aside(arrays: Sequence[np.ndarray], rows: int) -> list[np.ndarray]:
    return [array.copy() for array in arrays]


def stacks_of(threads: Sequence[threading.Thread]) -> str:
    """Return where these threads are, for a test that hangs."""
    frames = sys._current_frames()
    return "\n".join(
        f"{thread.name}:\n" + "".join(traceback.format_stack(frames.get(thread.ident or -1)))
        for thread in threads
        if thread.is_alive()
    )


class Driver:
    """The enqueuer's part, step by step. Attributes: `taken`, copies of the batches' rows as they were when taken."""

    def __init__(
        self,
        batch_size: int = 4,
        *,
        max_batches: float = 3,
        axes: tuple[int, int] = (0, 0),
        chunk_alignment: int | None = 1,
        on_copy: Callable[[Any, Any], object] | None = None,
        rebatch: bool = True,
        max_rows: int | None = None,
        max_nbytes: int | None = None,
        turns: Turns | None = None,
        keep_aside: Callable[[Sequence[np.ndarray], int], Sequence[np.ndarray]] = keep_aside,
        pack_below_nbytes: int | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.axes = axes
        self.on_copy = on_copy
        self.wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.max_rows = math.ceil(max_batches * batch_size) if max_rows is None else max_rows
        self.window = (Window if rebatch else ChunkWindow)(self.max_rows, max_nbytes)
        rules = BatchRules("test", axes, rebatch=rebatch)
        self.assembly = Assembly(rules, self.window, turns, keep_aside, self.wake)
        if pack_below_nbytes is not None:
            self.assembly.pack_below_nbytes = pack_below_nbytes
        self.target = Target(NumpyFeed(), batch_size, axes, 0)
        self.target.chunk_alignment = chunk_alignment
        self.taken: list[list[np.ndarray]] = []
        self.batches: list[OpenBatch] = []
        self.epoch_ends: list[tuple[int, int]] = []  # (epoch, batches taken before its end)
        self.before_step: Callable[[], object] = lambda: None
        self.after_step: Callable[[], object] = lambda: None

    def make_batch(self, batch_size: int | None = None) -> OpenBatch:
        """Return an empty batch whose rows are not yet what anybody has fetched."""
        rows = self.batch_size if batch_size is None else batch_size
        arrays = []
        for axis in self.axes:
            array = np.full((FIELDS, rows) if axis else (rows, FIELDS), -1, np.int64).view(WatchedArray)
            array.on_copy = self.on_copy
            arrays.append(array)
        return OpenBatch(arrays, rows, None, self.target)

    def lay_out(self) -> int:
        """Lay out all batches that the assembly wants; return how many."""
        count = 0
        while self.assembly.wants_batch(self.batch_size, ROW_NBYTES * self.batch_size):
            count += self.assembly.lay_out(self.make_batch(), self.assembly.epoch_ends)
        return count

    def take(self) -> OpenBatch | EpochEnd | None:
        """Take what is ready, and note it."""
        item = self.assembly.take()
        if isinstance(item, EpochEnd):
            self.epoch_ends.append((item.epoch, len(self.taken)))
        elif item is not None:
            self.batches.append(item)
            arrays = []
            for array, axis in zip(item.arrays, self.axes, strict=True):
                arrays.append(np.array(array[:, : item.filled] if axis else array[: item.filled]))
            self.taken.append(arrays)
        return item

    def step(self) -> OpenBatch | EpochEnd | None:
        """What the enqueuer does between two sleeps, once."""
        self.assembly.watch()
        self.before_step()
        self.lay_out()
        item = self.take()
        self.after_step()
        return item

    def run(self, threads: Sequence[threading.Thread] = (), until: Callable[[], bool] = lambda: False) -> None:
        """Play the enqueuer until the assembly is drained. Fails, with the stacks of these threads, if it sleeps for ever."""
        while not until():
            if self.step() is not None:
                continue
            if self.assembly.drained:
                return
            try:
                self.wake.get(timeout=LIMIT_SECONDS)
            except queue.Empty:
                stacks = stacks_of(threads)
                self.assembly.abort()
                raise AssertionError(f"the enqueuer was not woken; fetchers:\n{stacks or 'all ended'}") from None

    @property
    def rows_taken(self) -> int:
        return sum(batch.filled for batch in self.batches)


class Placing:
    """A call of `place` in a thread of its own, of a self-certifying chunk."""

    def __init__(
        self,
        driver: Driver,
        worker: int,
        rows: int,
        call: int = 0,
        request: FetchRequest | None = None,
        ours: Sequence[bool] | None = None,
    ) -> None:
        self.recorder = FetcherRecorder(worker)
        self.rows = rows
        self.chunk = make_chunk(worker, call, rows, inputs=INPUTS, axes=driver.axes)
        self.result: Unplaced | None = None
        self.error: BaseException | None = None
        self._assembly = driver.assembly
        self._arguments = rows, rows * ROW_NBYTES, request, ours, self.recorder
        self.thread = threading.Thread(target=self._run, name=f"fetcher-{worker}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self._assembly.place(self.chunk, *self._arguments)
        except BaseException as error:
            self.error = error

    def await_blocked(self) -> None:
        """Wait until it waits for room or for its turn."""
        spin_until(lambda: self.recorder.blocked[1] != math.inf or not self.thread.is_alive(), [self.thread])
        assert self.thread.is_alive(), "it did not wait"

    def await_end(self) -> Unplaced | None:
        """Wait until it has ended, and return what `place` returned."""
        self.thread.join(LIMIT_SECONDS)
        if self.thread.is_alive():
            stacks = stacks_of([self.thread])
            self._assembly.abort()
            raise AssertionError(f"it waits for ever:\n{stacks}")
        if self.error is not None:
            raise self.error
        return self.result


def spin_until(condition: Callable[[], bool], threads: Sequence[threading.Thread] = ()) -> None:
    """Wait for a state that nothing announces."""
    tick = threading.Event()
    for _ in range(int(LIMIT_SECONDS / 0.0005)):
        if condition():
            return
        tick.wait(0.0005)
    raise AssertionError(f"never came true; threads:\n{stacks_of(threads)}")


def place(driver: Driver, worker: int, rows: int, call: int = 0, **more: Any) -> Unplaced | None:
    """Place a chunk that need not wait; fails if it does."""
    return Placing(driver, worker, rows, call, **more).await_end()


def close_after(driver: Driver, placings: Sequence[Placing]) -> threading.Thread:
    """Close the assembly when all of these have ended, as the last fetcher does; return the thread that does so."""

    def close() -> None:
        for placing in placings:
            placing.thread.join(LIMIT_SECONDS)
        driver.assembly.close()

    return started(close)


def rows_of(driver: Driver) -> list[tuple[int, int]]:
    """Return (worker, row) of every row that was taken."""
    seen = [check_batch(batch, axes=driver.axes) for batch in driver.taken]
    return [(row[WORKER], row[ROW]) for batch in seen for row in batch.tolist()]


def pack(driver: Driver, worker: int, rows: int, call: int = 0) -> bool:
    """Offer a chunk to be packed."""
    return driver.assembly.pack(make_chunk(worker, call, rows), rows)


def started(call: Callable[[], Any]) -> threading.Thread:
    """Return a thread that makes the call."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


@contextmanager
def hasty_threads() -> Iterator[None]:
    """Let the interpreter switch between threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
