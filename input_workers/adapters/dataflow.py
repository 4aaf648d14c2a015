"""A tensorpack DataFlow goes in, a fetch function comes out; and the other way round, in source_dataflow.

A DataFlow is any object with `reset_state()` and `__iter__()`; tensorpack itself is not needed.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from input_workers.adapters.source_dataflow import SourceDataFlow
from input_workers.checks import check_whole
from input_workers.errors import ConfigError, EndOfData, InputWorkersError, SpecMismatch
from input_workers.sources.columns import Column, make_columns
from input_workers.sources.generators import Generators

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DataFlow", "DataPoints", "SourceDataFlow", "fetch", "mapped"]

# Of `fetch` and `mapped`, where the data points are single rows: as many as the examples of tensorpack have in a batch.
ROWS_PER_CHUNK = 32


@runtime_checkable
class DataFlow(Protocol):
    """What is needed of tensorpack's class of that name."""

    def reset_state(self) -> None:
        """Called once by who iterates, before."""

    def __iter__(self) -> Iterator[Any]:
        """Return an iterator over data points: lists, tuples or dicts of components."""


def fetch(
    df: DataFlow | Callable[[int], DataFlow],
    columns: Sequence[str] | None = None,
    *,
    batched: bool = False,
    rows_per_chunk: int = ROWS_PER_CHUNK,
) -> DataPoints:
    """Return a fetch function in which each worker iterates a DataFlow of its own, as tensorpack's runners do.

        iw.init_data_input_workers("numpy", ["image", "label"], dataflow.fetch(df), 64, 8, fetchers="process")

    With n workers every data point comes n times in an epoch: right for random data without an end (`RepeatedData(df, -1)`),
    not for an evaluation. For each data point once: one worker, or `mapped`.

    A worker copies the DataFlow (`copy.deepcopy`; a process has the copy that it was sent), calls its `reset_state` once,
    and iterates it. What must differ between workers, such as random numbers, belongs into `reset_state`, where tensorpack
    has it. A worker whose DataFlow has ended is done, and the source when all are; its next run iterates the same copies
    again. After a stop in between they go on where they were. The DataFlow that was given is not touched.

    A component is an array, a number, or what has `__array__`; one row of its input, and all must be alike in dtype and
    shape. Nothing is cast: a Python int is int64 and a float float64 (tensorpack's BatchData makes them int32, float32).

    Args:
        df: the DataFlow; or a function of the worker's id that makes one, called in the worker.
        columns: for data points that are dicts: the keys of the inputs, in their order.
        batched: data points are batches (of `BatchData`): every component has rows along the batch axis of its input. They
            may be of any number of rows, and are cut anew to the source's batch size.
        rows_per_chunk: data points handed over together, where they are rows. The last may be fewer.

    Raises:
        ConfigError: an argument is wrong.
    """
    if isinstance(df, type) or (not isinstance(df, DataFlow) and not callable(df)):
        raise ConfigError(f"dataflow.fetch: got {df!r:.200}; wanted an object with reset_state() and __iter__()")
    return DataPoints("dataflow.fetch", df, None, columns, False, batched, rows_per_chunk)


