"""A fetch function whose every call waits for the test: one step of a test is one known step of the product.

Nothing sleeps: a call waits on a condition until it is told what to return, and the test waits on the same condition until
the calls it needs are there.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from threading import Condition
from typing import Any

from self_certifying import make_chunk

import input_workers as iw

# Nothing a test waits for takes long; a test that hangs fails after this.
HANG_SECONDS = 30.0


class Gate:
    """A fetch function that blocks until `release`, `raise_in`, `end` or `tell` says what a call does.

    Orders for a worker go to that worker alone; orders for None to whoever comes first.
    """

    def __init__(self, source: int = 0, inputs: int = 2) -> None:
        self._source, self._inputs = source, inputs
        self._changed = Condition()
        self._orders: dict[int | None, collections.deque[Callable[[int], Any]]] = collections.defaultdict(collections.deque)
        self._calls: collections.Counter[int] = collections.Counter()
        self._waiting: set[int] = set()
        self._always: Callable[[int], Any] | None = None
        self.released_rows = 0

    def __call__(self, worker_id: int, batch_size: int) -> Any:
        with self._changed:
            self._waiting.add(worker_id)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._orders[worker_id] or self._orders[None] or self._always)
            self._waiting.discard(worker_id)
            order = self._always or (self._orders[worker_id] or self._orders[None]).popleft()
            self._changed.notify_all()
        return order(worker_id)

    def tell(self, order: Callable[[int], Any], worker: int | None = None) -> None:
        """Let the next call do `order(worker_id)`."""
        with self._changed:
            self._orders[worker].append(order)
            self._changed.notify_all()

    def release(self, rows: int, worker: int | None = None) -> None:
        """Let the next call return a chunk of so many self-certifying rows."""
        self.tell(lambda worker_id: self._chunk(worker_id, rows), worker)

    def _chunk(self, worker_id: int, rows: int) -> Any:
        with self._changed:
            call = self._calls[worker_id]
            self._calls[worker_id] += 1
            self.released_rows += rows
        return make_chunk(worker_id, call, rows, self._source, self._inputs)

    def raise_in(self, error: BaseException, worker: int | None = None) -> None:
        """Let the next call raise this."""
        self.tell(lambda worker_id: _raise(error), worker)

    def end(self, worker: int | None = None) -> None:
        """Let the next call say that its worker has no more data."""
        self.raise_in(iw.EndOfData(), worker)

    def open(self, order: Callable[[int], Any] = lambda worker_id: None) -> None:
        """Let every call, waiting or to come, do this (return None) until `shut`."""
        with self._changed:
            self._orders.clear()
            self._always = order
            self._changed.notify_all()

    def shut(self) -> None:
        """Let calls wait again."""
        with self._changed:
            self._always = None

    def await_calls(self, count: int = 1) -> None:
        """Wait until so many workers wait in here and every order was taken: what was fetched before has been put."""
        with self._changed:
            taken = self._changed.wait_for(lambda: len(self._waiting) >= count and not any(self._orders.values()), HANG_SECONDS)
        assert taken, f"{len(self._waiting)} of {count} workers came back"


def _raise(error: BaseException) -> None:
    raise error


def register(coordinator: iw.GlobalCoordinator, fetch: Any, batch_size: int = 4, name: str = "train", **more: Any) -> Any:
    """Register a source of two inputs on the NumPy feed with one worker; return its handle."""
    more = {"num_workers": 1, "timeout_s": HANG_SECONDS, **more}
    feed = more.pop("feed", "numpy")
    names = more.pop("input_names", ["data", "label"])
    iw.init_data_input_workers(feed, names, fetch, batch_size, input_source_name=name, coordinator=coordinator, **more)
    return coordinator[name]


def await_true(condition: Callable[[], bool], what: str = "condition") -> None:
    """Wait for a number that only a snapshot shows. Fails after HANG_SECONDS."""
    deadline = time.monotonic() + HANG_SECONDS
    tick = Condition()
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {what}"
        with tick:
            tick.wait(0.001)
