"""A failed call goes in; what could be fetched after all comes out, or the failure: by retries, and by skipping.

A Stream's request that goes on failing is cut up: the rows that the source named as bad are skipped and the others fetched
once more; where it named none, each row is fetched alone, and those that fail are skipped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.contracts import FetchRequest
from input_workers.errors import BadRows, EndOfData, SpecMismatch, WorkerDied, describe
from input_workers.fetchers.chunk_check import ChunkCheck
from input_workers.metrics.fetcher_recorder import FetcherRecorder
from input_workers.policy import MAX_ERROR_CHARS, ErrorPolicy, Quarantine, QuarantinedRows

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Attempt", "Recovery", "keep_rows"]


def keep_rows(arrays: Sequence[NDArray[Any]], kept: NDArray[np.int64], axes: Sequence[int]) -> list[NDArray[Any]]:
    """Return copies of these rows."""
    return [np.take(array, kept, axis) for array, axis in zip(arrays, axes, strict=True)]


def _row_shapes(arrays: Sequence[NDArray[Any]], axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    return tuple(array.shape[:axis] + array.shape[axis + 1 :] for array, axis in zip(arrays, axes, strict=True))


class Recovery:
    """How a source recovers from failed calls. Thread-safe: what belongs to one request is its Attempt.

    Args:
        policy: says how.
        quarantine: accounts for what is skipped.
        drop: told how many rows of a Stream were skipped, after they were counted as fetched.
        file_of: returns where a row is read from, if that is known.
        abandons: a call may be taken away from a fetcher when it takes too long.
    """

    def __init__(
        self,
        policy: ErrorPolicy,
        quarantine: Quarantine,
        drop: Callable[[int], object],
        file_of: Callable[[int], str | None],
        abandons: bool = False,
    ) -> None:
        self.policy = policy
        self.quarantine = quarantine
        self.drop = drop
        self.file_of = file_of
        self.abandons = abandons


class Attempt:
    """One call that failed, and the calls made in its place. Used by one fetcher at a time.

    Args:
        recovery: of the source.
        request: what failed; None: a call of a plain function.
        fetch: makes a call for a request; of a plain function, for None.

    Attributes:
        request: what failed.
        durations: of the calls that came back with rows, in seconds.
    """

    def __init__(
        self,
        recovery: Recovery,
        request: FetchRequest | None,
        fetch: Callable[[FetchRequest | None], Any],
    ) -> None:
        self.request = request
        self.durations: list[float] = []
        self._recovery = recovery
        self._fetch = fetch
        # Groups of rows to fetch, in order: indices into the request's rows.
        self._groups = [list(range(len(request.rows) if request is not None else 1))]
        self._size = len(self._groups[0])
        self._tries = 0  # of the first group that failed
        self._not_before = 0.0  # when to try it again
        self._got: list[tuple[list[int], Sequence[NDArray[Any]]]] = []
        self._is_together = False  # what came one by one is fetched again in one call

    @property
    def is_over(self) -> bool:
        """Whether everything was fetched or skipped."""
        return not self._groups

    def failed(self, error: BaseException, recorder: FetcherRecorder) -> None:
        """The call for the first group raised this: decide what is next.

        Raises:
            Exception: the error, if the policy is to raise it; FetchFailed: too much was skipped.
        """
        policy = self._recovery.policy
        if not isinstance(error, Exception) or isinstance(error, (SpecMismatch, EndOfData, WorkerDied)):
            raise error
        self._tries += 1
        if self._tries <= policy.retries:
            recorder.count_error(type(error).__name__)
            self._not_before = time.monotonic() + policy.wait_seconds(self._tries)
            return
        if not policy.skip:
            if policy.retries:
                error.add_note(f"tried {self._tries} times")
            raise error
        self._tries = 0
        group = self._groups[0]
        bad = self._named(error, group)
        if bad:
            rest = [row for row in group if row not in bad]
            self._groups[:1] = [rest] if rest else []
            self._skip(sorted(bad), error, recorder)
        elif len(group) == 1:
            del self._groups[0]
            self._skip(group, error, recorder)
        else:
            self._groups[:1] = [[row] for row in group]
        recorder.count_error(type(error).__name__)

    def run(
        self, check: ChunkCheck, recorder: FetcherRecorder, idle: Callable[[float], object], go_on: Callable[[], bool]
    ) -> Any:
        """Fetch what is left; return the rows that came, in order, or None: there are none, or it is not over yet.

        `request.kept` then says which rows they are. Raises what `failed` raises.

        Args:
            check: of the results.
            recorder: of the fetcher.
            idle: waits so many seconds before a retry, or less when the run ends; returns whether it has.
            go_on: says whether to go on now. What is left may be fetched by running again.
        """
        recorder.call_started = math.inf  # a wait is no call
        while self._groups:
            if not go_on():
                return None
            wait = self._not_before - time.monotonic()
            if wait > 0:
                if idle(wait):
                    return None
                continue
            group = self._groups[0]
            part = self._part(group)
            started = recorder.call_started = time.monotonic()
            try:
                arrays = self._fetch(part)
            except Exception as error:
                if (trace := recorder.trace) is not None:
                    trace.add(trace.failed_call, started, time.monotonic())
                recorder.end_call(failed=not isinstance(error, EndOfData))
                self.failed(error, recorder)
                continue
            recorder.end_call()
            self.durations.append(time.monotonic() - started)
            if (trace := recorder.trace) is not None:
                trace.add(trace.call, started, started + self.durations[-1])
            if self.request is not None:
                check.rows_of(arrays, part)
                if len(self._groups) > 1:  # the source may use its memory again for the next
                    arrays = [array.copy() for array in arrays]
                self._got.append((group, arrays))
            del self._groups[0]
            self._tries = 0
            if self.request is None:
                return arrays
        if self.request is None:
            return None
        if not self._got:
            return ()
        if len({_row_shapes(arrays, check.axes) for _, arrays in self._got}) > 1:
            self._fetch_together()
            return self.run(check, recorder, idle, go_on)
        return self._joined(check)

    def _fetch_together(self) -> None:
        """Rows of any length came one by one, filled up to no common length: they are fetched again, in one call."""
        rows = [row for group, _ in self._got for row in group]
        if self._is_together:
            raise SpecMismatch(
                "the rows of a request came in calls of their own, with shapes that make no chunk, and failed in one; wanted "
                "one shape, or BadRows, which names the rows that are bad"
            )
        self._is_together = True
        self._groups, self._got = [rows], []

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

    def _joined(self, check: ChunkCheck) -> Sequence[NDArray[Any]]:
        assert self.request is not None  # noqa: S101  only a Stream's rows are joined
        came = np.array([row for group, _ in self._got for row in group], np.int64)
        pieces = [arrays for _, arrays in self._got]
        arrays = (
            pieces[0]
            if len(pieces) == 1
            else [np.concatenate(parts, axis) for parts, axis in zip(zip(*pieces, strict=True), check.axes, strict=True)]
        )
        wanted = self.request.kept
        if wanted is not None:
            still = np.isin(came, wanted)
            arrays, came = keep_rows(arrays, np.flatnonzero(still), check.axes), came[still]
        if len(came) < self._size:
            self.request.kept = came
        return arrays if len(came) else ()

    def _named(self, error: Exception, group: list[int]) -> set[int]:
        """Return which rows of the group the error names as bad."""
        if not isinstance(error, BadRows) or self.request is None:
            return set()
        names = set(error.rows)
        return {row for row in group if int(self.request.rows[row]) in names}

    def _skip(self, group: Sequence[int], error: Exception, recorder: FetcherRecorder) -> None:
        request = self.request
        recovery = self._recovery
        text = describe(error)[:MAX_ERROR_CHARS]
        if request is None:
            recovery.quarantine.skip(QuarantinedRows(recorder.worker_id, None, None, (), (), text), 1, error)
            return
        if request.kept is not None:  # rows that an earlier run has delivered are none of this one's
            group = [row for row in group if row in request.kept]
        if not group:
            return
        rows = tuple(int(request.rows[row]) for row in group)
        files = [recovery.file_of(row) for row in rows]
        names = tuple(name for name in files if name is not None)
        entry = QuarantinedRows(recorder.worker_id, request.index, request.epoch, rows, names, text)
        recovery.quarantine.skip(entry, len(rows), error)
        recorder.rows += len(rows)
        recovery.drop(len(rows))
