"""A sized source read in order or shuffled, once or many times: numbered requests come out, and what they fetched."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.contracts import FetchRequest, Source
from input_workers.errors import ConfigError, EndOfData, InputWorkersError
from input_workers.metrics.recorder import FetcherRecorder

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Stream", "StreamCalls"]


class Stream:
    """Rows of a source, request by request. A description: it has no position, and may be used by several sources.

    Args:
        source: has `__len__` and `fetch(rows, request)`.
        shuffle: another order each epoch, from the seed alone.
        seed: of the shuffle and of `request.rng`.
        epochs: how often to go through the source; None: without an end.
        shard: (index, count): the part of each epoch that this stream reads. Not built yet.
        rows_per_request: rows of one call of `fetch`; by default the batch size.
        epoch_end: "run_on": batches cross the end of an epoch; "break": each epoch ends as `last_batch` says, and so
            does the `for` over it.

    Raises:
        ConfigError: a parameter is wrong.
    """

    def __init__(
        self,
        source: Source,
        shuffle: bool = False,
        seed: int = 0,
        epochs: int | None = 1,
        shard: tuple[int, int] | str = (0, 1),
        rows_per_request: int | None = None,
        epoch_end: str = "run_on",
    ) -> None:
        if not isinstance(source, Source):
            raise ConfigError(f"Stream: {type(source).__qualname__} has no __len__ and fetch(rows, request)")
        if len(source) < 1:
            raise ConfigError(f"Stream: the {type(source).__qualname__} has no rows")
        for name, value, least in (("seed", seed, 0), ("epochs", epochs, 1), ("rows_per_request", rows_per_request, 1)):
            optional = name != "seed" and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least):
                raise ConfigError(f"Stream: {name}: got {value!r}; wanted a whole number of at least {least}")
        if shard != (0, 1):
            raise ConfigError(f"Stream: shard={shard!r} is not built yet; wanted (0, 1)")
        if epoch_end not in ("run_on", "break"):
            raise ConfigError(f"Stream: epoch_end: got {epoch_end!r}; wanted 'run_on' or 'break'")
        self.source = source
        self.shuffle = bool(shuffle)
        self.seed = int(seed)
        self.epochs = epochs
        self.rows_per_request = rows_per_request
        self.epoch_end = epoch_end

    def requests_per_epoch(self, rows_per_request: int) -> int:
        """Return how many requests one epoch takes."""
        return -(-len(self.source) // rows_per_request)

    def epoch_rows(self, epoch: int) -> NDArray[np.int64]:
        """Return the row numbers of an epoch in their order."""
        order = np.arange(len(self.source), dtype=np.int64)
        if self.shuffle:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        order.flags.writeable = False
        return order


class StreamCalls:
    """The requests of one run of a Stream, dealt to its fetchers. Thread-safe.

    Args:
        stream: what to read.
        batch_size: of the source, where the Stream does not say how many rows a request has.
        lend: offers memory for so many rows, one array per input, or None.
    """

    # Invariant under _lock: requests below `_next` were dealt once, but for those in `_again`, which will be again.

    def __init__(self, stream: Stream, batch_size: int, lend: Callable[[int], list[NDArray[Any]] | None]) -> None:
        self.batch_size = batch_size
        self.rows_per_request = stream.rows_per_request or batch_size
        self._stream = stream
        self._lend = lend
        self.requests_per_epoch = stream.requests_per_epoch(self.rows_per_request)
        self._lock = threading.Lock()
        self._next = 0
        self._again: list[int] = []
        self._orders: dict[int, NDArray[np.int64]] = {}

    def next(self, recorder: FetcherRecorder) -> tuple[Sequence[NDArray[Any]], FetchRequest]:
        """Fetch the next request's rows. Raises EndOfData after the last epoch, and what the source raises."""
        request = self._next_request(recorder.worker_id)
        recorder.request = request
        request.out = self._lend(len(request.rows))
        try:
            return self._stream.source.fetch(request.rows, request), request
        except EndOfData as error:
            source = type(self._stream.source).__qualname__
            raise InputWorkersError(f"{source}.fetch raised EndOfData; a Stream ends by the length of its source") from error
        except Exception:
            raise
        except BaseException:  # Ctrl-C in the trainer's own thread: the request is still to be fetched
            with self._lock:
                self._again.append(request.index)
            raise

    def _next_request(self, worker_id: int) -> FetchRequest:
        stream = self._stream
        with self._lock:
            if self._again:
                index = self._again.pop(0)
            else:
                index = self._next
                if stream.epochs is not None and index >= stream.epochs * self.requests_per_epoch:
                    raise EndOfData
                self._next += 1
            epoch, position = divmod(index, self.requests_per_epoch)
            if epoch not in self._orders:
                self._orders[epoch] = stream.epoch_rows(epoch)
                self._orders.pop(epoch - 2, None)  # nobody asks for it again
            order = self._orders[epoch]
        begin = position * self.rows_per_request
        rows = order[begin : begin + self.rows_per_request]
        return FetchRequest(index, epoch, rows, worker_id=worker_id, batch_size=self.batch_size, seed=stream.seed)
