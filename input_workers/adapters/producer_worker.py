"""What runs in a worker of a ProducerPool: calls for a chunk come in, the method's leases are answered with, one each.

The method runs in a thread of its own from beginning to end. The worker's thread, which alone speaks to the parent, waits for
what the method wants: memory, or that what it has filled is sent.
"""

from __future__ import annotations

import queue
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self

import numpy as np

from input_workers.adapters.buffer_tokens import BufferTokens, TokenReader
from input_workers.errors import ConfigError, EndOfData, LifecycleError
from input_workers.fetchers.frames import INLINE_BELOW_NBYTES
from input_workers.fetchers.worker import Worker

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Lease", "Leases", "Producer"]

WANTED, FILLED, RAISED, ENDED = "wanted", "filled", "raised", "ended"


class Lease:
    """A buffer to fill, once: `with lease as arrays:`. Belongs to the thread that got it."""

    __slots__ = ("_arrays", "_say", "state")

    def __init__(self, arrays: Sequence[NDArray[Any]], say: Callable[[], object]) -> None:
        self._arrays = tuple(arrays)
        self._say = say
        self.state: Literal["new", "open", "done", "void"] = "new"

    def __enter__(self) -> tuple[NDArray[Any], ...]:
        """Return the arrays, one for each shape: writeable, with whatever is in them. Raises LifecycleError: it was used."""
        if self.state != "new":
            raise LifecycleError(f"ProducerPool: got a lease that is {self.state}; wanted each lease in one `with`, once")
        self.state = "open"
        return self._arrays

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Hand the arrays over, as they are; after an exception, nothing. They cannot be written to any more."""
        for array in self._arrays:
            array.flags.writeable = False
        self.state = "done" if kind is None else "void"
        if kind is None:
            self._say()


class Leases:
    """What the method iterates: one lease after the other, without an end; it waits until a buffer is free.

    Belongs to one thread at a time.
    """

    def __init__(self) -> None:
        self.said: queue.SimpleQueue[tuple[str, BaseException | None]] = queue.SimpleQueue()
        self.lent: queue.SimpleQueue[list[NDArray[Any]]] = queue.SimpleQueue()
        self._last: Lease | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Lease:
        """Return the next lease. Raises LifecycleError if the one before it was not used, or still is."""
        state = "done" if self._last is None else self._last.state
        if state in ("new", "open"):
            what = "was not used" if state == "new" else "is still in use: its `with` has not ended"
            raise LifecycleError(
                f"ProducerPool: got a call for another lease while the last one {what}; wanted `for lease in leases:` and in "
                "it `with lease as arrays:`"
            )
        self.said.put((WANTED, None))
        lease = Lease(self.lent.get(), lambda: self.said.put((FILLED, None)))
        self._last = lease
        return lease


class Producer:
    """The fetch function of a pool. In the parent it is only pickled; in a worker, it belongs to one thread.

    Args:
        method: `method(leases, *args, **kwargs)`.
        args: its further arguments.
        kwargs: and those by name.
        shapes: of the arrays of a buffer.
        dtypes: of each.
        tokens: one for each buffer.
    """

    def __init__(
        self,
        method: Callable[..., object],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[np.dtype[Any]],
        tokens: BufferTokens | TokenReader,
    ) -> None:
        self._parts = method, args, kwargs, shapes, dtypes, tokens
        self._method, self._args, self._kwargs = method, args, kwargs
        self._shapes, self._dtypes = shapes, dtypes
        self._tokens = tokens
        self._leases: Leases | None = None
        self._has_ended = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Producer, self._parts

    def __call__(self, worker_id: int, batch_size: int) -> list[NDArray[Any]]:
        """Return the next filled buffer, as a chunk of one row. Raises EndOfData at the end, or what the method raised."""
        tokens = self._tokens
        assert isinstance(tokens, TokenReader)  # noqa: S101  this is a worker
        leases = self._leases
        if leases is None:
            leases = self._leases = Leases()
            threading.Thread(target=self._run, args=(leases,), name="producer", daemon=True).start()
        chunk: list[NDArray[Any]] = []
        while not self._has_ended:
            said, error = leases.said.get()
            if said == WANTED:
                if not tokens.take():  # the pool has been stopped
                    break
                chunk = self._memory()
                leases.lent.put([array.reshape(shape) for array, shape in zip(chunk, self._shapes, strict=True)])
            elif said == FILLED:
                tokens.hand_over()
                return chunk
            else:
                self._has_ended = True
                tokens.give_back()
                if error is not None:
                    self._raise(error)
        raise EndOfData

    def _memory(self) -> list[NDArray[Any]]:
        """Return arrays of one row each: in the memory that the parent reads, or, if they are small, to be sent."""
        shapes = [(1, *shape) for shape in self._shapes]
        worker = Worker.of_this_process
        arrays: list[NDArray[Any]] | None = None
        if worker is not None and self._nbytes() >= INLINE_BELOW_NBYTES:
            arrays = worker.lend(shapes, self._dtypes)
        return arrays or [np.empty(shape, dtype) for shape, dtype in zip(shapes, self._dtypes, strict=True)]

    def _nbytes(self) -> int:
        return sum(
            int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            for shape, dtype in zip(self._shapes, self._dtypes, strict=True)
        )

    def _run(self, leases: Leases) -> None:
        try:
            result = self._method(leases, *self._args, **self._kwargs)
            if isinstance(result, (types.GeneratorType, types.CoroutineType)):
                raise ConfigError(
                    f"ProducerPool: method: got {type(result).__name__}, of which nothing has run; wanted a function that "
                    "iterates its leases itself"
                )
        except BaseException as error:  # it is the worker's thread that raises it
            leases.said.put((RAISED, error))
        else:
            leases.said.put((ENDED, None))

    def _raise(self, error: BaseException) -> NoReturn:
        raise error
