"""Small restatements of faulty algorithms of the ancestors, written anew to be tested against: each shows one defect."""

from __future__ import annotations

import collections
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import input_workers as iw


class AppendAndSplit:
    """A worker that gathers chunks with np.append, splits off a batch, and puts the rest back into the shared queue.

    Shows DW1 (a full queue drops the rest), DW2 (the rest goes behind later chunks), DW3 (np.append changes dtypes), DW4 and
    DW5 (emptiness is looked for on axis 0), DW6 (each append copies everything), DW7 (chunks are not copied), DW22 (views).
    """

    def __init__(self, batch_size: int, capacity: int, axes: Sequence[int] = (0, 0)) -> None:
        self.batch_size = batch_size
        self.axes = axes
        self.queue: queue.Queue[list[np.ndarray]] = queue.Queue(capacity)
        self.copied_rows = 0

    def put(self, chunk: Sequence[np.ndarray]) -> None:
        self.queue.put(list(chunk), timeout=1)

    def batch(self, on_get: Callable[[], None] = lambda: None, calls: int = 10_000) -> list[np.ndarray] | None:
        """Return a batch; None when the queue has run dry (or after so many gets)."""
        current: list[np.ndarray] = [np.array([]) for _ in self.axes]
        while calls:
            calls -= 1
            try:
                chunk = self.queue.get_nowait()
            except queue.Empty:
                return None
            on_get()
            if current[0].shape[0] == 0:
                current = chunk
            else:
                self.copied_rows += current[0].shape[self.axes[0]] + chunk[0].shape[self.axes[0]]
                current = [np.append(a, b, axis=axis) for a, b, axis in zip(current, chunk, self.axes, strict=True)]
            if current[0].shape[self.axes[0]] >= self.batch_size:
                cut = [np.split(a, [self.batch_size], axis=axis) for a, axis in zip(current, self.axes, strict=True)]
                rest = [part[1] for part in cut]
                if rest[0].shape[self.axes[0]]:
                    try:
                        self.queue.put(rest, block=False)
                    except queue.Full:
                        pass
                return [part[0] for part in cut]
        return None


def run_without_guard(work: Callable[[], Any], finished: threading.Event) -> threading.Thread:
    """DW8: an enqueuer without try/except; whoever waits for `finished` waits in vain."""

    def run() -> None:
        try:
            work()
        except Exception:  # the thread dies here; the original's stderr is all that says so
            return
        finished.set()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


class SilentStop:
    """DW9 and DW10: an error of the fetch function only closes the queue; SystemExit does not even do that."""

    def __init__(self, fetch: Callable[[], Any]) -> None:
        self.closed = threading.Event()
        self._fetch = fetch
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            try:
                self._fetch()
            except Exception:
                self.closed.set()
        except BaseException:  # what the threading module does with SystemExit
            pass

    def next_batch(self, timeout_s: float) -> None:
        if self.closed.wait(timeout_s):
            raise RuntimeError("queue closed")
        raise TimeoutError


def ask_at_once(fetch: Callable[[], Any], calls: int) -> int:
    """DW11: ask again at once, with a line of log each time."""
    lines = 0
    for _ in range(calls):
        if fetch() is None:
            lines += 1
    return lines


def checked_by_assert(chunk: Sequence[np.ndarray]) -> int:
    """DW12: looks at the number of arrays after the first was used, with assertions that -O removes."""
    rows = len(chunk[0])
    if len(chunk) == 0:
        return 0
    for array in chunk:
        assert isinstance(array, np.ndarray)
    return rows


def join_one_by_one(threads: Sequence[threading.Thread], each_s: float) -> None:
    """DW13: five seconds for each thread, one after the other."""
    for thread in threads:
        thread.join(each_s)


class QueuesByName:
    """DW14 and DW15: a named queue outlives its run; a later start finds its chunks, and no thread."""

    def __init__(self) -> None:
        self.queues: dict[str, collections.deque[Any]] = {}
        self.workers: list[Callable[[collections.deque[Any]], None]] = []

    def start(self, name: str) -> collections.deque[Any]:
        found = self.queues.setdefault(name, collections.deque())
        for worker in self.workers:
            worker(found)
        return found

    def stop(self) -> None:
        self.workers = []


class QueuePerArray:
    """DW17: each array of a batch goes into a queue of its own, and nobody looks at what `put` returned."""

    def __init__(self, count: int) -> None:
        self.queues: list[list[np.ndarray]] = [[] for _ in range(count)]
        self.closed = False
        self.counted = 0

    def put(self, arrays: Sequence[np.ndarray], between: Callable[[], None] = lambda: None) -> None:
        for index, array in enumerate(arrays):
            if not self.closed:
                self.queues[index].append(array)
            between()
        self.counted += 1


class SharedSums:
    """DW18: sums in one dict without a lock; DW19: rates by the wall clock."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self._since = time.time()

    def put(self, key: str, value: Any) -> None:
        self.sums[key] = self.sums.get(key, 0) + value

    def rate(self, rows: int) -> float:
        return rows / (time.time() - self._since)


class UnlockedIds:
    """DW20: a counter that is read, and written later."""

    def __init__(self, between: Callable[[], None]) -> None:
        self._next = 0
        self._between = between

    def new(self) -> int:
        taken = self._next
        self._between()
        self._next = taken + 1
        return taken


def start_in_turn(inits: Sequence[Callable[[], None]], start: Callable[[int], None]) -> None:
    """DW23: init and start of each source in turn; a failing one leaves those before it running."""
    for index, init in enumerate(inits):
        init()
        start(index)


class FirstNoneEnds:
    """FS1, FS2, FS4: threads put None when they end, before an error is recorded; the first None ends the stream."""

    def __init__(self, parts: Sequence[Callable[[], Any]], before_record: Callable[[Any], None] = lambda self: None) -> None:
        self.queue: queue.Queue[Any] = queue.Queue()
        self.error: BaseException | None = None
        self._before_record = before_record
        for part in parts:  # one after the other: the interleaving that shows it
            self._run(part)

    def _run(self, part: Callable[[], Any]) -> None:
        error = None
        try:
            for item in part():
                self.queue.put(item)
        except Exception as raised:
            error = raised
        self.queue.put(None)
        self._before_record(self)
        self.error = error or self.error

    def __iter__(self) -> Any:
        while True:
            item = self.queue.get()
            if item is None or item == "EOF":
                return
            yield item


class UnboundedPut:
    """DW16 and FS5: the bound counts chunks, not their size, and a put into a full queue waits for ever."""

    def __init__(self, chunks: int) -> None:
        self.queue: queue.Queue[np.ndarray] = queue.Queue(chunks)

    def fill(self, nbytes: int, give_up_s: float) -> None:
        """Put until the queue is full; the original has no `give_up_s`, so its thread never ends."""
        try:
            while True:
                self.queue.put(np.empty(nbytes, np.uint8), timeout=give_up_s)
        except queue.Full:
            return

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.queue.queue)


class SizeReadTwice:
    """DW21: the batch size is read for the split, and again for the check."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def batch(self, rows: np.ndarray, between: Callable[[], None]) -> np.ndarray:
        cut = rows[: self.batch_size]
        between()
        assert len(cut) == self.batch_size
        return cut


def feed_of(chunks: list[Any]) -> Any:
    """Return a fetch function of ours that returns these chunks, one a call, and is then done."""
    left = list(chunks)

    def fetch(worker_id: int, batch_size: int) -> Any:
        if not left:
            raise iw.EndOfData
        return left.pop(0)

    return fetch
