"""Streams go in, one stream comes out: each row drawn from one of them by weight, in an order that the seed decides."""

from __future__ import annotations

import bisect
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.contracts import FetchRequest
from input_workers.errors import BadRows, ConfigError, SpecMismatch
from input_workers.progress import Spans
from input_workers.sources.stream import Stream, StreamPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Mix", "MixPlan"]

# Draws are made in blocks in which every stream has its exact share: then the rows that came of each are known at any
# position, without counting. A weight is rounded to this fraction of all.
BLOCK_DRAWS = 1 << 14
BLOCKS_KEPT = 4
ENDLESS = 1 << 62


class Mix(Stream):
    """Several Streams as one. Use it wherever a Stream is wanted; the streams mixed may have shards and epochs of their own.

    Every row is drawn from one of the streams, by their weights: of each 16,384 rows, exactly so many come from each, in an
    order that the seed decides. A stream's own rows keep their order.

    Args:
        streams: {name: (stream, weight)}; weights are positive and need not sum to 1.
        seed: of the drawing and of `request.rng`.
        ends: "first": where the first stream has no row left; "all": when none has, the others being drawn from meanwhile.
        rows_per_request: rows of one request, drawn from all streams; by default the batch size. `request.rows` are
            positions in the mix; the sources are given row numbers of theirs, with requests of their own.

    Raises:
        ConfigError: a parameter is wrong.
    """

    def __init__(
        self,
        streams: Mapping[str, tuple[Stream, float]],
        seed: int = 0,
        ends: str = "first",
        rows_per_request: int | None = None,
    ) -> None:
        if not isinstance(streams, Mapping) or not streams:
            raise ConfigError(f"Mix: got {streams!r}; wanted {{name: (stream, weight), ...}}")
        for name, pair in streams.items():
            if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], Stream) or isinstance(pair[0], Mix):
                raise ConfigError(f"Mix: {name!r}: got {pair!r}; wanted (stream, weight), the stream no Mix itself")
            weight = pair[1]
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
                raise ConfigError(f"Mix: {name!r}: weight: got {weight!r}; wanted a positive number")
            if pair[0].rows_per_request is not None or pair[0].epoch_end != "run_on":
                raise ConfigError(f"Mix: {name!r}: rows_per_request and epoch_end are the Mix's; leave them out of its streams")
        if ends not in ("first", "all"):
            raise ConfigError(f"Mix: ends: got {ends!r}; wanted 'first' or 'all'")
        self.streams = dict(streams)
        self.ends = ends
        super().__init__(_NoSource(), seed=seed, epochs=1, rows_per_request=rows_per_request)
        _shares([weight for _, weight in self.streams.values()], list(self.streams))

    def plan(  # type: ignore[override]
        self, last_batch: str, batch_axes: Sequence[int], left: Mapping[int, Spans] | None = None
    ) -> MixPlan:
        """Return which rows are where; see `Stream.plan`."""
        return MixPlan(self, last_batch, batch_axes)

    def check(self, last_batch: str, batch_size: int) -> None:
        """Refuse what cannot work with these settings. Raises ConfigError."""
        for name, (stream, _) in self.streams.items():
            try:
                stream.check(last_batch, batch_size)
            except ConfigError as error:
                raise ConfigError(f"Mix: {name!r}: {error}") from error

    @property
    def can_change_shards(self) -> bool:
        """A Mix draws from the shards of its streams: their number is part of what it is."""
        return False

    def identity(self) -> dict[str, Any]:
        """Return what a saved position depends on, as plain data."""
        streams = {
            name: {**stream.identity(), "weight": float(weight), "epochs": stream.epochs, "shard": list(stream.shard)}
            for name, (stream, weight) in self.streams.items()
        }
        return {"mix": streams, "seed": self.seed, "ends": self.ends}


class _NoSource:
    """Stands where a Stream has its source; the Mix's plan fetches from the streams."""

    def __len__(self) -> int:
        return ENDLESS

    def fetch(self, rows: NDArray[np.int64], request: FetchRequest) -> Sequence[NDArray[Any]]:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class _Phase:
    """A stretch of the mix in which the same streams are drawn from."""

    begin: int  # its first position in the mix
    number: int
    streams: tuple[int, ...]  # which are drawn from
    shares: tuple[int, ...]  # of a block, by stream
    taken: tuple[int, ...]  # rows of each stream before it


