"""A tensorpack DataFlow goes in, a fetch function comes out; in mapped_dataflow a DataFlow that several workers map.

The other way round is in source_dataflow. A DataFlow is any object with `reset_state()` and `__iter__()`; tensorpack itself
is not needed.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from input_workers.adapters.mapped_dataflow import DataFlow, MappedDataFlow
from input_workers.adapters.source_dataflow import SourceDataFlow
from input_workers.adapters.team import of_the_user
from input_workers.checks import check_whole
from input_workers.errors import ConfigError, FetchFailed, SpecMismatch
from input_workers.sources.columns import Column
from input_workers.sources.generators import Generators
from input_workers.sources.padding import Pad, arrays_of, checked_pads, make_padded_columns

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DataFlow", "DataPoints", "MappedDataFlow", "SourceDataFlow", "fetch", "map"]

# Where the data points are single rows: as many as the examples of tensorpack have in a batch.
ROWS_PER_CHUNK = 32

OWNER = "dataflow.fetch"

map = MappedDataFlow  # noqa: A001  as Python's own: a function, and what to map


def fetch(
    df: DataFlow | Callable[[int], DataFlow],
    columns: Sequence[str] | None = None,
    *,
    batched: bool = False,
    rows_per_chunk: int = ROWS_PER_CHUNK,
    pad_ragged: Mapping[Any, Any] | None = None,
) -> DataPoints:
    """Return a fetch function in which each worker iterates a DataFlow of its own, as tensorpack's runners do.

        iw.init_data_input_workers("numpy", ["image", "label"], dataflow.fetch(df), 64, 8, fetchers="process")

    With n workers every data point comes n times in an epoch: right for random data without an end (`RepeatedData(df, -1)`),
    not for an evaluation. For each data point once, in the order of the DataFlow: one worker; if that is too slow, one worker
    here and as many as you like there: `fetch(dataflow.map(df, function, 8))`.

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
        pad_ragged: for rows of unequal length, by column, or by place where there are none: `{"tokens": 128}` fills them up
            with zeros along their first axis, to that length, and a longer one is an error; `(128, -1)` fills with
            another value. "longest" in place of a length: that of the longest of the chunk; this needs `rebatch=False`
            and `specs` with None for the side. After the other inputs comes one for each of these, with the lengths
            that the rows had, int64.

    Raises:
        ConfigError: an argument is wrong.
    """
    if isinstance(df, type) or (not isinstance(df, DataFlow) and not callable(df)):
        raise ConfigError(f"dataflow.fetch: got {df!r:.200}; wanted an object with reset_state() and __iter__()")
    if columns is not None and (isinstance(columns, str) or not columns or len(set(columns)) != len(columns)):
        raise ConfigError(f"dataflow.fetch: columns: got {columns!r}; wanted keys of its data points, each once")
    check_whole("dataflow.fetch: rows_per_chunk", rows_per_chunk, 1)
    pads = checked_pads("dataflow.fetch", pad_ragged)
    if pads and batched:
        raise ConfigError("dataflow.fetch: pad_ragged with batched=True: rows of a batch have one length; wanted one of both")
    if columns is None:
        pads = {f"component {place}": pad for place, pad in pads.items()}
    return DataPoints(df, None if columns is None else tuple(columns), batched, rows_per_chunk, pads)


class DataPoints:
    """A plain fetch function over data points; `fetch` makes it. Use one for one source. Thread-safe.

    Where a DataFlow raises or ends, what the call had gathered is delivered first.
    """

    # Invariant under _lock: `_count`, `_flows` and `_late` have what each worker has made.

    def __init__(
        self,
        df: DataFlow | Callable[[int], DataFlow],
        columns: tuple[str, ...] | None,
        batched: bool,
        rows_per_chunk: int,
        pads: Mapping[Any, Pad],
        sent: bool = False,
    ) -> None:
        self._df = df
        self._columns = columns
        self._batched = batched
        self._rows = rows_per_chunk
        self._pads = pads
        self._sent = sent  # to a process of its own
        self._lock = threading.Lock()
        self._flows: dict[int, DataFlow] = {}
        self._late: dict[int, BaseException] = {}  # what a worker's next call raises
        self._count: dict[int, int] = {}  # data points that were read, for messages
        self._points = Generators(self._iterate)

    def __reduce__(self) -> tuple[Any, ...]:
        return DataPoints, (self._df, self._columns, self._batched, self._rows, self._pads, True)

    def __call__(self, worker_id: int, batch_size: int) -> list[NDArray[Any]]:
        """Return the next data points of this worker, as a chunk.

        Raises:
            EndOfData: its DataFlow has ended.
            SpecMismatch: a data point is not like those before it; the component is named.
            ConfigError: the DataFlow cannot be copied, or its data points are dicts and `columns` was not given.
            Exception: what the DataFlow raises.
        """
        with self._lock:
            late = self._late.pop(worker_id, None)
        if late is not None:
            raise late
        columns: list[Column] = []
        rows = 0
        try:
            while rows < self._rows:
                number, values = self._read(worker_id)
                if self._batched:
                    return list(values)
                if not columns:
                    names = self._columns or [f"component {index}" for index in range(len(values))]
                    columns = make_padded_columns(OWNER, names, self._rows, None, self._pads)
                self._check(number, len(values), len(columns))
                for column, value in zip(columns, values, strict=True):
                    column.put(rows, number, value)
                rows += 1
        except Exception as error:  # of the DataFlow, or its end: after the rows that came before
            if not rows:
                raise
            with self._lock:
                self._late[worker_id] = error
        return [array[:rows] for array in arrays_of(columns)]

    def close(self) -> None:
        """Close all iterators; later calls begin anew, without another `reset_state`. While nobody calls it."""
        self._points.close()
        with self._lock:
            self._late.clear()

    def _read(self, worker_id: int) -> tuple[int, Sequence[Any]]:
        """Return the number of a worker's next data point, and its components."""
        try:
            point: Any = self._points(worker_id, 1)
        except FetchFailed as failed:  # of workers of its own: the cause is what counts
            failure = failed
        else:
            with self._lock:
                number = self._count[worker_id] = self._count.get(worker_id, -1) + 1
            return number, self._components(number, point)
        try:
            raise of_the_user(failure)
        finally:
            del failure  # or this frame and the exception would hold each other

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
                    f"{OWNER}: df({worker_id}) returned {type(flow).__qualname__}; wanted a DataFlow, with reset_state() "
                    "and __iter__()"
                )
            return flow
        if self._sent:
            return self._df
        try:
            return copy.deepcopy(self._df)
        except Exception as error:  # foreign code: whatever in it cannot be copied
            raise ConfigError(
                f"{OWNER}: the {type(self._df).__qualname__} cannot be copied for worker {worker_id}; wanted one whose "
                "reset_state() was not called yet, or a function that makes one: fetch(lambda worker_id: ...)"
            ) from error

    def _components(self, number: int, point: Any) -> Sequence[Any]:
        what = f"{OWNER}, data point {number}"
        if isinstance(point, Mapping):
            if self._columns is None:
                raise ConfigError(
                    f"{OWNER}: columns: not given, but data point {number} is a {type(point).__qualname__} with the keys "
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
                f"{OWNER}, data point {number}: got {got} components; wanted {wanted}: component {min(got, wanted)} is "
                f"{'missing' if got < wanted else 'one too many'}"
            )
