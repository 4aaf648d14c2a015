"""The requests of one run of a Stream, dealt to its fetchers: a position goes in, numbered requests and their rows come out."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from input_workers.contracts import FetchRequest
from input_workers.errors import EndOfData, InputWorkersError
from input_workers.progress import Spans, gaps

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Caller", "Plan", "StreamCalls"]


class Caller(Protocol):
    """Who makes the calls: see `fetchers.fetcher.Fetcher`."""

    worker_id: int

    def begin_call(self, request: FetchRequest | None) -> None:
        """A call begins."""

    def begin_wait(self) -> None:
        """It waits for a request."""

    def end_wait(self) -> None:
        """A request has come."""


class Plan(Protocol):
    """Which rows are where: see `stream.StreamPlan` and `mix.MixPlan`. Thread-safe."""

    epochs: int | None
    most_rows: int

    def epoch_rows(self, epoch: int) -> int:
        """Return how many rows the epoch has."""

    def rows(self, epoch: int, begin: int, stop: int) -> NDArray[np.int64]:
        """Return the row numbers at the offsets begin to stop."""

    def fetch(self, rows: NDArray[np.int64], request: FetchRequest) -> Sequence[NDArray[Any]]:
        """Fetch them."""

    def file_of(self, row: int) -> str | None:
        """Return where a row is read from, if that is known."""


class StreamCalls:
    """Deals requests and makes their calls. Thread-safe.

    Args:
        plan: which rows are where.
        rows_per_request: rows of a request, but for the last of an epoch.
        batch_size: of the source, a hint for `fetch`.
        seed: of the requests' random numbers.
        first: the epoch to begin with.
        done: spans of offsets that earlier runs delivered, by epoch.
        lend: offers memory for a number of rows, one array per input, or None.
        allowed: how many requests there are so far; more come by `allow`, and whoever finds none waits for them.
    """

    owns_results = False
    is_stream = True

    # Invariant under _lock: every request before the cursor was dealt once, but for those in `_again`, which will be again.
    # The cursor is replaced as a whole: (ordinal of the next request, its epoch, numbers of requests to deal in that epoch).

    def __init__(
        self,
        plan: Plan,
        *,
        rows_per_request: int,
        batch_size: int,
        seed: int,
        first: int,
        done: Mapping[int, Sequence[tuple[int, int]]],
        lend: Callable[[int], list[NDArray[Any]] | None],
        allowed: float = math.inf,
    ) -> None:
        self.batch_size = batch_size
        self.rows_per_request = rows_per_request
        self.plan = plan
        self._seed = seed
        self._done = {epoch: list(spans) for epoch, spans in done.items()}
        self._lend = lend
        self._per_epoch = -(-plan.most_rows // rows_per_request)
        self._lock = threading.RLock()  # re-entrant, for a signal handler that stops the source
        self._changed = threading.Condition(self._lock)
        self._allowed = allowed
        self._is_closed = False
        self._cursor: tuple[int, int, Spans] = (0, first, self._numbers(first))
        self._again: list[tuple[int, int, int]] = []

    def requests_in(self, epoch: int) -> int:
        """Return how many requests of the epoch this run makes; without an end for one that is not there."""
        if self.plan.epochs is not None and epoch >= self.plan.epochs:
            return sys.maxsize
        return sum(stop - begin for begin, stop in self._numbers(epoch))

    def next(self, fetcher: Caller) -> tuple[Sequence[NDArray[Any]], FetchRequest]:
        """Fetch the next request's rows. Raises EndOfData after the last epoch, and what the source raises."""
        request = self.deal(fetcher)
        fetcher.begin_call(request)
        return self.fetch(request), request

    def make_retry_call(self, fetcher: Caller) -> Callable[[FetchRequest | None], Sequence[NDArray[Any]]]:
        """Return what fetches a request, or a part of one, once more."""
        return self.fetch

    def deal(self, fetcher: Caller) -> FetchRequest:
        """Return the next request, to be fetched by this fetcher. Raises EndOfData after the last epoch."""
        deal = self._deal(fetcher)
        assert deal is not None  # noqa: S101  it was waited for
        return self._request(deal, fetcher.worker_id)

    def deal_now(self, worker_id: int) -> FetchRequest | None:
        """Return the next request, or None while there is none yet. Raises EndOfData after the last epoch."""
        deal = self._deal(None)
        return None if deal is None else self._request(deal, worker_id)

    def allow(self, count: int) -> None:
        """There are so many requests now, or more: of several who give them, the last to say so may not be the last."""
        with self._lock:
            self._allowed = max(self._allowed, count)
            self._changed.notify_all()

    def close(self) -> None:
        """No more is wanted: whoever waits for a request gets EndOfData."""
        with self._lock:
            self._is_closed = True
            self._changed.notify_all()

    def give_back(self, requests: Sequence[FetchRequest]) -> None:
        """These were dealt and not fetched: deal them again, before others."""
        with self._lock:
            self._again += [(each.ordinal, each.epoch, each.begin // self.rows_per_request) for each in requests]
            self._again.sort()
            self._changed.notify_all()

    @property
    def function(self) -> Callable[[NDArray[np.int64], FetchRequest], Sequence[NDArray[Any]]]:
        """What fetches rows, wherever it is called."""
        return self.plan.fetch

    @property
    def has_pending_work(self) -> bool:
        """Whether a fetcher that rests has something left to fetch: requests that were given back."""
        return bool(self._again)

    @property
    def has_given_back(self) -> bool:
        """Whether requests wait to be dealt again."""
        return bool(self._again)

    def fetch(self, request: FetchRequest | None) -> Sequence[NDArray[Any]]:
        """Fetch the request's rows, all of them. Raises what the source raises."""
        assert request is not None  # noqa: S101  only plain functions are called without
        request.out = self._lend(len(request.rows))
        try:
            return self.plan.fetch(request.rows, request)
        except EndOfData as error:
            raise InputWorkersError(
                "the source of a Stream raised EndOfData; a Stream ends by the length of its source"
            ) from error

    def _deal(self, fetcher: Caller | None) -> tuple[int, int, int] | None:
        """Return (ordinal, epoch, number in the epoch) of the next request, waiting for it if a fetcher asks; else None."""
        with self._lock:
            while not self._again and self._cursor[0] >= self._allowed:
                if self._is_closed:
                    raise EndOfData
                if fetcher is None:
                    return None
                fetcher.begin_wait()
                self._changed.wait()
                fetcher.end_wait()
            if self._again:
                return self._again.pop(0)
            ordinal, epoch, numbers = self._cursor
            while not numbers:
                if self.plan.epochs is not None and epoch + 1 >= self.plan.epochs:
                    raise EndOfData
                epoch += 1
                numbers = self._numbers(epoch)
            number, stop = numbers[0]
            left = [(number + 1, stop), *numbers[1:]] if number + 1 < stop else numbers[1:]
            self._cursor = ordinal + 1, epoch, left
            return ordinal, epoch, number

    def _numbers(self, epoch: int) -> Spans:
        """Return which requests of an epoch are to be dealt: those that were not delivered whole."""
        if self.plan.epochs is not None and epoch >= self.plan.epochs:
            return []
        rows, each = self.plan.epoch_rows(epoch), self.rows_per_request
        numbers: Spans = []
        for begin, stop in gaps(self._done.get(epoch, ()), 0, rows):
            first, last = begin // each, -(-stop // each)
            if numbers and first <= numbers[-1][1]:
                numbers[-1] = numbers[-1][0], last
            else:
                numbers.append((first, last))
        return numbers

    def _request(self, deal: tuple[int, int, int], worker_id: int) -> FetchRequest:
        ordinal, epoch, number = deal
        begin = number * self.rows_per_request
        stop = min(begin + self.rows_per_request, self.plan.epoch_rows(epoch))
        kept: NDArray[np.int64] | None = None
        if epoch in self._done:
            wanted = gaps(self._done[epoch], begin, stop)
            if wanted != [(begin, stop)]:
                kept = np.concatenate([np.arange(first - begin, last - begin) for first, last in wanted])
        return FetchRequest(
            epoch * self._per_epoch + number,
            epoch,
            self.plan.rows(epoch, begin, stop),
            worker_id=worker_id,
            batch_size=self.batch_size,
            seed=self._seed,
            ordinal=ordinal,
            begin=begin,
            kept=kept,
        )