def mapped(
    df: DataFlow,
    function: Callable[[Any], Any] | None = None,
    columns: Sequence[str] | None = None,
    *,
    batched: bool = False,
    rows_per_chunk: int = ROWS_PER_CHUNK,
) -> DataPoints:
    """Return a fetch function in which all workers share one DataFlow: each data point comes exactly once in an epoch.

        iw.init_data_input_workers("numpy", ["image", "label"], dataflow.mapped(df, decode), 64, 8)

    It gives what tensorpack's `MultiThreadMapData(df, 8, decode, strict=True)` does. Threads take turns at the DataFlow and
    call the function at the same time, so that it should release the interpreter lock, as OpenCV and NumPy do. With one
    worker, data points come in their order; with several, in any.

    A data point for which the function returns None is left out, and is no row of any account. One for which it raises is
    an error, or is skipped, as the source's ErrorPolicy says; the others of its chunk are delivered.

    Fetchers must be threads: an iterator cannot be shared with processes. (There, `fetch(MapData(df, function))` runs all
    of it in each.) `reset_state` is called once, by the thread that comes first. The DataFlow itself is iterated, not a copy.

    Args:
        df: the DataFlow.
        function: data point -> data point or None; called from many threads at once. None: the data points as they are.
        columns: as in `fetch`, of what the function returns.
        batched: as in `fetch`.
        rows_per_chunk: data points that a worker takes and hands over together.

    Raises:
        ConfigError: an argument is wrong.
    """
    if isinstance(df, type) or not isinstance(df, DataFlow):
        raise ConfigError(f"dataflow.mapped: got {df!r:.200}; wanted an object with reset_state() and __iter__()")
    if function is not None and not callable(function):
        raise ConfigError(f"dataflow.mapped: function: got {function!r:.200}; wanted function(data point)")
    return DataPoints("dataflow.mapped", df, function, columns, True, batched, rows_per_chunk)


