"""A factory of generators goes in; a fetch function comes out, which asks one generator for each worker."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from input_workers.errors import ConfigError, EndOfData, InputWorkersError, LifecycleError, describe

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Generators"]


class _Worker:
    """The iterator of one worker. `running` is guarded by the lock of its Generators; the rest is the running call's."""

    __slots__ = ("failure", "iterator", "running")

    def __init__(self) -> None:
        self.iterator: Iterator[Sequence[NDArray[Any]] | None] | None = None
        self.failure = ""  # what the last call raised, if it raised
        self.running = False

    def close(self) -> None:
        iterator, self.iterator = self.iterator, None
        close = getattr(iterator, "close", None)
        if close is not None:
            close()


class Generators:
    """A plain fetch function over iterators, one for each worker: `init_data_input_workers(..., Generators(read), ...)`.

    `factory(worker_id)` returns an iterator of chunks: sequences of arrays, one per input, of any number of rows. It is
    called at the worker's first call. A chunk is passed on as it is; None means: no data now. When an iterator ends, its
    worker is finished (EndOfData), and the source when all are. The next run of a source begins with new iterators;
    after a stop in between, those that had not ended go on where they were (`close()` first to begin anew).

    An exception of an iterator is passed on. A generator that raised can only say that it is at its end; that is not
    taken for the end of its data, but is an error too.

    Thread-safe: workers do not wait for each other. Use one object for one source: worker ids tell iterators apart.
    Iterators cannot be pickled, so fetchers in other processes make their own; neither should it be forked while in use.

    Args:
        factory: called with the worker's id, in the worker's thread.

    Raises:
        ConfigError: `factory` cannot be called.
    """

    # Invariant under _lock: at most one call runs a worker's iterator. A worker that is not in `_workers` any more is
    # closed by the call that runs it, or else by the `close()` that took it out.

    def __init__(self, factory: Callable[[int], Iterator[Sequence[NDArray[Any]] | None]]) -> None:
        if not callable(factory):
            raise ConfigError(
                f"Generators: factory: got {type(factory).__qualname__}; wanted factory(worker_id) -> iterator, "
                "such as the generator function itself, not yet called"
            )
        self._factory = factory
        self._workers: dict[int, _Worker] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Generators, (self._factory,)

    def __call__(self, worker_id: int, batch_size: int) -> Sequence[NDArray[Any]] | None:
        """Return the next chunk of this worker's iterator.

        Raises:
            EndOfData: the iterator has ended.
            ConfigError: `factory` returned no iterator.
            LifecycleError: another thread is inside this worker's iterator.
            InputWorkersError: the iterator ended right after it had raised.
            Exception: what factory or iterator raise.
        """
        with self._lock:
            worker = self._workers.setdefault(worker_id, _Worker())
            if worker.running:
                raise LifecycleError(
                    f"Generators: worker {worker_id} is asked by two threads at once; wanted one object for each source"
                )
            worker.running = True
        try:
            return self._next(worker_id, worker)
        finally:
            with self._lock:
                worker.running = False
                closed = self._workers.get(worker_id) is not worker
            if closed:
                worker.close()

    def close(self) -> None:
        """Close all iterators that have a `close`; one that is running, when its call returns. Later calls begin anew.

        Raises:
            Exception: what the first `close` raised that did; all others were closed nevertheless.
        """
        with self._lock:
            idle = [worker for worker in self._workers.values() if not worker.running]
            self._workers.clear()
        first: Exception | None = None
        for worker in idle:
            try:
                worker.close()
            except Exception as error:  # foreign code
                first = first or error
        if first is not None:
            raise first

    def _next(self, worker_id: int, worker: _Worker) -> Sequence[NDArray[Any]] | None:
        if worker.iterator is None:
            iterator = self._factory(worker_id)
            if not hasattr(iterator, "__next__"):
                raise ConfigError(
                    f"Generators: factory({worker_id}) returned {type(iterator).__qualname__}; wanted an iterator, "
                    "as iter(...) or a generator function make one"
                )
            worker.iterator = iterator
        try:
            chunk = next(worker.iterator)
        except StopIteration:
            if worker.failure:
                raise InputWorkersError(
                    f"Generators: the iterator of worker {worker_id} ended after it had raised {worker.failure}; that is not "
                    "the end of its data. Catch the error inside the generator, or call close() to begin anew"
                ) from None
            worker.iterator = None
            raise EndOfData(f"the iterator of worker {worker_id} has ended") from None
        except EndOfData:
            worker.iterator, worker.failure = None, ""
            raise
        except BaseException as error:
            worker.failure = describe(error)
            raise
        worker.failure = ""
        return chunk
