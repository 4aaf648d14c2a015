"""What the parts hand each other: specs, chunks, batches and requests, and the three Protocols that users may implement.

Axis convention: an array of an input has the rows along its *batch axis*; everything else is the shape of one row.
"""

from __future__ import annotations

import collections
import keyword
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from input_workers.errors import ConfigError, SpecMismatch

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["ArraySpec", "Chunk", "DeviceFeed", "FetchRequest", "Part", "Slot", "Source", "batch_type"]

RESERVED_INPUT_NAMES = frozenset({"epoch", "valid_rows"})


@dataclass(frozen=True, slots=True, init=False)
class ArraySpec:
    """What one row of an input looks like.

    Attributes:
        shape: the shape of one row, the batch axis left out: `(224, 224, 3)`; `()` for a label. None is a side of any
            length, which may be another in each chunk: only with `rebatch=False`.
        dtype: the exact dtype, byte order included.
    """

    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]

    def __init__(self, shape: Sequence[int | None], dtype: DTypeLike) -> None:
        object.__setattr__(self, "shape", tuple(None if side is None else int(side) for side in shape))
        object.__setattr__(self, "dtype", np.dtype(dtype))
        if any(side is not None and side < 0 for side in self.shape):
            raise ConfigError(f"ArraySpec: a side is negative in shape {self.shape}")
        if self.dtype.hasobject:
            raise SpecMismatch(f"ArraySpec: dtype {self.dtype} holds Python objects; wanted fixed-size values")

    @classmethod
    def of(cls, array: NDArray[Any], axis: int) -> ArraySpec:
        """Return what one row of an array looks like, whose rows lie along `axis`."""
        return cls(array.shape[:axis] + array.shape[axis + 1 :], array.dtype)

    def batch_shape(self, rows: int, axis: int) -> tuple[int, ...]:
        """Return the shape of `rows` rows with the batch axis at `axis`. Only where every side is known."""
        shape = self._known()
        return (*shape[:axis], rows, *shape[axis:])

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row. Only where every side is known."""
        return math.prod(self._known()) * self.dtype.itemsize

    @property
    def is_fixed(self) -> bool:
        """Whether every side is known."""
        return None not in self.shape

    def admits(self, shape: Sequence[int | None]) -> bool:
        """Whether rows may have this shape."""
        sides = zip(self.shape, shape, strict=False)
        return len(shape) == len(self.shape) and all(wanted is None or wanted == got for wanted, got in sides)

    def _known(self) -> tuple[int, ...]:
        known = tuple(side for side in self.shape if side is not None)
        if len(known) != len(self.shape):
            raise ConfigError(f"ArraySpec: got shape {self.shape}; wanted one without a side of any length (None)")
        return known


class FetchRequest:
    """A numbered call for given rows of a Stream. Belongs to the thread that fetches it.

    Attributes:
        index: the number of the request, counted over all epochs.
        epoch: the epoch its rows belong to, from 0.
        worker_id: the fetcher that serves it.
        batch_size: rows of a batch as it is delivered, a hint.
        rows: the row numbers wanted, a read-only int64 array.
        out: memory to write into, one array per input, or None where it is not offered.
    """

    # `ordinal` counts the requests of a run. A request covers the offsets `begin` to `begin + len(rows)` of its epoch; of
    # those, the chunk has the rows at `kept` (indices into `rows`; None: all), the others having been delivered by an
    # earlier run, or skipped.
    __slots__ = ("_key", "_rng", "batch_size", "begin", "epoch", "index", "kept", "ordinal", "out", "rows", "worker_id")

    def __init__(
        self,
        index: int,
        epoch: int,
        rows: NDArray[np.int64],
        *,
        worker_id: int = 0,
        batch_size: int = 0,
        seed: int = 0,
        ordinal: int = 0,
        begin: int = 0,
        kept: NDArray[np.int64] | None = None,
    ) -> None:
        self.index = index
        self.epoch = epoch
        self.rows = rows
        self.worker_id = worker_id
        self.batch_size = batch_size
        self.out: list[NDArray[Any]] | None = None
        self.ordinal = ordinal
        self.begin = begin
        self.kept = kept
        self._key: tuple[int, ...] = (seed, epoch, index)
        self._rng: np.random.Generator | None = None

    @property
    def rng(self) -> np.random.Generator:
        """Random numbers that depend on seed, epoch and index alone, never on who fetches. Made at first use."""
        if self._rng is None:
            self._rng = np.random.default_rng(self._key)
        return self._rng

    @property
    def key(self) -> tuple[int, ...]:
        """What `rng` depends on."""
        return self._key

    def part(self, rows: NDArray[np.int64], *more_key: int, epoch: int | None = None, seed: int | None = None) -> FetchRequest:
        """Return a request for other rows in the name of this one, with random numbers from its beginning.

        Args:
            rows: the row numbers wanted.
            more_key: what the random numbers depend on besides.
            epoch: another than this one's.
            seed: another than this one's.
        """
        part = FetchRequest(self.index, self.epoch, rows, worker_id=self.worker_id, batch_size=self.batch_size)
        part.epoch = self.epoch if epoch is None else epoch
        part._key = (self._key[0] if seed is None else seed, part.epoch, *self._key[2:], *more_key)
        return part

    def offset(self, row: int) -> int:
        """Return where the chunk's rows from `row` on begin in the epoch; for `row` = the chunk's rows, where it ends.

        What lies between two kept rows counts with the first: it will not come any more.
        """
        if self.kept is None:
            return self.begin + row
        if row == 0:
            return self.begin
        return self.begin + (int(self.kept[row]) if row < len(self.kept) else len(self.rows))


# What of an epoch a batch has: (epoch, begin, stop), offsets into the epoch.
Part: TypeAlias = tuple[int, int, int]

# (arrays, rows, nbytes, request): one array per input; a plain tuple, because one is made for every call of the fetch
# function. The request is None for a plain function. rows == 0 marks the end of the request's epoch.
Chunk: TypeAlias = "tuple[Sequence[NDArray[Any]], int, int, FetchRequest | None]"


class Slot:
    """Host memory in which a batch is assembled, one array per input, of the delivered shape and C-contiguous."""

    __slots__ = ("arrays", "epoch", "filled", "parts", "rows")

    def __init__(self, arrays: Sequence[NDArray[Any]], rows: int, filled: int = 0, epoch: int = 0) -> None:
        self.arrays = arrays
        self.rows = rows
        self.filled = filled  # real rows, from the first; a padded slot stays below `rows`
        self.epoch = epoch  # of its first row
        self.parts: list[Part] = []  # of a Stream: what its rows are


@runtime_checkable
class Source(Protocol):
    """Rows by number. `fetch` is called from many threads or processes at once and must not depend on which.

    A source may have `block_rows`: so many consecutive rows lie together, and a shuffle keeps them near each other; and
    `file_of(row)`: the name of what the row is read from, for the list of skipped rows.
    """

    def __len__(self) -> int:
        """Return the number of rows; it must not change."""

    def fetch(self, rows: NDArray[np.int64], request: FetchRequest) -> Sequence[NDArray[Any]]:
        """Return one array per input, each with exactly `len(rows)` rows along its batch axis, in that order."""


@runtime_checkable
class DeviceFeed(Protocol):
    """Moves a slot to a device, in two halves: `send` on the enqueuer's thread, `receive` on the trainer's.

    A feed may have, besides:

    - `chunk_alignment`: a chunk that is exactly a batch is then sent as it is, not copied into a slot, if its arrays are
      aligned to this many bytes (1: always). By default, or if it is None: never.
    - `slot_memory(nbytes)`: makes memory for slots, after `open`, on the enqueuer's thread: a uint8 array of so many
      writable bytes, 64-byte aligned, given back when it dies. By default it comes from the heap. A slot is used again when
      the last view of its arrays has died: a feed whose copy goes on after `send` must hold them until it is done.
    - `is_ready(ticket)`: asked on the trainer's thread, just before `receive`; batches for which it is False count in
      `batches_not_ready`. By default all are ready.
    - `to_numpy(array)`: what `receive` returned, as a NumPy array of the same dtype, for `as_numpy()`; on the trainer's
      thread. By default `numpy.asarray`.
    """

    def open(self, specs: Sequence[ArraySpec], batch_size: int) -> None:
        """Called once before the first `send`, on the enqueuer's thread, when the specs are known."""

    def send(self, slot: Slot) -> Any:
        """Start moving the slot to the device; return a ticket. May raise: the batch counts as `device_error`."""

    def receive(self, ticket: Any) -> Sequence[Any]:
        """Return the arrays on the device, ready for the calling thread's next operation."""

    def close(self) -> None:
        """Give back what `open` took. Called once after every `open`, when no `send` is running."""