class DataPoints:
    """A plain fetch function over data points; `fetch` and `mapped` make it. Use one for one source. Thread-safe.

    Where a DataFlow or function raises, or a DataFlow ends, what the call had gathered is delivered first.
    """

    # Invariant under _lock: `_count`, `_flows` and `_late` have what each worker has made. `_turn` holds one token: whoever
    # has it may read a shared DataFlow, and owns `_told` (the workers that know of its end), `_is_at_end` and `_broken`.

    def __init__(
        self,
        owner: str,
        df: DataFlow | Callable[[int], DataFlow],
        function: Callable[[Any], Any] | None,
        columns: Sequence[str] | None,
        shared: bool,
        batched: bool,
        rows_per_chunk: int,
        sent: bool = False,
    ) -> None:
        if columns is not None and (isinstance(columns, str) or not columns or len(set(columns)) != len(columns)):
            raise ConfigError(f"{owner}: columns: got {columns!r}; wanted keys of its data points, each once")
        check_whole(f"{owner}: rows_per_chunk", rows_per_chunk, 1)
        self._owner = owner
        self._df = df
        self._function = function
        self._columns = None if columns is None else tuple(columns)
        self._shared = shared
        self._batched = batched
        self._rows = rows_per_chunk
        self._sent = sent  # to a process of its own
        self._lock = threading.Lock()
        self._flows: dict[int, DataFlow] = {}
        self._late: dict[int, Exception] = {}  # what a worker's next call raises
        self._count: dict[int, int] = {}  # data points that were read, for messages
        self._points = Generators(self._iterate)
        self._turn: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._turn.put(None)
        self._told: set[int] = set()
        self._is_at_end = False
        self._broken: Exception | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        if self._shared:
            raise ConfigError(
                f"{self._owner}: workers share one DataFlow, and processes cannot; wanted fetchers='thread', or dataflow.fetch"
            )
        own = (self._owner, self._df, self._function, self._columns, False, self._batched, self._rows, True)
        return DataPoints, own

    def __call__(self, worker_id: int, batch_size: int) -> list[NDArray[Any]]:
        """Return the next data points of this worker, as a chunk.

        Raises:
            EndOfData: its DataFlow has ended.
            SpecMismatch: a data point is not like those before it; the component is named.
            ConfigError: the DataFlow cannot be copied, or its data points are dicts and `columns` was not given.
            Exception: what DataFlow and function raise.
        """
        with self._lock:
            late = self._late.pop(worker_id, None)
        if late is not None:
            raise late
        columns: list[Column] = []
        rows = 0
        try:
            while rows < self._rows:
                number, values = self._next(worker_id)
                if self._batched:
                    return list(values)
                if not columns:
                    names = self._columns or [f"component {index}" for index in range(len(values))]
                    columns = make_columns(self._owner, names, self._rows, None)
                self._check(number, len(values), len(columns))
                for column, value in zip(columns, values, strict=True):
                    column.put(rows, number, value)
                rows += 1
        except Exception as error:  # of the DataFlow, the function, or its end: after the rows that came before
            if not rows:
                raise
            with self._lock:
                self._late[worker_id] = error
        return [column.filled()[:rows] for column in columns]

    def close(self) -> None:
        """Close all iterators; later calls begin anew, without another `reset_state`. While nobody calls it."""
        self._points.close()
        self._told, self._is_at_end, self._broken = set(), False, None
        with self._lock:
            self._late.clear()

    def _next(self, worker_id: int) -> tuple[int, Sequence[Any]]:
        """Return the number of a data point, counted by its reader, and its components."""
        while True:
            number, point = self._read_shared(worker_id) if self._shared else self._read(worker_id)
            if self._function is not None:
                point = self._function(point)
                if point is None:
                    continue
            return number, self._components(number, point)

    def _read(self, reader: int) -> tuple[int, Any]:
        point: Any = self._points(reader, 1)
        with self._lock:
            number = self._count[reader] = self._count.get(reader, -1) + 1
        return number, point

    def _read_shared(self, worker_id: int) -> tuple[int, Any]:
        """Read in the name of all workers, when it is this one's turn. An end or an error is everybody's."""
        self._turn.get()
        try:
            if worker_id in self._told:  # it asks again after the end: a new run
                self._told, self._is_at_end = set(), False
            if self._is_at_end:
                raise EndOfData(f"{self._owner}: the DataFlow has ended")
            return self._read(0)
        except EndOfData:
            self._is_at_end = True
            self._told.add(worker_id)
            raise
        except Exception as error:
            if self._broken is not None and type(error) is InputWorkersError:  # ended, because it had raised
                raise self._broken from None
            self._broken = error
            raise
        finally:
            self._turn.put(None)

    def _iterate(self, worker_id: int) -> Iterator[Any]:
        """Return a new iterator over a worker's DataFlow, which is made first if this is its first."""
        with self._lock:
            flow = self._flows.get(worker_id)
        if flow is None:
            flow = self._made(worker_id)
            flow.reset_state()
            with self._lock:
                self._flows[worker_id] = flow
        return iter(flow)

    def _made(self, worker_id: int) -> DataFlow:
        if not isinstance(self._df, DataFlow):
            flow = self._df(worker_id)
            if not isinstance(flow, DataFlow):
                raise ConfigError(
                    f"{self._owner}: df({worker_id}) returned {type(flow).__qualname__}; wanted a DataFlow, with reset_state() "
                    "and __iter__()"
                )
            return flow
        if self._shared or self._sent:
            return self._df
        try:
            return copy.deepcopy(self._df)
        except Exception as error:  # foreign code: whatever in it cannot be copied
            raise ConfigError(
                f"{self._owner}: the {type(self._df).__qualname__} cannot be copied for worker {worker_id}; wanted one whose "
                "reset_state() was not called yet, or a function that makes one: fetch(lambda worker_id: ...)"
            ) from error

    def _components(self, number: int, point: Any) -> Sequence[Any]:
        what = f"{self._owner}, data point {number}"
        if isinstance(point, Mapping):
            if self._columns is None:
                raise ConfigError(
                    f"{self._owner}: columns: not given, but data point {number} is a {type(point).__qualname__} with the keys "
                    f"{list(point)}; wanted the keys of the inputs, as in columns=('image', 'label')"
                )
            missing = [name for name in self._columns if name not in point]
            if missing:
                raise SpecMismatch(f"{what}: got the keys {list(point)}; wanted {missing} too, as `columns` says")
            return [point[name] for name in self._columns]
        if not isinstance(point, (list, tuple)):
            raise SpecMismatch(f"{what}: got {type(point).__qualname__}; wanted a list, tuple or dict of components")
        if self._columns is not None:
            self._check(number, len(point), len(self._columns))
        return point

    def _check(self, number: int, got: int, wanted: int) -> None:
        if got != wanted:
            raise SpecMismatch(
                f"{self._owner}, data point {number}: got {got} components; wanted {wanted}: component {min(got, wanted)} is "
                f"{'missing' if got < wanted else 'one too many'}"
            )
