"""Recovery from a call that failed: retries, and skipping of exactly the bad rows, as the ErrorPolicy says.

A Stream's request that goes on failing is split: the rows that the source named as bad are skipped and the others are
fetched once more; where it named none, each row is fetched alone, and those that fail are skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from input_workers.contracts import FetchRequest
from input_workers.errors import BadRows, EndOfData, SpecMismatch, WorkerDied, describe
from input_workers.fetchers.chunk_check import ChunkCheck
from input_workers.policy import MAX_ERROR_CHARS, ErrorPolicy

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TAKEN_AWAY", "Attempt", "AttemptReport", "AttemptState", "CallObserver", "Skipped", "keep_rows"]

TAKEN_AWAY = object()


def keep_rows(arrays: Sequence[NDArray[Any]], kept: NDArray[np.int64], axes: Sequence[int]) -> list[NDArray[Any]]:
    """Return copies of these rows."""
    return [np.take(array, kept, axis) for array, axis in zip(arrays, axes, strict=True)]


def _concatenate(parts: Sequence[NDArray[Any]], axis: int) -> NDArray[Any]:
    """Join arrays of one dtype. np.concatenate alone changes a dtype: byte order, and gaps between fields."""
    first = parts[0]
    rows = sum(part.shape[axis] for part in parts)
    out = np.empty((*first.shape[:axis], rows, *first.shape[axis + 1 :]), first.dtype)
    return np.concatenate(parts, axis, out=out, casting="no")


def _row_shapes(arrays: Sequence[NDArray[Any]], axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    return tuple(array.shape[:axis] + array.shape[axis + 1 :] for array, axis in zip(arrays, axes, strict=True))


class Skipped(NamedTuple):
    """What was skipped at once: rows of a request, by their place in it, or (no rows) a call of a plain function."""

    rows: tuple[int, ...]
    text: str
    error: BaseException


class AttemptState(NamedTuple):
    """What is left of an attempt. Plain data, for a worker process that takes the place of another."""

    left: list[int]
    is_split: bool
    is_together: bool
    tries: int
    not_before: float


class AttemptReport(NamedTuple):
    """What an attempt in a worker process has done since the report before. Plain data.

    The size of a report does not depend on that of the request, because a request is split into as many calls as it has rows.

    Attributes:
        row: which is being fetched alone, if `is_split`.
        skipped: the fields of each `Skipped`; its error in the form of `frames.raised` while it is sent.
        calls: of each call the name of its error, or "", and when it began and ended. One that has ended the attempt is told
            with the answer.
        is_calling: a call begins now.
    """

    row: int
    is_split: bool
    is_together: bool
    tries: int
    skipped: Sequence[tuple[tuple[int, ...], str, Any]]
    calls: list[tuple[str, float, float]]
    is_calling: bool


class CallObserver(Protocol):
    """Observes each call that an Attempt makes: a `Fetcher`, or `attempt_reporter.AttemptReporter` in a worker process."""

    def begin_call(self, request: FetchRequest | None) -> None:
        """A call begins."""

    def end_call(self, failed: bool = False) -> bool:
        """It has ended; False: it was taken away, and its result is not used."""

    def count_error(self, name: str) -> None:
        """It raised an error of this name."""


class Attempt:
    """One call that failed, and the calls made in its place. Used by one fetcher at a time.

    Where calls are made in a worker process, the attempt runs there; an attempt in the parent, which never runs, adds up its
    reports, so that what was skipped is known, and another process can go on.

    Args:
        policy: what to do.
        request: what failed; None: a call of a plain function.
        state: what an attempt in another process has left.

    Attributes:
        request: what failed. Where rows were skipped, its `kept` says which are left.
        durations: of the calls that came back with rows, in seconds.
        row: which is fetched next.
        is_split: each row is fetched alone.
        is_together: rows that came one by one are fetched again in one call.
        tries: how often the next call has failed.
    """

    # Invariant: every row of the request is in `_left`, was fetched (`_got`), or was skipped (`_bad`).

    def __init__(self, policy: ErrorPolicy, request: FetchRequest | None, state: AttemptState | None = None) -> None:
        self.request = request
        self.durations: list[float] = []
        self._policy = policy
        self._size = len(request.rows) if request is not None else 1
        self._skipped: list[Skipped] = []
        self._bad: set[int] = set()
        self._got: list[tuple[list[int], Sequence[NDArray[Any]]]] = []
        self._left, self.is_split, self.is_together, self.tries, self._not_before = state or AttemptState(
            list(range(self._size)), False, False, 0, 0.0
        )
        self.row = self._left[0]

    @property
    def is_over(self) -> bool:
        """Whether everything was fetched or skipped."""
        return not self._left

    @property
    def state(self) -> AttemptState:
        """What is left."""
        return AttemptState(self._left, self.is_split, self.is_together, self.tries, self._not_before)

    def take_skipped(self) -> list[Skipped]:
        """Return what was skipped since the last time."""
        skipped, self._skipped = self._skipped, []
        return skipped

    def add_report(self, report: AttemptReport) -> None:
        """Add what the attempt in a worker process has done."""
        self.row, self.is_split = report.row, report.is_split
        self.is_together, self.tries = report.is_together, report.tries
        self.durations += [ended - began for name, began, ended in report.calls if not name]
        for each in report.skipped:
            self._skip(*each)

    def rewind(self) -> None:
        """The process is gone, and what it has fetched too: begin with the call that it was in, then fetch the others again."""
        self._left = [row for row in range(self._size) if row not in self._bad]
        if self.is_split and self.row not in self._bad:
            self._left.remove(self.row)
            self._left.insert(0, self.row)

    def failed(self, error: BaseException, observer: CallObserver) -> None:
        """Decide what follows the next call, which raised this. Raises the error, if the policy is to raise it."""
        policy = self._policy
        if not isinstance(error, Exception) or isinstance(error, (SpecMismatch, EndOfData, WorkerDied)):
            raise error
        self.tries += 1
        if self.tries <= policy.retries:
            observer.count_error(type(error).__name__)
            self._not_before = time.monotonic() + policy.wait_seconds(self.tries)
            return
        if not policy.skip:
            if policy.retries:
                error.add_note(f"tried {self.tries} times")
            raise error
        self.tries = 0
        group = self._group()
        bad = self._named(error, group) or (group if len(group) == 1 else [])
        if bad:
            self._skip(() if self.request is None else tuple(bad), describe(error)[:MAX_ERROR_CHARS], error)
            if len(group) == 1:
                del self._left[0]
            else:
                self._left = [row for row in self._left if row not in self._bad]
        else:
            self.is_split = True
        observer.count_error(type(error).__name__)

    def run(
        self,
        fetch: Callable[[FetchRequest | None], Any],
        check: ChunkCheck,
        observer: CallObserver,
        pause: Callable[[float], bool],
        go_on: Callable[[], bool],
    ) -> Any:
        """Fetch what is left; return the rows that came, in order, or None: there are none, or it is not over yet.

        `request.kept` then says which rows they are. TAKEN_AWAY: another fetcher goes on with this attempt, which the caller
        must not touch any more. Raises what `failed` raises.

        Args:
            fetch: makes a call for a request; of a plain function, for None.
            check: of the results.
            observer: observes each call.
            pause: waits before a retry, or less when the run ends; returns whether it has.
            go_on: says whether to go on now.
        """
        while self._left:
            if not go_on():
                return None
            wait = self._not_before - time.monotonic()
            if wait > 0:
                if pause(wait):
                    return None
                continue
            group = self._group()
            part = self._part(group)
            self.row = group[0]
            # Observers know the whole request: a part has its number, but not all of its rows.
            observer.begin_call(self.request)
            started = time.monotonic()
            try:
                arrays = fetch(part)
            except Exception as error:
                if not observer.end_call(failed=not isinstance(error, EndOfData)):
                    return TAKEN_AWAY
                self.failed(error, observer)
                continue
            if not observer.end_call():
                return TAKEN_AWAY
            self.durations.append(time.monotonic() - started)
            if self.request is not None:
                check.rows_of(arrays, part)
                if len(group) < len(self._left):  # the source may use its memory again for the next
                    arrays = [array.copy() for array in arrays]
                self._got.append((group, arrays))
            del self._left[: len(group)]
            self.tries = 0
            if self.request is None:
                return arrays
        if self.request is None:
            return None
        if not self._got:
            return ()
        if len({_row_shapes(arrays, check.axes) for _, arrays in self._got}) > 1:
            self._fetch_together()
            return self.run(fetch, check, observer, pause, go_on)
        self._got.sort(key=lambda each: each[0][0])  # a row that hung is the first to be fetched by another process
        pieces = list(zip(*(arrays for _, arrays in self._got), strict=True))
        joined = [
            parts[0] if len(parts) == 1 else _concatenate(parts, axis) for parts, axis in zip(pieces, check.axes, strict=True)
        ]
        return self.keep(joined, check.axes)

    def keep(self, arrays: Sequence[NDArray[Any]], axes: Sequence[int]) -> Sequence[NDArray[Any]]:
        """Return what is to be delivered of the rows that were not skipped, and note in the request which they are."""
        assert self.request is not None  # noqa: S101  only a Stream's rows are kept
        rows = np.array([row for row in range(self._size) if row not in self._bad], np.int64)
        if self.request.kept is not None:  # an earlier run has delivered the others
            kept = np.isin(rows, self.request.kept)
            arrays, rows = keep_rows(arrays, np.flatnonzero(kept), axes), rows[kept]
        if len(rows) < self._size:
            self.request.kept = rows
        return arrays if len(rows) else ()

    def _group(self) -> list[int]:
        """Return the rows of the next call."""
        return self._left[:1] if self.is_split else self._left[:]

    def _fetch_together(self) -> None:
        """Rows of any length came one by one, filled up to no common length: they are fetched again, in one call."""
        if self.is_together:
            raise SpecMismatch(
                "the rows of a request were fetched one by one, with shapes that make no chunk, and failed in one call; rows "
                "must have one shape, or the source must name the bad ones by BadRows"
            )
        self._left = sorted(row for group, _ in self._got for row in group)
        self.is_together, self.is_split, self._got = True, False, []

    def _part(self, group: list[int]) -> FetchRequest | None:
        request = self.request
        if request is None:
            return None
        if len(group) == self._size:
            return request.part(request.rows)
        rows = request.rows[group]
        rows.flags.writeable = False
        # A row alone has random numbers of its own; the good rows of a request that named its bad ones have the request's.
        return request.part(rows, *(group if len(group) == 1 else ()))

    def _named(self, error: Exception, group: list[int]) -> list[int]:
        """Return which rows of the group the error names as bad."""
        if not isinstance(error, BadRows) or self.request is None:
            return []
        names = set(error.rows)
        return [row for row in group if int(self.request.rows[row]) in names]

    def _skip(self, rows: tuple[int, ...], text: str, error: BaseException) -> None:
        self._bad.update(rows)
        request = self.request
        if request is not None and request.kept is not None:  # what an earlier run has delivered is not skipped in this one
            rows = tuple(row for row in rows if row in request.kept)
        if rows or request is None:
            self._skipped.append(Skipped(rows, text, error))
