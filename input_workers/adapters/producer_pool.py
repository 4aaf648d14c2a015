"""A method goes in that fills buffers; it runs in worker processes, and the filled buffers come out, in shared memory."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from input_workers.adapters.buffer_tokens import BufferTokens
from input_workers.adapters.producer_worker import Producer
from input_workers.checks import check_whole
from input_workers.contracts import ArraySpec
from input_workers.coordinator.data_input_coordinator import DataInputCoordinator
from input_workers.coordinator.global_coordinator import GlobalCoordinator
from input_workers.coordinator.init import init_data_input_workers
from input_workers.errors import ConfigError, EndOfData, LifecycleError, QueueClosed, SpecMismatch
from input_workers.fetchers import Processes, StartMethod
from input_workers.metrics.snapshot import SourceStats, StopReport

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["ProducedResult", "ProducerPool"]

# Their tokens must fit into a pipe.
MAX_BUFFERS = 4096


class ProducedResult:
    """A filled buffer: `with result as arrays:`, once. Belongs to the thread that got it.

    When the `with` ends, or the result is dropped, the producers may fill another buffer. The memory is used again when the
    last view of it has died: arrays that are kept longer stay as they are, and cost memory beyond that of `buffers`.
    """

    __slots__ = ("__weakref__", "_arrays", "_finalizer", "_is_used")

    def __init__(self, arrays: Sequence[NDArray[Any]], give_back: Callable[[], object]) -> None:
        self._arrays = list(arrays)
        self._is_used = False
        self._finalizer = weakref.finalize(self, give_back)
        self._finalizer.atexit = False

    def __enter__(self) -> list[NDArray[Any]]:
        """Return the arrays, one for each shape, writeable. At the end of the `with` this list is emptied."""
        if self._is_used:
            raise LifecycleError("ProducerPool: got a result that was used already; wanted each in one `with`, once")
        self._is_used = True
        return self._arrays

    def __exit__(self, *exc_info: object) -> None:
        """Give the buffer back. Never raises."""
        self._arrays.clear()
        self._finalizer()


class ProducerPool:
    """Worker processes that fill buffers by a method of yours, for a trainer that uses one after the other.

        def fill(leases, folder):                     # in each worker, once, in a thread that is not the main thread
            for path in sorted(folder.iterdir()):
                with next(leases) as (images, labels):  # or: for lease in leases: with lease as (images, labels):
                    images[...], labels[...] = read(path)

        with ProducerPool(fill, [(64, 224, 224, 3), (64,)], ["uint8", "int64"], workers=4, args=(folder,)) as pool:
            for result in pool:
                with result as (images, labels):
                    train_step(images, labels)

    A lease is memory that the trainer will read: nothing is copied, but buffers of less than 8 KB. Its arrays are writeable
    and hold whatever was in them. The end of its `with` hands them over, filled or not; an exception in it hands nothing
    over, and one that the method catches leaves the buffer for its next lease. After the `with` the arrays are read-only, and
    what else refers to their memory in the worker must not write to it. A method has one lease at a time: asking for another
    while one is in use, or was not used in a `with`, is LifecycleError. Leaving the loop, or returning, ends that worker (as
    EndOfData does); the others go on, and the pool ends when all have. `leases` itself has no end.

    Each result is delivered once. Those of one worker come in their order; what different workers fill, in any.

    A method that raises, or a worker that dies, ends the pool: what was complete is delivered, then each read raises.
    Workers are not started again, because the method's position is not known. Methods are ended where they are by `stop`;
    what they have in `finally` does not run then.

    Thread-safe; each result goes to one thread. It may be started once. It must be stopped in the process that made it.

    Args:
        method: `method(leases, *args, **kwargs)`; it is sent to the workers by cloudpickle.
        shapes: of the arrays of a buffer; `()` is an array of one value.
        dtype: of all arrays, or a list with one for each.
        workers: how many processes run the method, each from its beginning: they share nothing but what `args` say.
        buffers: how many may be in use at most: being filled, waiting, or in a `with` of the trainer. Whoever wants another
            waits. By default 2 for each worker, and 2. (A worker has the memory of one more at hand, and free memory is kept.)
        args: further arguments of the method.
        kwargs: further arguments by name.
        start: how processes are started; see `iw.Processes`.
        timeout_s: a trainer that waits longer for a result gets WaitTimeout, and may ask again.
        name: of the pool, in messages and names of threads.

    Raises:
        ConfigError: an argument is wrong.
        OSError: no descriptor is left.
    """

    def __init__(
        self,
        method: Callable[..., object],
        shapes: Sequence[Sequence[int]],
        dtype: DTypeLike | Sequence[DTypeLike] = "float32",
        workers: int = 1,
        buffers: int | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        start: StartMethod | None = None,
        timeout_s: float = 600.0,
        name: str = "producers",
    ) -> None:
        if not callable(method):
            raise ConfigError(f"ProducerPool: method: got {type(method).__qualname__}; wanted method(leases, ...)")
        workers = check_whole("ProducerPool: workers", workers, 1)
        buffers = check_whole("ProducerPool: buffers", 2 * workers + 2 if buffers is None else buffers, 1, MAX_BUFFERS)
        specs = _checked_specs(shapes, dtype)
        self._shapes = [spec.batch_shape(0, 0)[1:] for spec in specs]
        self._coordinator = GlobalCoordinator()
        self._tokens = BufferTokens(buffers)
        try:
            init_data_input_workers(
                "numpy",
                [f"array_{index}" for index in range(len(specs))],
                Producer(method, tuple(args), dict(kwargs or {}), self._shapes, [spec.dtype for spec in specs], self._tokens),
                batch_size=1,
                num_workers=workers,
                input_source_name=name,
                # Nobody waits here: the tokens are the bound.
                max_buffered_batches=buffers,
                # Each worker keeps free memory for so many, and two more.
                device_queue_depth=max(1, -(-buffers // workers) - 1),
                fetchers=Processes(start=start, restarts=0),
                rebatch=False,
                timeout_s=timeout_s,
                specs=specs,
                coordinator=self._coordinator,
            )
        except BaseException:
            self._tokens.close()
            raise
        self._source: DataInputCoordinator = self._coordinator[name]
        self._name = name
        # Held while the processes are started, which nobody but another starter waits for.
        self._starting = threading.Lock()
        self._is_started = False
        self._stopped = threading.Event()
        weakref.finalize(self, self._tokens.close).atexit = False

    def start(self) -> None:
        """Start the workers, if they are not: iterating does it too.

        Raises:
            QueueClosed: the pool was stopped.
            ConfigError: the method cannot be sent to a worker.
            OSError: a process cannot be started.
        """
        with self._starting:
            if self._stopped.is_set():
                raise QueueClosed(f"pool {self._name!r} was stopped; wanted another one")
            if self._is_started:
                return
            self._coordinator.start()
            self._is_started = True
        if self._stopped.is_set():  # meanwhile
            self._coordinator.stop()

    def next_result(self, timeout_s: float | None = None) -> ProducedResult:
        """Return the next filled buffer.

        Args:
            timeout_s: how long to wait, in seconds; None: the pool's `timeout_s`; inf: for ever; 0: not at all.

        Raises:
            WaitTimeout: none came in time; nothing is lost, ask again. (Results that you hold keep their buffers.)
            EndOfData: every worker's method has returned, and all results were taken.
            FetchFailed: a method raised; the cause is its exception.
            WorkerDied: a worker did not end by itself.
            QueueClosed: the pool was stopped.
        """
        if not self._is_started or self._stopped.is_set():
            self.start()
        batch = self._source.next_batch(timeout_s)
        arrays = [array.reshape(shape) for array, shape in zip(batch, self._shapes, strict=True)]
        return ProducedResult(arrays, self._tokens.give)

    def __iter__(self) -> Self:
        self.start()
        return self

    def __next__(self) -> ProducedResult:
        try:
            return self.next_result()
        except EndOfData:
            raise StopIteration from None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def stop(self, timeout_s: float = 5.0) -> bool:
        """End the workers, wherever they are; True: everything ended in time. Idempotent.

        Every waiting and later read raises QueueClosed. Results that the trainer has stay valid. A worker whose method is
        at work is killed after half a second.
        """
        self._stopped.set()
        if self._is_started:
            self._source.device().stop()  # first, or readers might take the workers' end for that of the data
        self._tokens.close()
        return self._coordinator.stop(timeout_s)

    @property
    def last_stop(self) -> StopReport | None:
        """How the stop went, or None."""
        return self._coordinator.last_stop

    def stats(self) -> SourceStats:
        """Return the numbers of this moment, where a row is a result. Waiting for a buffer counts as busy."""
        return self._source.stats()


def _checked_specs(shapes: Sequence[Sequence[int]], dtype: DTypeLike | Sequence[DTypeLike]) -> list[ArraySpec]:
    wanted = "wanted a list of shapes, such as [(64, 224, 224, 3), (64,)], of at least one value"
    if not isinstance(shapes, Sequence) or not shapes:
        raise ConfigError(f"ProducerPool: shapes: got {shapes!r}; {wanted}")
    dtypes: list[Any] = list(dtype) if isinstance(dtype, (list, tuple)) else [dtype] * len(shapes)
    if len(dtypes) != len(shapes):
        raise ConfigError(f"ProducerPool: dtype: got {len(dtypes)} for {len(shapes)} shapes; wanted one, or one for each")
    specs = []
    for shape, each in zip(shapes, dtypes, strict=True):
        try:
            spec = ArraySpec(shape, np.dtype(each))
        except (TypeError, ValueError, SpecMismatch) as error:
            raise ConfigError(f"ProducerPool: got shape {shape!r} of dtype {each!r}; {wanted}: {error}") from error
        if not spec.row_nbytes:
            raise ConfigError(f"ProducerPool: got shape {shape!r} of dtype {each!r}, which holds nothing; {wanted}")
        specs.append(spec)
    return specs
