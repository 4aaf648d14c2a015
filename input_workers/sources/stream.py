"""A sized source read in order or shuffled, whole or a shard of it, once or many times: positions in, row numbers out."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.checks import check_whole
from input_workers.contracts import FetchRequest, Source
from input_workers.errors import ConfigError
from input_workers.progress import Spans, rows_of, slice_of
from input_workers.sources.epoch_order import EpochOrder
from input_workers.sources.permutation import MAX_SIZE

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Stream", "StreamPlan", "cut_at", "share_of"]

# Epochs whose order is kept: the one being fetched, and its neighbours while some of its requests are unfinished.
ORDERS_KEPT = 4


class Stream:
    """Rows of a source, request by request. A description: it has no position, and may be used by several sources.

    Args:
        source: has `__len__` and `fetch(rows, request)`.
        shuffle: another order each epoch, from the seed alone. A source with `block_rows` is shuffled by blocks, and
            then within windows of some blocks.
        seed: of the shuffle and of `request.rng`.
        epochs: how often to go through the source; None: without an end.
        shard: (index, count): which of `count` equal parts of each epoch to read; the parts of all indices are disjoint.
            Rows that do not divide follow `last_batch`: "drop" leaves them out, "pad" repeats some, "keep" makes some
            shards one row longer. "auto": from the environment's RANK and WORLD_SIZE; then unequal numbers of batches
            are refused.
        rows_per_request: rows of one call of `fetch`; by default the batch size, or what a loaded state says.
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
        if isinstance(source, type) or not isinstance(source, Source):
            raise ConfigError(f"Stream: got {source!r:.200}; wanted an object with __len__ and fetch(rows, request)")
        if not 1 <= len(source) <= MAX_SIZE:
            raise ConfigError(f"Stream: the {type(source).__qualname__} has {len(source)} rows; wanted 1 to 2**62")
        if not isinstance(shuffle, (bool, np.bool_)):
            raise ConfigError(f"Stream: shuffle: got {shuffle!r}; wanted True or False")
        check_whole("Stream: seed", seed, 0)
        if epochs is not None:
            check_whole("Stream: epochs", epochs, 1)
        if rows_per_request is not None:
            check_whole("Stream: rows_per_request", rows_per_request, 1)
        if not isinstance(epoch_end, str) or epoch_end not in ("run_on", "break"):
            raise ConfigError(f"Stream: epoch_end: got {epoch_end!r}; wanted 'run_on' or 'break'")
        self.source = source
        self.shuffle = bool(shuffle)
        self.seed = int(seed)
        self.epochs = None if epochs is None else int(epochs)
        self.equal_shards = isinstance(shard, str) and shard == "auto"
        self.shard = _shard(shard)
        self.rows_per_request = None if rows_per_request is None else int(rows_per_request)
        self.epoch_end = epoch_end
        self.block_rows: int | None = None
        block_rows = getattr(source, "block_rows", None) if self.shuffle else None
        if block_rows is not None:
            check_whole(f"Stream: block_rows of the {type(source).__qualname__}", block_rows, 1)
            self.block_rows = int(block_rows)

    def plan(self, last_batch: str, batch_axes: Sequence[int], left: Mapping[int, Spans] | None = None) -> StreamPlan:
        """Return which rows are where.

        Args:
            last_batch: says what becomes of rows that do not divide among the shards.
            batch_axes: the batch axis of each input.
            left: spans of positions of the whole epoch instead of this shard's: what a changed number of shards left.
        """
        return StreamPlan(self, last_batch, left or {})

    def check(self, last_batch: str, batch_size: int) -> None:
        """Refuse what cannot work with these settings. Raises ConfigError."""
        index, count = self.shard
        rows = len(self.source)
        shares = [len(share_of(rows, each, count, last_batch)) for each in (0, index, count - 1)]
        if not min(shares):
            raise ConfigError(
                f"Stream: shard={self.shard}: {rows} rows among {count} shards leave some without a row "
                f"(last_batch={last_batch!r}); wanted at most {rows} shards"
            )
        if not self.equal_shards or (self.epochs is None and self.epoch_end == "run_on"):  # then none ever ends
            return
        often = self.epochs or 1
        batches = [
            -(-share // batch_size) if self.epoch_end == "break" else -(-share * often // batch_size) for share in shares
        ]
        if len(set(batches)) > 1:
            raise ConfigError(
                f"Stream: shard='auto' with last_batch={last_batch!r}: {rows} rows among {count} ranks would give some "
                f"{max(batches)} batches and some {min(batches)}, and the others would wait for them; wanted last_batch='drop' "
                "or 'pad'"
            )

    @property
    def can_change_shards(self) -> bool:
        """Whether the states of all shards can be loaded into another number of them."""
        return True

    def identity(self, last_batch: str) -> dict[str, Any]:
        """Return what a saved position depends on, as plain data."""
        return {"rows": len(self.source), "shuffle": self.shuffle, "seed": self.seed, "block_rows": self.block_rows}


class StreamPlan:
    """Which rows are where in a Stream: an epoch has `epoch_rows` offsets, each of which is a row number. Thread-safe."""

    # Invariant under _lock: `_orders` holds the orders of the epochs asked for last.

    def __init__(self, stream: Stream, last_batch: str, left: Mapping[int, Spans]) -> None:
        self.epochs = stream.epochs
        self.share = share_of(len(stream.source), *stream.shard, last_batch)
        self.regular_rows = len(self.share)
        self.most_rows = -(-len(stream.source) // stream.shard[1])  # of any shard
        self.left = dict(left)
        self._stream = stream
        self._lock = threading.Lock()
        self._orders: dict[int, EpochOrder] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_orders": {}}  # a worker process only fetches

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def epoch_rows(self, epoch: int) -> int:
        """Return how many rows the epoch has."""
        return rows_of(self.left[epoch]) if epoch in self.left else self.regular_rows

    def rows(self, epoch: int, begin: int, stop: int) -> NDArray[np.int64]:
        """Return the row numbers at the offsets begin to stop, read-only int64."""
        order = self._order(epoch)
        size = len(self._stream.source)
        pieces = [
            order.rows(at % size, at % size + until - at)
            for first, last in self._positions(epoch, begin, stop)
            for at, until in cut_at(first, last, size)
        ]
        if len(pieces) == 1:
            return pieces[0]
        rows = np.concatenate(pieces)
        rows.flags.writeable = False
        return rows

    def _positions(self, epoch: int, begin: int, stop: int) -> Spans:
        """Return the positions in the order of the whole epoch."""
        if epoch not in self.left:
            return [(self.share.start + begin, self.share.start + stop)]
        return slice_of(self.left[epoch], begin, stop)

    def fetch(self, rows: NDArray[np.int64], request: FetchRequest) -> Sequence[NDArray[Any]]:
        """Fetch from the source."""
        return self._stream.source.fetch(rows, request)

    def file_of(self, row: int) -> str | None:
        """Return what the source calls the file of a row, where it knows."""
        file_of = getattr(self._stream.source, "file_of", None)
        file = None if file_of is None else file_of(row)
        return None if file is None else str(file)

    def _order(self, epoch: int) -> EpochOrder:
        with self._lock:
            order = self._orders.get(epoch)
            if order is None:
                stream = self._stream
                order = EpochOrder(len(stream.source), (stream.seed, epoch), stream.shuffle, stream.block_rows)
                self._orders[epoch] = order
                if len(self._orders) > ORDERS_KEPT:
                    del self._orders[next(iter(self._orders))]
            return order


# Of a number in the environment; Python refuses to read one of thousands.
MAX_DIGITS = 18


def _shard(shard: Any) -> tuple[int, int]:
    if isinstance(shard, str) and shard == "auto":
        numbers = []
        for name in ("RANK", "WORLD_SIZE"):
            text = os.environ.get(name, "")
            if not text.isdecimal() or len(text) > MAX_DIGITS:
                raise ConfigError(
                    f"Stream: shard='auto': environment variable {name}: got {text!r}; wanted a whole number, as torchrun "
                    "sets it, or shard=(index, count)"
                )
            numbers.append(int(text))
        shard = numbers[0], numbers[1]
    if isinstance(shard, (str, bytes, bytearray)) or not isinstance(shard, Sequence) or len(shard) != 2:
        raise ConfigError(f"Stream: shard: got {shard!r}; wanted (index, count) or 'auto'")
    index, count = shard
    check_whole("Stream: shard count", count, 1)
    check_whole("Stream: shard index", index, 0)
    if index >= count:
        raise ConfigError(f"Stream: shard: got index {index} of {count} shards; wanted 0 to {count - 1}")
    return int(index), int(count)


def share_of(rows: int, index: int, count: int, last_batch: str) -> range:
    """Return the positions of the epoch that a shard reads; one at `rows` or beyond repeats that less `rows`."""
    if last_batch == "keep":
        return range(rows * index // count, rows * (index + 1) // count)
    each = rows // count if last_batch == "drop" else -(-rows // count)
    return range(each * index, each * (index + 1))


def cut_at(begin: int, stop: int, size: int) -> Spans:
    """Cut begin to stop at the multiples of `size`."""
    inner = range((begin // size + 1) * size, stop, size)
    return list(zip([begin, *inner], [*inner, stop], strict=True))
