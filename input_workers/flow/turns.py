"""Whose turn it is to reserve rows: in the order of the requests, epoch by epoch, or both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from input_workers.contracts import FetchRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from input_workers.errors import Failure

__all__ = ["Parked", "Turns"]


class Parked(NamedTuple):
    """A chunk that waits: for room, or for its turn. Where it is kept, nothing else refers to its arrays."""

    arrays: Sequence[NDArray[Any]]
    rows: int
    nbytes: int
    request: FetchRequest | None


class Turns:
    """The order of a Stream's requests, and the chunks that came before their turn. Not thread-safe.

    Args:
        ordered: in the order of the requests' ordinals, which count from 0.
        requests_in: returns how many requests an epoch has in this run. With it epochs are kept apart: the requests of an
            epoch wait until all those of the epoch before it have had their turn.
        first_epoch: the epoch of the first request.
    """

    # `_parked` holds chunks and failures by ordinal, all of them beyond `_next`. `_bar` is the ordinal of the earliest
    # request that failed: nothing from there on is placed. `_announced` are the sizes of chunks that are being copied aside.

    def __init__(self, ordered: bool, requests_in: Callable[[int], int] | None, first_epoch: int) -> None:
        self.ordered = ordered
        self._keeps_epochs = requests_in is not None
        self._requests_in: Callable[[int], float] = requests_in or (lambda epoch: math.inf)  # noqa: ARG005
        self._next = 0
        self._epoch = first_epoch
        self._passed = 0  # requests of this epoch that have had their turn
        self._parked: dict[int, Parked] = {}
        self._sizes: dict[int, tuple[int, int]] = {}  # of parked and announced chunks: (weight, bytes)
        self._failures: dict[int, Failure] = {}
        self._bar: float = math.inf

    def is_next(self, request: FetchRequest | None) -> bool:
        """Whether it is this request's turn."""
        assert request is not None  # noqa: S101  a plain function's chunks have no order
        if self.ordered:
            return request.ordinal == self._next
        return request.epoch <= self._epoch

    def is_barred(self, request: FetchRequest | None) -> bool:
        """Whether the request comes after one that failed."""
        assert request is not None  # noqa: S101
        return request.ordinal >= self._bar

    def pass_turn(self) -> list[int]:
        """A request has had its turn; return the epochs that end with it."""
        self._next += 1
        self._passed += 1
        return self.ended_epochs()

    def ended_epochs(self) -> list[int]:
        """Return the epochs of which no request is left, and go on to the one after them."""
        ended: list[int] = []
        while self._keeps_epochs and self._passed >= self._requests_in(self._epoch):
            ended.append(self._epoch)
            self._epoch += 1
            self._passed = 0
        return ended

    def announce(self, request: FetchRequest | None, weight: int, nbytes: int) -> None:
        """A chunk is being copied aside: its room is taken from now on."""
        assert request is not None  # noqa: S101
        self._sizes[request.ordinal] = weight, nbytes

    def withdraw(self, request: FetchRequest | None) -> None:
        """The chunk that was announced has been copied, or could not be."""
        assert request is not None  # noqa: S101
        self._sizes.pop(request.ordinal, None)

    def park(self, chunk: Parked, weight: int) -> None:
        """Keep a chunk until its turn."""
        assert chunk.request is not None  # noqa: S101
        self._parked[chunk.request.ordinal] = chunk
        self._sizes[chunk.request.ordinal] = weight, chunk.nbytes

    def next_parked(self) -> Parked | None:
        """Return the parked chunk whose turn it is, which is parked no longer; None: it has not come."""
        chunk = self._parked.pop(self._next, None)
        if chunk is not None:
            del self._sizes[self._next]
        return chunk

    @property
    def parked(self) -> tuple[int, int]:
        """Weight and bytes of parked and announced chunks."""
        sizes = list(self._sizes.values())  # in one step: a signal handler may empty it between two others
        return sum(weight for weight, _ in sizes), sum(nbytes for _, nbytes in sizes)

    def forget_parked(self) -> int:
        """Forget the parked chunks; return their rows."""
        rows = sum(chunk.rows for chunk in self._parked.values())
        self._parked.clear()
        self._sizes.clear()
        return rows

    def fail(self, request: FetchRequest, failure: Failure) -> None:
        """A request failed: it is the last that is placed, if none before it fails too."""
        self._failures[request.ordinal] = failure
        self._bar = min(self._bar, request.ordinal)

    @property
    def next_has_failed(self) -> bool:
        """Whether it is the turn of a request that failed."""
        return self._next in self._failures

    def take_failures(self) -> list[Failure]:
        """Return the failures since the last time, the earliest request's first."""
        failures = [failure for _, failure in sorted(self._failures.items(), key=itemgetter(0))]
        self._failures.clear()
        return failures
