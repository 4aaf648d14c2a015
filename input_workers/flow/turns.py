"""Chunks go in as they come, and come out when it is their turn: in the order of their requests, epoch by epoch, or at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import itemgetter

import numpy as np

from input_workers.contracts import Chunk, FetchRequest

__all__ = ["Turns", "is_end_mark", "ordinal_of"]


class Turns:
    """Whose turn it is. Not thread-safe.

    Args:
        ordered: in the order of the requests' ordinals, which count from 0.
        requests_in: epoch by epoch: an epoch ends, and an end mark follows, when so many of its requests have had their
            turn. The next epoch's wait until then.
        first_epoch: the epoch of the first request.

    Attributes:
        next: the ordinal of the request whose turn it is, where they are ordered; how many have had theirs.
    """

    # Parked chunks are those of `_parked`, by ordinal, all beyond `next`. `_bars` are the ends that were set, until they are
    # called; `_bar` is the earliest that ever was.

    def __init__(self, ordered: bool, requests_in: Callable[[int], int] | None, first_epoch: int) -> None:
        self.ordered = ordered
        self.next = 0
        self._keeps_epochs = requests_in is not None
        self._requests_in: Callable[[int], float] = requests_in or (lambda epoch: math.inf)  # noqa: ARG005
        self._parked: dict[int, Chunk] = {}
        self._bars: list[tuple[int, Callable[[], object]]] = []
        self._bar: float = math.inf
        self._epoch = first_epoch
        self._had = 0  # requests of this epoch that had their turn, of so many
        self._wanted = self._requests_in(first_epoch)

    @property
    def matter(self) -> bool:
        """Whether anybody has to wait for a turn."""
        return self.ordered or self._keeps_epochs

    def is_next(self, chunk: Chunk) -> bool:
        """Whether it is this chunk's turn."""
        if self.ordered:
            return ordinal_of(chunk) == self.next
        return not self._keeps_epochs or _epoch_of(chunk) <= self._epoch

    def park(self, chunk: Chunk) -> None:
        """Keep a chunk until its turn. Only where they are ordered."""
        self._parked[ordinal_of(chunk)] = chunk

    def enter(self, chunk: Chunk) -> list[Chunk]:
        """It is this chunk's turn: return it, unless it has no rows, and what follows at once."""
        entered: list[Chunk] = []
        following: Chunk | None = chunk
        while following is not None:
            if following[1]:
                entered.append(following)
            self.next += 1
            self._had += 1
            entered += self.end_marks()
            following = self._parked.pop(self.next, None) if self._parked else None
        return entered

    def end_marks(self) -> list[Chunk]:
        """Return the end mark of every epoch of which no request is left; at first, of those that have none."""
        marks: list[Chunk] = []
        while self._had >= self._wanted:
            marks.append(((), 0, 0, FetchRequest(-1, self._epoch, np.empty(0, np.int64))))
            self._epoch += 1
            self._had = 0
            self._wanted = self._requests_in(self._epoch)
        return marks

    def set_bar(self, ordinal: int, reached: Callable[[], object]) -> None:
        """Nothing is to come out from this request on. `reached` is to be called when all before it have had their turn."""
        self._bars.append((ordinal, reached))
        self._bar = min(self._bar, ordinal)

    def is_barred(self, chunk: Chunk) -> bool:
        """Whether the chunk comes behind a bar."""
        return ordinal_of(chunk) >= self._bar

    def reached_bars(self, ended: bool) -> list[Callable[[], object]]:
        """Return what is to be called now, the earliest request's first, and forget it.

        Args:
            ended: nothing will have its turn any more.
        """
        if not self._bars or (self.next < self._bar and not ended):
            return []
        bars, self._bars = sorted(self._bars, key=itemgetter(0)), []
        return [reached for _, reached in bars]

    @property
    def has_bars(self) -> bool:
        """Whether a bar was set and not called yet."""
        return bool(self._bars)

    def give_up(self) -> list[Chunk]:
        """Forget the parked chunks and return them."""
        parked, self._parked = list(self._parked.values()), {}
        return parked


def is_end_mark(chunk: Chunk) -> bool:
    """Whether this marks the end of an epoch."""
    return not chunk[1]


def ordinal_of(chunk: Chunk) -> int:
    """Return the ordinal of the chunk's request."""
    request = chunk[3]
    return request.ordinal if request is not None else 0


def _epoch_of(chunk: Chunk) -> int:
    request = chunk[3]
    return request.epoch if request is not None else 0
