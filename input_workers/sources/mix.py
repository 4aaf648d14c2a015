"""Streams go in, one stream comes out: each row drawn from one of them by weight, in an order that the seed decides."""

from __future__ import annotations

import bisect
import math
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.contracts import FetchRequest
from input_workers.errors import BadRows, ConfigError, SpecMismatch
from input_workers.progress import Spans
from input_workers.sources.mix_shares import BLOCK_DRAWS, shares_of_block
from input_workers.sources.permutation import Permutation
from input_workers.sources.stream import Stream, StreamPlan, share_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ENDLESS", "Mix", "MixPlan"]

BLOCKS_KEPT = 4
MIXED = 3  # in the key of a block's order, beside seed, phase and block
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
            if not isinstance(name, str) or not name:
                raise ConfigError(f"Mix: got a stream named {name!r}; wanted a text, because a saved position holds it")
            if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], Stream) or isinstance(pair[0], Mix):
                raise ConfigError(f"Mix: {name!r}: got {pair!r}; wanted (stream, weight), the stream no Mix itself")
            weight = pair[1]
            is_number = isinstance(weight, (int, float, np.integer, np.floating)) and not isinstance(weight, bool)
            too_large = isinstance(weight, int) and weight > sys.float_info.max
            if not is_number or too_large or not 0 < weight < math.inf:
                raise ConfigError(f"Mix: {name!r}: weight: got {weight!r}; wanted a positive number")
            if pair[0].rows_per_request is not None or pair[0].epoch_end != "run_on":
                raise ConfigError(f"Mix: {name!r}: rows_per_request and epoch_end are the Mix's; leave them out of its streams")
        if not isinstance(ends, str) or ends not in ("first", "all"):
            raise ConfigError(f"Mix: ends: got {ends!r}; wanted 'first' or 'all'")
        self.streams = {name: (stream, float(weight)) for name, (stream, weight) in streams.items()}
        self.ends = ends
        super().__init__(_NoSource(), seed=seed, epochs=1, rows_per_request=rows_per_request)
        shares_of_block([weight for _, weight in self.streams.values()], list(self.streams))

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
            rows, count = len(stream.source), stream.shard[1]
            if stream.equal_shards and stream.epochs is not None and last_batch == "keep" and rows % count:
                raise ConfigError(
                    f"Mix: {name!r}: shard='auto' with last_batch='keep': {rows} rows among {count} ranks would end the mix of "
                    "some before that of others, which would wait for them; wanted last_batch='drop' or 'pad'"
                )

    @property
    def can_change_shards(self) -> bool:
        """A Mix draws from the shards of its streams: their number is part of what it is."""
        return False

    def identity(self, last_batch: str) -> dict[str, Any]:
        """Return what a saved position depends on, as plain data."""
        streams = {}
        for name, (stream, weight) in self.streams.items():
            share = share_of(len(stream.source), *stream.shard, last_batch)
            more = {"epochs": stream.epochs, "shard": list(stream.shard), "share": [share.start, share.stop]}
            streams[name] = {**stream.identity(last_batch), "weight": weight, **more}
        return {"mix": streams, "order": list(streams), "seed": self.seed, "ends": self.ends}


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

    # Invariant under _lock: `_blocks` holds the blocks asked for last. `_first` is set once: whose rows came first, and what
    # one of each input looks like.

    epochs = 1
    left: Mapping[int, Spans] = {}

    def __init__(self, mix: Mix, last_batch: str, batch_axes: Sequence[int]) -> None:
        self._seed = mix.seed
        self._axes = tuple(batch_axes)
        self._names = list(mix.streams)
        self._weights = [weight for _, weight in mix.streams.values()]
        self._seeds = [stream.seed for stream, _ in mix.streams.values()]
        self._plans: list[StreamPlan] = [stream.plan(last_batch, batch_axes) for stream, _ in mix.streams.values()]
        sources = [id(stream.source) for stream, _ in mix.streams.values()]
        self._source_numbers = [sources.index(each) for each in sources]  # streams may share a source
        self._lock = threading.Lock()
        self._first: tuple[int, list[tuple[np.dtype[Any], tuple[int, ...]]]] | None = None
        self._blocks: dict[tuple[int, int], tuple[NDArray[np.int16], NDArray[np.int16]]] = {}
        self._phases: list[_Phase] = []
        self.most_rows = self._lay_out(mix.ends)
        self._begins = [phase.begin for phase in self._phases]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_blocks": {}}  # a worker process computes the blocks that it needs

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

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
        latest: dict[int, int] = {}  # where in `came` the rows are that a source has returned last
        for index in np.flatnonzero(np.bincount(drawn)).tolist():
            places = np.flatnonzero(drawn == index)
            at_places = at[places]  # rising: a stream's own rows come in their order
            regular = self._plans[index].regular_rows
            begin = 0
            for epoch in range(int(at_places[0]) // regular, int(at_places[-1]) // regular + 1):
                stop = int(np.searchsorted(at_places, (epoch + 1) * regular))
                if begin < stop:
                    here, offsets = places[begin:stop], at_places[begin:stop] - epoch * regular
                    source = self._source_numbers[index]
                    if source in latest:  # it may use its memory again, so its rows are copied before it is called again
                        earlier, arrays = came[latest[source]]
                        came[latest[source]] = earlier, [array.copy() for array in arrays]
                    latest[source] = len(came)
                    came.append((here, self._fetch_from(index, epoch, offsets, rows[here], request)))
                begin = stop
        return self._put_together(came, len(rows))

    def file_of(self, row: int) -> str | None:
        """Return the stream's name, and what its source calls the file."""
        drawn, at = self._drawn(np.array([row]))
        plan, name = self._plans[int(drawn[0])], self._names[int(drawn[0])]
        epoch, offset = divmod(int(at[0]), plan.regular_rows)
        file = plan.file_of(int(plan.rows(epoch, offset, offset + 1)[0]))
        return name if file is None else f"{name}: {file}"

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
        self._check(index, arrays, len(rows))
        return arrays

    def _check(self, index: int, arrays: object, count: int) -> None:
        """Raise SpecMismatch unless these are so many rows of what the other streams give."""
        name = f"Mix: stream {self._names[index]!r}"
        if not isinstance(arrays, (list, tuple)) or not all(isinstance(array, np.ndarray) for array in arrays):
            raise SpecMismatch(
                f"{name}: got {type(arrays).__qualname__} {arrays!r:.200}; wanted one NumPy array for each input"
            )
        shapes = [array.shape for array in arrays]
        counts = [shape[axis] if axis < len(shape) else None for shape, axis in zip(shapes, self._axes, strict=False)]
        if len(arrays) != len(self._axes) or counts != [count] * len(arrays):
            raise SpecMismatch(f"{name}: got arrays of shapes {shapes}; wanted {len(self._axes)} with {count} rows in each")
        specs = [
            (array.dtype, (*shape[:axis], *shape[axis + 1 :]))
            for array, shape, axis in zip(arrays, shapes, self._axes, strict=True)
        ]
        if self._first is None:
            with self._lock:
                self._first = self._first or (index, specs)
        first, wanted = self._first
        if specs != wanted:
            number = next(number for number, (got, want) in enumerate(zip(specs, wanted, strict=True)) if got != want)
            raise SpecMismatch(
                f"{name}: input {number}: got rows of {specs[number][0]!r} with shape {specs[number][1]}; wanted "
                f"{wanted[number][0]!r} with shape {wanted[number][1]}, as stream {self._names[first]!r} gives"
            )

    def _put_together(self, came: list[tuple[NDArray[np.intp], Sequence[NDArray[Any]]]], count: int) -> Sequence[NDArray[Any]]:
        if len(came) == 1:
            return came[0][1]
        together: list[NDArray[Any]] = []
        for number, axis in enumerate(self._axes):
            first = came[0][1][number]
            target = np.empty((*first.shape[:axis], count, *first.shape[axis + 1 :]), first.dtype)
            by_row = np.moveaxis(target, axis, 0) if axis else target
            for here, arrays in came:
                by_row[here] = np.moveaxis(arrays[number], axis, 0) if axis else arrays[number]
            together.append(target)
        return together

    def _lay_out(self, ends: str) -> int:
        """Find the phases and return the number of rows of the mix."""
        count = len(self._plans)
        rows = [ENDLESS if plan.epochs is None else plan.epochs * plan.regular_rows for plan in self._plans]
        taken, begin = [0] * count, 0
        while alive := [index for index in range(count) if taken[index] < rows[index]]:
            shares = shares_of_block([self._weights[index] for index in alive], [self._names[index] for index in alive])
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
        return block * BLOCK_DRAWS + int(np.flatnonzero(self._block(phase, block)[0] == position)[rest])

    def _drawn_before(self, phase: _Phase, position: int, offset: int) -> int:
        """Return how often one of the streams was drawn before this offset in the phase."""
        block, rest = divmod(offset, BLOCK_DRAWS)
        return block * phase.shares[position] + int(np.count_nonzero(self._block(phase, block)[0][:rest] == position))

    def _drawn(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        """Return for each of these rising positions (which stream it is drawn from, which row of that, over all epochs)."""
        drawn = np.empty(len(rows), np.intp)
        at, begin = np.empty(len(rows), np.int64), 0
        while begin < len(rows):
            row = int(rows[begin])
            number = bisect.bisect_right(self._begins, row) - 1
            phase = self._phases[number]
            block = (row - phase.begin) // BLOCK_DRAWS
            block_begin = phase.begin + block * BLOCK_DRAWS
            block_stop = min(block_begin + BLOCK_DRAWS, *self._begins[number + 1 : number + 2], ENDLESS)
            stop = int(np.searchsorted(rows, block_stop))
            draws, before = self._block(phase, block)
            inside = rows[begin:stop] - block_begin
            places = draws[inside]
            drawn[begin:stop] = np.array(phase.streams)[places]
            first_rows = [phase.taken[index] + block * share for index, share in zip(phase.streams, phase.shares, strict=True)]
            at[begin:stop] = np.array(first_rows, np.int64)[places] + before[inside]
            begin = stop
        return drawn, at

    def _block(self, phase: _Phase, block: int) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """Return for each draw of a block (the position of a stream in the phase, how often that was drawn before).

        The order is decided by seed, phase and block alone, with every version of NumPy.
        """
        key = (phase.number, block)
        with self._lock:
            found = self._blocks.get(key)
        if found is None:
            places = Permutation(BLOCK_DRAWS, (self._seed, MIXED, *key))(np.arange(BLOCK_DRAWS, dtype=np.int64))
            draws = np.repeat(np.arange(len(phase.shares), dtype=np.int16), phase.shares)[places]
            # Sorted by stream, and within one in order, the nth of a stream was preceded by n of it.
            before = np.empty(BLOCK_DRAWS, np.int16)
            before[np.argsort(draws, kind="stable")] = np.concatenate([np.arange(share) for share in phase.shares])
            found = draws, before
            with self._lock:
                self._blocks[key] = found
                if len(self._blocks) > BLOCKS_KEPT:
                    del self._blocks[next(iter(self._blocks))]
        return found
