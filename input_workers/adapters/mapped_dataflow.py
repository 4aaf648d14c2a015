"""A DataFlow and a function go in, a DataFlow of what the function returns comes out, made by several workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from input_workers.adapters.team import Team
from input_workers.checks import check_whole
from input_workers.contracts import FetchRequest
from input_workers.errors import ConfigError, FetchFailed, LifecycleError, WaitTimeout, describe
from input_workers.fetchers import MAX_WORKERS, Processes, Threads, chosen_fetchers

__all__ = ["DataFlow", "MappedDataFlow"]

# Data points ahead for each worker, by default: one that it works on, and some that wait while another takes long.
AHEAD = 4


@runtime_checkable
class DataFlow(Protocol):
    """What is needed of tensorpack's class of that name."""

    def reset_state(self) -> None:
        """Called once by who iterates, before."""

    def __iter__(self) -> Iterator[Any]:
        """Return an iterator over data points: lists, tuples or dicts of components."""


class MappedDataFlow:
    """`dataflow.map`: a DataFlow with `function(data point)` of each data point of `df`, each exactly once.

        df = dataflow.map(df, decode, 8)
        df.reset_state()
        for image, label in df: ...                                     # or any DataFlow over it: BatchData(df, 32)

    It is what tensorpack's `MultiThreadMapData(df, 8, decode, strict=True)` is, and MultiProcessMapData with processes, but
    in the order of `df`, and what is iterated is always one epoch and no more. The function may return None: that data
    point is left out. What it returns may be nested in any way and comes through processes unchanged: arrays in shared
    memory, all else pickled, as the data points are on their way in.

    `df` is iterated by who iterates this, and nobody else; the function is called from many threads at once, or each
    process has a copy of it. In processes, the random numbers of `random`, NumPy, PyTorch and TensorFlow are another
    sequence for each data point, whoever maps it, from a seed that each `iter` draws from NumPy's in the trainer.

    An error of `df` or of the function is raised where the data point would have come, after those before it (where they
    are not ordered, after those that were finished), as FetchFailed whose cause it is, and ends the iteration. A function
    that wants to leave a bad data point out returns None.

    Workers start with an `iter`, and end with it: at the end of `df`, after an error, or when it is dropped or closed. A
    DataFlow of few data points that is iterated often is better repeated inside: `map(RepeatedData(df, -1), function)`
    never stops its workers. Each iterator belongs to one thread; there may be as many as `df` allows.

    As a source: `dataflow.fetch(dataflow.map(df, decode, 8))`, with one worker. If that is stopped in the middle of `df`,
    its next run goes on there: the workers of the map stay until then, or until the fetch function is closed or dropped.

    Args:
        df: the DataFlow.
        function: data point -> data point or None. Sent by cloudpickle to processes.
        workers: how many.
        strict: True. (tensorpack's other way, in which data points run over from epoch to epoch, is
            `map(RepeatedData(df, -1), function)`.)
        fetchers: "thread" (`iw.Threads()`), for functions that release the interpreter lock, as OpenCV and NumPy do; or
            "process" (`iw.Processes(...)`).
        ordered: in the order of `df`. Else as they are finished: none waits for those before it, but for one
            in its own process, which is sent the next one ahead.
        buffer_size: data points that are read ahead, being mapped or waiting; 4 for each worker by default.
        timeout_s: who waits longer for a data point gets WaitTimeout, and may ask again.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        df: DataFlow,
        function: Callable[[Any], Any],
        workers: int = 2,
        strict: bool = True,
        *,
        fetchers: str | Threads | Processes = "thread",
        ordered: bool = True,
        buffer_size: int | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        if isinstance(df, type) or not isinstance(df, DataFlow):
            raise ConfigError(f"dataflow.map: got {df!r:.200}; wanted an object with reset_state() and __iter__()")
        if not callable(function):
            raise ConfigError(f"dataflow.map: function: got {function!r:.200}; wanted function(data point)")
        check_whole("dataflow.map: workers", workers, 1)
        if workers > MAX_WORKERS:
            raise ConfigError(f"dataflow.map: workers: got {workers}; wanted at most {MAX_WORKERS}")
        if strict is not True:
            raise ConfigError(
                f"dataflow.map: strict: got {strict!r}; wanted True, each data point once in each epoch; for data points that "
                "run over from one epoch to the next: map(RepeatedData(df, -1), function)"
            )
        if buffer_size is not None:
            check_whole("dataflow.map: buffer_size", buffer_size, 1)
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s <= math.inf:
            raise ConfigError(f"dataflow.map: timeout_s: got {timeout_s!r}; wanted seconds, more than 0")
        self.df = df
        self.function = function
        self.workers = int(workers)
        self.fetchers = chosen_fetchers(fetchers)
        self.ordered = bool(ordered)
        self.buffer_size = AHEAD * self.workers if buffer_size is None else int(buffer_size)
        self.timeout_s = timeout_s

    def reset_state(self) -> None:
        """Reset `df`. Here is no state."""
        self.df.reset_state()

    def __len__(self) -> int:
        """Return how many data points `df` has: so many come, if the function leaves none out. Raises what its `len` does."""
        return len(self.df)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        """Start workers; return an iterator over one epoch.

        Its `next` raises FetchFailed (from the error of `df` or function), WorkerDied, or WaitTimeout: ask again.
        """
        return _Epoch(self)


class _Epoch:
    """One pass. An object, because a generator would be at its end after a WaitTimeout."""

    def __init__(self, flow: MappedDataFlow) -> None:
        in_process = isinstance(flow.fetchers, Processes)
        self._points = iter(flow.df)
        self._what = type(flow.df).__qualname__
        self._buffer_size = flow.buffer_size
        self._read = 0
        self._failure: Exception | None = None  # of df
        self._is_read = False
        self._broken = ""  # by what
        self._team: Team | None = Team(
            _Work(flow.function),
            flow.fetchers,
            flow.workers,
            flow.buffer_size,
            ["map"],
            ordered=flow.ordered,
            timeout_s=flow.timeout_s,
            seed=int(np.random.randint(1 << 62)) if in_process else 0,
        )

    def __iter__(self) -> _Epoch:
        return self

    def __next__(self) -> Any:
        """Return the next data point; see `MappedDataFlow.__iter__`."""
        if self._broken:
            raise LifecycleError(f"dataflow.map: this iteration was ended by {self._broken}; wanted a new one: iter(df)")
        if self._team is None:
            raise StopIteration
        try:
            return self._next(self._team)
        except WaitTimeout:
            raise
        except StopIteration:
            self._end()
            raise
        except BaseException as error:  # also Ctrl-C: `df` may take it for its end, or a data point was on its way
            self._broken = describe(error)
            self._end()
            raise

    def close(self) -> None:
        """End the workers now. Idempotent."""
        self._broken = self._broken or "close()"
        self._end()

    def _next(self, team: Team) -> Any:
        while True:
            while not self._is_read and team.waiting[0] < self._buffer_size:
                self._read_ahead(team)
            if not team.waiting[0]:
                break
            point = team.take(0)
            if point is not None:
                return point
        failure, self._failure = self._failure, None
        if failure is None:
            raise StopIteration
        try:
            raise FetchFailed(
                f"dataflow.map: {self._what} failed after {self._read} data points: {describe(failure)}"
            ) from failure
        finally:
            del failure  # or this frame and the exception would hold each other

    def _read_ahead(self, team: Team) -> None:
        """Have the next data point mapped."""
        try:
            team.give(0, next(self._points))
            self._read += 1
        except StopIteration:
            self._is_read = True
        except Exception as error:  # foreign code, or it cannot be pickled; those before it come first
            self._failure, self._is_read = error, True

    def _end(self) -> None:
        team, self._team, self._points = self._team, None, iter(())
        self._failure = None  # its traceback knows this
        if team is not None:
            team.stop()


class _Work:
    """What workers do."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, point: Any, request: FetchRequest) -> Any:
        return self.function(point)