def batch_type(name: str, input_names: Sequence[str]) -> type[Any]:
    """Return the namedtuple type of a source's batches, with `epoch` and `valid_rows` as attributes.

    Raises:
        ConfigError: a name is not an identifier, is a keyword, is used twice, begins with an underscore or is reserved.
    """
    names = list(input_names)
    if isinstance(input_names, str) or not names:
        raise ConfigError(f"input_names: got {input_names!r}; wanted at least one name, such as ['data', 'label']")
    for each in names:
        if not isinstance(each, str) or not each.isidentifier() or keyword.iskeyword(each) or each.startswith("_"):
            raise ConfigError(
                f"input_names: {each!r} is no usable name; wanted an identifier, no keyword, no leading underscore"
            )
        if each in RESERVED_INPUT_NAMES:
            raise ConfigError(f"input_names: {each!r} is an attribute of every batch; wanted another name")
    if len(set(names)) != len(names):
        raise ConfigError(f"input_names: got {names}; wanted each name once")
    fields = collections.namedtuple("Batch", names)  # type: ignore[misc]  # noqa: PYI024  the names are known here only
    doc = f"A batch of source {name!r}. `epoch`: of its first row. `valid_rows`: rows that are real, not padding."
    return type("Batch", (fields,), {"__doc__": doc, "epoch": 0, "valid_rows": 0, "__module__": __name__})


# What the user passes as fetch_fun, besides a Stream.
FetchFunction: TypeAlias = Callable[[int, int], "Sequence[NDArray[Any]] | None"]
