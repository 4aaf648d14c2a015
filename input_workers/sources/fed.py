"""What the trainer gives, one thing after the other, goes in; a request for each comes out, fetched ahead of the trainer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.contracts import FetchRequest
from input_workers.progress import Spans
from input_workers.sources.mix import ENDLESS
from input_workers.sources.stream import Stream

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FedPlan", "FedStream"]


class FedStream(Stream):
    """A Stream whose requests the trainer gives as it goes, for a sampler that must run in the trainer's own thread.

    Each request is one row: request number n is for what was given n-th, and a fetcher that finds none waits for the next.
    It has no end of its own and no state; one object is for one run. Thread-safe.

    Args:
        fetch: `fetch(rows, request)` returns arrays of one row; `rows[0]` is what was given: bytes as uint8, or the tuple.
            Pickled for fetchers in other processes.
        seed: of the requests' random numbers.
    """

    # Invariant under _lock: `_given` holds what was given and not forgotten, by number; `_count` is how many were given.

    def __init__(self, fetch: Callable[[NDArray[Any], FetchRequest], Sequence[NDArray[Any]]], seed: int = 0) -> None:
        super().__init__(_NoRows(), seed=seed, rows_per_request=1)
        self._fetch = fetch
        self._given: dict[int, NDArray[Any]] = {}
        self._count = 0
        self._allow: Callable[[int], object] = lambda count: None  # noqa: ARG005
        self._lock = threading.Lock()

    def plan(  # type: ignore[override]
        self, last_batch: str, batch_axes: Sequence[int], left: Mapping[int, Spans] | None = None
    ) -> FedPlan:
        """Return what has the requests' rows; see `Stream.plan`."""
        return FedPlan(self._given, self._fetch, self._follow)

    def give(self, content: bytes | tuple[Any, ...]) -> int:
        """Let this be fetched next; return its number, which is its request's index. A tuple is for threads, as it is."""
        if isinstance(content, bytes):
            row: NDArray[Any] = np.frombuffer(content, np.uint8)[np.newaxis]
        else:
            row = np.empty(1, object)
            row[0] = content
        with self._lock:
            number = self._count
            self._given[number] = row
            self._count += 1
        self._allow(number + 1)
        return number

    def forget(self, number: int) -> None:
        """It was delivered, and will not be fetched again in the place of a worker that died."""
        with self._lock:
            self._given.pop(number, None)

    def _follow(self, allow: Callable[[int], object]) -> None:
        with self._lock:
            self._allow = allow
            count = self._count
        allow(count)


class _NoRows:
    """Stands where a Stream has its source."""

    def __len__(self) -> int:
        return ENDLESS

    def fetch(self, rows: NDArray[np.int64], request: FetchRequest) -> Sequence[NDArray[Any]]:
        raise NotImplementedError


class FedPlan:
    """What the requests of a FedStream are. `follow` is given what to call with the number of requests there are."""

    epochs: int | None = 1
    most_rows = ENDLESS
    left: Mapping[int, Spans] = {}

    def __init__(
        self,
        given: dict[int, NDArray[Any]],
        fetch: Callable[[NDArray[Any], FetchRequest], Sequence[NDArray[Any]]],
        follow: Callable[[Callable[[int], object]], None],
    ) -> None:
        self._given = given
        self._fetch = fetch
        self.follow = follow

    def __getstate__(self) -> dict[str, Any]:
        return {"_fetch": self._fetch}  # a worker process only fetches

    def epoch_rows(self, epoch: int) -> int:
        """Return more than are ever given."""
        return ENDLESS

    def rows(self, epoch: int, begin: int, stop: int) -> NDArray[Any]:
        """Return what was given under this number, as the only row: uint8 (1, bytes), or object (1,)."""
        return self._given[begin]

    def fetch(self, rows: NDArray[Any], request: FetchRequest) -> Sequence[NDArray[Any]]:
        """Fetch it."""
        return self._fetch(rows, request)

    def file_of(self, row: int) -> str | None:
        """Nothing is known."""
        return None
