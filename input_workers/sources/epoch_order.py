"""The order of an epoch: positions go in, the row numbers that stand there come out, computed a piece ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from input_workers.errors import ConfigError
from input_workers.sources.permutation import GOLDEN_64, MAX_SIZE, TABLE_SIZE, Permutation, mixed_64, tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FIRST_POSITIONS", "PIECE_POSITIONS", "WINDOW_BLOCKS", "EpochOrder"]

# Blocks whose rows are mixed with each other. A reader that keeps this many blocks open, or in memory, reads each once. Fewer
# leave more rows of one block in a batch (with 16, a batch of 64 has 4 of each); more cost open files and memory.
WINDOW_BLOCKS = 16
# Computed at a time by who reads on: an index takes 25 ns in pieces of 65,536, and 150 ns in pieces of 4,096.
PIECE_POSITIONS = 65_536
# Computed at a time where reading begins: answers in 0.5 ms instead of 2.
FIRST_POSITIONS = 4_096
# Pieces kept (512 KiB each): the one that is read, the next, and two for requests that come late or again.
KEPT_PIECES = 4
# What the key is extended by: one permutation of all blocks, one of the rows of each window.
BLOCKS, WINDOWS = 1, 2


class EpochOrder:
    """Row numbers of an epoch by position, each exactly once. Constant memory: 2 MiB, and 3 for each thread that computes.

    A function of its arguments alone, on every machine and with every version of NumPy. Thread-safe: any threads may ask for
    any positions, in any order and again. A thread waits only while another computes the very piece that it needs (2 ms).
    Make a new one after a fork, where another thread may have been computing.

    Where shuffled in blocks: blocks of `block_rows` rows that follow each other in the source are put in an order drawn by the
    key; then rows are put in an order drawn by the key within each WINDOW_BLOCKS blocks that follow each other in that order.

    Args:
        rows: of the epoch, 1 to 2**62.
        key: of the order; see Permutation.
        shuffle: False: rows come in the order of their numbers, whatever the key.
        block_rows: rows of a block; the last block of the source may be shorter. None: all rows are shuffled among all.

    Raises:
        ConfigError: a parameter is wrong.
    """

    # Invariant under _lock: at most KEPT_PIECES pieces, the oldest first. A piece is looked up without it; what was taken out
    # is still right for those who hold it.

    def __init__(self, rows: int, key: tuple[int, ...], shuffle: bool, block_rows: int | None = None) -> None:
        for name, value in (("rows", rows), ("block_rows", 1 if block_rows is None else block_rows)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= MAX_SIZE:
                raise ConfigError(f"EpochOrder: {name}: got {value!r}; wanted a whole number from 1 to 2**62")
        self._rows = int(rows)
        self._compute: Callable[[int, int], NDArray[np.int64]] | None = None
        if shuffle and block_rows is None:
            everywhere = Permutation(self._rows, key)
            self._compute = lambda begin, stop: everywhere(np.arange(begin, stop, dtype=np.int64))
        elif shuffle:
            self._compute = _BlockShuffle(self._rows, key, int(block_rows or 1)).rows
        self._lock = threading.Lock()
        self._pieces: dict[tuple[int, int], _Piece] = {}

    def __len__(self) -> int:
        return self._rows

    def rows(self, begin: int, stop: int) -> NDArray[np.int64]:
        """Return the row numbers at positions begin to stop - 1: read-only int64, mostly a view of the piece that holds them.

        Raises:
            IndexError: the positions are not all in the epoch.
        """
        if not 0 <= begin <= stop <= self._rows:
            raise IndexError(f"EpochOrder: got positions {begin} to {stop}; wanted 0 <= begin <= stop <= {self._rows}")
        compute = self._compute
        if compute is None or begin == stop:
            row_numbers = np.arange(begin, stop, dtype=np.int64)
        else:
            piece = self._piece(begin)
            if stop <= piece.stop:
                return piece.row_numbers(compute)[begin - piece.begin : stop - piece.begin]
            parts = [piece.row_numbers(compute)[begin - piece.begin :]]
            while (position := piece.stop) < stop:
                piece = self._piece(position)
                parts.append(piece.row_numbers(compute)[position - piece.begin : stop - piece.begin])
            row_numbers = np.concatenate(parts)
        row_numbers.flags.writeable = False
        return row_numbers

    def _piece(self, position: int) -> _Piece:
        """Return the piece that holds this position: a large one, or a small one where nothing just before it was asked for."""
        pieces = self._pieces
        large, small = (PIECE_POSITIONS, position // PIECE_POSITIONS), (FIRST_POSITIONS, position // FIRST_POSITIONS)
        found = pieces.get(large) or pieces.get(small)
        if found is not None:
            return found
        with self._lock:
            found = pieces.get(large) or pieces.get(small)
            if found is not None:
                return found
            before = small[1] * FIRST_POSITIONS - 1
            reads_on = (FIRST_POSITIONS, small[1] - 1) in pieces or (PIECE_POSITIONS, before // PIECE_POSITIONS) in pieces
            positions, index = key = large if reads_on else small
            begin = index * positions
            found = pieces[key] = _Piece(begin, min(begin + positions, self._rows))
            while len(pieces) > KEPT_PIECES:
                del pieces[next(iter(pieces))]
            return found


class _Piece:
    """Row numbers of neighbouring positions, computed by the first thread that needs them while the others wait."""

    # Invariant under _lock: one thread computes. Written once, so what is there may be read without it.

    __slots__ = ("_lock", "_row_numbers", "begin", "stop")

    def __init__(self, begin: int, stop: int) -> None:
        self.begin = begin
        self.stop = stop
        self._lock = threading.Lock()
        self._row_numbers: NDArray[np.int64] | None = None

    def row_numbers(self, compute: Callable[[int, int], NDArray[np.int64]]) -> NDArray[np.int64]:
        if self._row_numbers is not None:
            return self._row_numbers
        with self._lock:
            if self._row_numbers is None:
                computed = compute(self.begin, self.stop).copy()  # may be a view; of a writeable array, others could be made
                computed.flags.writeable = False
                self._row_numbers = computed
            return self._row_numbers


class _BlockShuffle:
    """Blocks in an order, and rows in an order within each window of blocks. Immutable."""

    def __init__(self, rows: int, key: tuple[int, ...], block_rows: int) -> None:
        self._rows = rows
        self._key = key
        self._block_rows = block_rows
        self._blocks = -(-rows // self._block_rows)
        self._window_rows = WINDOW_BLOCKS * self._block_rows
        self._missing = self._blocks * self._block_rows - rows  # by so much the last block of the source is shorter
        self._order = Permutation(self._blocks, (*key, BLOCKS))
        # Where in the order the short block comes: everything behind it stands `_missing` positions further ahead.
        self._short_place = int(self._order.inverse(np.array([self._blocks - 1]))[0])
        self._short_window = self._short_place // WINDOW_BLOCKS
        self._window_seed = np.random.SeedSequence((*key, WINDOWS)).generate_state(1, np.uint64)

    def rows(self, begin: int, stop: int) -> NDArray[np.int64]:
        """Return the row numbers at positions begin to stop - 1, where begin < stop: int64."""
        first, last = self._window_of(begin), self._window_of(stop - 1)
        if self._window_rows <= TABLE_SIZE:
            return self._whole_windows(first, last)[begin - self._begin_of(first) : stop - self._begin_of(first)]
        row_numbers = np.empty(stop - begin, np.int64)
        for window in range(first, last + 1):
            window_begin, window_stop = self._begin_of(window), self._begin_of(window + 1)
            low, high = max(begin, window_begin), min(stop, window_stop)
            within = Permutation(window_stop - window_begin, (*self._key, WINDOWS, window))
            offsets = within(np.arange(low - window_begin, high - window_begin, dtype=np.int64))
            if window == self._short_window:
                short_stop = (self._short_place % WINDOW_BLOCKS + 1) * self._block_rows - self._missing
                offsets += self._missing * (offsets >= short_stop)
            row_numbers[low - begin : high - begin] = self._row_numbers(offsets[None], window)[0]
        return row_numbers

    def _window_of(self, position: int) -> int:
        late = position >= self._begin_of(self._short_window + 1)
        return (position + (self._missing if late else 0)) // self._window_rows

    def _begin_of(self, window: int) -> int:
        return min(window * self._window_rows - (self._missing if window > self._short_window else 0), self._rows)

    def _whole_windows(self, first: int, last: int) -> NDArray[np.int64]:
        """Return the row numbers of windows first to last: computed as if all were full, then without what is not there."""
        windows = np.arange(first, last + 1, dtype=np.uint64)
        offsets = tables(self._window_rows, mixed_64(self._window_seed + windows * GOLDEN_64))
        row_numbers = self._row_numbers(offsets, first)
        return row_numbers[row_numbers < self._rows]

    def _row_numbers(self, offsets: NDArray[np.int64], first: int) -> NDArray[np.int64]:
        """Return the row numbers at these offsets of windows first, first + 1, ...: one window a line, as if all were full."""
        places = np.arange(first * WINDOW_BLOCKS, (first + len(offsets)) * WINDOW_BLOCKS, dtype=np.int64)
        there = places < self._blocks
        block_begins = np.full(len(places), self._rows, np.int64)  # of a block that is not there: no row is
        block_begins[there] = self._order(places[there]) * self._block_rows
        block = offsets // self._block_rows
        within = offsets - block * self._block_rows
        block += np.arange(0, len(places), WINDOW_BLOCKS, dtype=np.int64)[:, None]
        within += block_begins[block]
        return within
