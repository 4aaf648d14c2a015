"""A generator function whose every step waits for the test."""

from __future__ import annotations

import queue as queues
import threading
from collections.abc import Iterator
from typing import Any

from gates import HANG_SECONDS


class Turns:
    """A generator function whose every step waits until the test says what it does."""

    def __init__(self) -> None:
        self.orders: queues.Queue[Any] = queues.Queue()
        self.closed: list[str] = []
        self.asked = threading.Semaphore(0)

    def __call__(self) -> Iterator[Any]:
        try:
            while True:
                self.asked.release()
                order = self.orders.get(timeout=HANG_SECONDS)
                if order is None:
                    return
                if isinstance(order, BaseException):
                    raise order
                yield order
        finally:
            self.closed.append(threading.current_thread().name)

    def await_asked(self, times: int = 1) -> None:
        for _ in range(times):
            assert self.asked.acquire(timeout=HANG_SECONDS)
