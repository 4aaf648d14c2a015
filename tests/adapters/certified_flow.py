"""A DataFlow for tests whose data points say which they are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from fetchers.shared_between import FileCounter, certified_rows


class Certified:
    """A DataFlow of self-certifying data points, rows or batches; `reset_state` gives it random numbers, once."""

    def __init__(self, size: int, rows: int = 0, counter: FileCounter | None = None, at: Any = None) -> None:
        self.size, self.rows, self.counter, self.at = size, rows, counter, at or {}
        self.resets: list[int] = []
        self.rng: Any = None

    def reset_state(self) -> None:
        assert self.rng is None, "reset_state was called twice"
        self.rng = np.random.default_rng()
        self.resets.append(threading.get_ident())
        if self.counter is not None:
            self.counter.add()

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Any]:
        assert self.rng is not None, "reset_state was not called"
        for number in range(self.size):
            if number in self.at:
                point = self.at[number]
                if isinstance(point, BaseException):
                    raise point
                yield point
            else:
                rows = np.arange(number * self.rows, (number + 1) * self.rows) if self.rows else [number]
                data, label = certified_rows(rows)
                yield [data, label] if self.rows else [data[0], label[0]]


def number_of(point: Any) -> int:
    """Return which data point this is; fails unless it is whole."""
    data, label = point
    assert (data == certified_rows([int(label)])[0][0]).all(), point
    return int(label)


def certified_point(number: int) -> list[Any]:
    """Return the data point of this number."""
    return [column[0] for column in certified_rows([number])]