class MixPlan:
    """Which rows are where in a Mix. Thread-safe."""

    # Invariant under _lock: `_blocks` holds the draws of the blocks asked for last.

    epochs = 1
    left: Mapping[int, Spans] = {}

    def __init__(self, mix: Mix, last_batch: str, batch_axes: Sequence[int]) -> None:
        self._seed = mix.seed
        self._axes = tuple(batch_axes)
        self._names = list(mix.streams)
        self._weights = [weight for _, weight in mix.streams.values()]
        self._seeds = [stream.seed for stream, _ in mix.streams.values()]
        self._plans: list[StreamPlan] = [stream.plan(last_batch, batch_axes) for stream, _ in mix.streams.values()]
        self._lock = threading.Lock()
        self._blocks: dict[tuple[int, int], NDArray[np.intp]] = {}
        self._phases: list[_Phase] = []
        self.most_rows = self._lay_out(mix.ends)
        if not self.most_rows:
            raise ConfigError("Mix: it ends before its first row")

    def epoch_rows(self, epoch: int) -> int:
        """Return how many rows there are."""
        return self.most_rows

    def rows(self, epoch: int, begin: int, stop: int) -> NDArray[np.int64]:
        """Return the positions themselves."""
        rows = np.arange(begin, stop, dtype=np.int64)
        rows.flags.writeable = False
        return rows

    def fetch(self, rows: NDArray[np.int64], request: FetchRequest) -> Sequence[NDArray[Any]]:
        """Fetch the rows at these positions from the streams they are drawn from. Raises what the sources raise."""
        drawn, at = self._drawn(rows)
        came: list[tuple[NDArray[np.intp], Sequence[NDArray[Any]]]] = []
        for index, epoch in sorted(
            {(int(index), int(epoch)) for index, epoch in zip(drawn, self._epochs(drawn, at), strict=True)}
        ):
            plan = self._plans[index]
            here = np.flatnonzero((drawn == index) & (at // plan.regular_rows == epoch))
            came.append((here, self._fetch_from(index, epoch, at[here] - epoch * plan.regular_rows, rows[here], request)))
        return self._put_together(came, len(rows))

    def file_of(self, row: int) -> str | None:
        """Return the stream's name, and what its source calls the file."""
        drawn, at = self._drawn(np.array([row]))
        plan, name = self._plans[int(drawn[0])], self._names[int(drawn[0])]
        epoch, offset = divmod(int(at[0]), plan.regular_rows)
        file = plan.file_of(int(plan.rows(epoch, offset, offset + 1)[0]))
        return name if file is None else f"{name}: {file}"

    def _epochs(self, drawn: NDArray[np.intp], at: NDArray[np.int64]) -> NDArray[np.int64]:
        regular = np.array([plan.regular_rows for plan in self._plans], np.int64)
        return np.floor_divide(at, regular[drawn])

    def _fetch_from(
        self, index: int, epoch: int, offsets: NDArray[np.int64], positions: NDArray[np.int64], request: FetchRequest
    ) -> Sequence[NDArray[Any]]:
        plan = self._plans[index]
        begin, stop = int(offsets[0]), int(offsets[-1]) + 1  # a stream's rows come in order, so this is little more
        rows = plan.rows(epoch, begin, stop)
        if len(rows) != len(offsets):
            rows = rows[offsets - begin]
            rows.flags.writeable = False
        try:
            arrays = plan.fetch(rows, request.part(rows, index, epoch=epoch, seed=self._seeds[index]))
        except BadRows as error:
            bad = set(error.rows)
            named = [int(position) for position, row in zip(positions, rows, strict=True) if int(row) in bad]
            raise BadRows(named, f"stream {self._names[index]!r}: {error}") from error
        shapes = [np.shape(array) for array in arrays]
        counts = [shape[axis] if axis < len(shape) else None for shape, axis in zip(shapes, self._axes, strict=False)]
        if counts != [len(rows)] * len(self._axes):
            raise SpecMismatch(f"stream {self._names[index]!r}: got arrays of shapes {shapes}; wanted {len(rows)} rows in each")
        return arrays

    def _put_together(self, came: list[tuple[NDArray[np.intp], Sequence[NDArray[Any]]]], count: int) -> Sequence[NDArray[Any]]:
        if len(came) == 1:
            return came[0][1]
        together: list[NDArray[Any]] = []
        for number, axis in enumerate(self._axes):
            first = came[0][1][number]
            target = np.empty((*first.shape[:axis], count, *first.shape[axis + 1 :]), first.dtype)
            by_row = np.moveaxis(target, axis, 0)
            for here, arrays in came:
                array = np.moveaxis(arrays[number], axis, 0)
                if array.dtype != target.dtype or array.shape[1:] != by_row.shape[1:]:
                    raise SpecMismatch(
                        f"Mix: input {number}: streams give rows of {target.dtype!r} with shape {by_row.shape[1:]} and of "
                        f"{array.dtype!r} with shape {array.shape[1:]}; wanted the same of all, nothing is ever cast"
                    )
                by_row[here] = array
            together.append(target)
        return together

    def _lay_out(self, ends: str) -> int:
        """Find the phases and return the number of rows of the mix."""
        count = len(self._plans)
        rows = [ENDLESS if plan.epochs is None else plan.epochs * plan.regular_rows for plan in self._plans]
        taken = [0] * count
        begin = 0
        while alive := [index for index in range(count) if taken[index] < rows[index]]:
            shares = _shares([self._weights[index] for index in alive], [self._names[index] for index in alive])
            phase = _Phase(begin, len(self._phases), tuple(alive), tuple(shares), tuple(taken))
            self._phases.append(phase)
            # Where each would be asked for a row that it does not have.
            stops = [
                self._draw_of(phase, position, rows[index] - taken[index]) for position, index in enumerate(alive)
                if rows[index] < ENDLESS
            ]  # fmt: skip
            if not stops:
                return ENDLESS
            length = min(stops)
            for position, index in enumerate(alive):
                taken[index] += self._drawn_before(phase, position, length)
            begin += length
            if ends == "first":
                return begin
        return begin

    def _draw_of(self, phase: _Phase, position: int, nth: int) -> int:
        """Return the offset in the phase of the nth draw (from 0) of one of its streams."""
        block, rest = divmod(nth, phase.shares[position])
        return block * BLOCK_DRAWS + int(np.flatnonzero(self._block(phase, block) == position)[rest])

    def _drawn_before(self, phase: _Phase, position: int, offset: int) -> int:
        """Return how often one of the streams was drawn before this offset in the phase."""
        block, rest = divmod(offset, BLOCK_DRAWS)
        return block * phase.shares[position] + int(np.count_nonzero(self._block(phase, block)[:rest] == position))

    def _drawn(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        """Return for each position of the mix (which stream it is drawn from, which row of that stream, over all epochs)."""
        drawn = np.empty(len(rows), np.intp)
        at = np.empty(len(rows), np.int64)
        begins = [phase.begin for phase in self._phases]
        places = [(bisect.bisect_right(begins, int(row)) - 1, int(row)) for row in rows]
        keys = [(number, (row - begins[number]) // BLOCK_DRAWS) for number, row in places]
        for number, block in sorted(set(keys)):
            phase = self._phases[number]
            draws = self._block(phase, block)
            here = np.flatnonzero([key == (number, block) for key in keys])
            inside = rows[here] - phase.begin - block * BLOCK_DRAWS
            for position, index in enumerate(phase.streams):
                before = np.cumsum(draws == position)  # up to and with each draw
                chosen = draws[inside] == position
                drawn[here[chosen]] = index
                at[here[chosen]] = phase.taken[index] + block * phase.shares[position] + before[inside[chosen]] - 1
        return drawn, at

    def _block(self, phase: _Phase, block: int) -> NDArray[np.intp]:
        """Return the draws of a block: for each, the position of a stream in the phase."""
        key = (phase.number, block)
        with self._lock:
            draws = self._blocks.get(key)
        if draws is None:
            draws = np.repeat(np.arange(len(phase.shares)), phase.shares)
            np.random.default_rng((self._seed, *key)).shuffle(draws)
            with self._lock:
                self._blocks[key] = draws
                if len(self._blocks) > BLOCKS_KEPT:
                    del self._blocks[next(iter(self._blocks))]
        return draws


def _shares(weights: Sequence[float], names: Sequence[str]) -> list[int]:
    """Return how many draws of a block each stream has: by weight, at least one, and all of them together."""
    total = math.fsum(weights)
    exact = [weight / total * BLOCK_DRAWS for weight in weights]
    for name, draws in zip(names, exact, strict=True):
        if draws < 0.5:
            raise ConfigError(f"Mix: {name!r}: its weight is less than 1 in {2 * BLOCK_DRAWS} of all; wanted a larger one")
    shares = [max(1, math.floor(draws)) for draws in exact]
    by_remainder = sorted(range(len(shares)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: BLOCK_DRAWS - sum(shares)]:
        shares[index] += 1
    return shares
