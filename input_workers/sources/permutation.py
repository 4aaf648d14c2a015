"""A shuffle that is computed where it is looked at: positions go in, the numbers that stand there come out, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.random  # NumPy would load it at first use, which would be that of the first request

from input_workers.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["GOLDEN_64", "MAX_SIZE", "TABLE_SIZE", "Permutation", "mixed_64", "tables"]

# Halves of at most 31 bits, so that rounds are 32-bit arithmetic, which takes half the time of 64-bit.
MAX_SIZE = 2**62
# Up to this size a permutation is a table (32 KiB): exactly uniform, where a network of few bits is not. Also the largest
# number of rows that are computed in vain when one is looked at in parts.
TABLE_SIZE = 4096
# Of the network. Below 2**14, up to 4 rounds show in chi-squared tests of pairs of numbers, 5 do not; the others are margin,
# at 1 ns a number each.
ROUNDS = 8
# Numbers that go through all rounds before the next do: 4 arrays of 64 KiB stay in the cache. With 4,096 a number took twice
# as long, with 65,536 between 0.8 and 2 times.
TILE = 16_384
# Odd constants with an irregular half of ones: the golden ratio, and Steele's (SplitMix64) and Wellons' (lowbias32) mixers.
GOLDEN_64 = np.uint64(0x9E3779B97F4A7C15)
SPLITMIX_A, SPLITMIX_B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
LOWBIAS = np.uint32(0x846CA68B)
LOWBIAS_SHIFT = np.uint32(15)


class Permutation:
    """A bijection of range(size), drawn by a key: constant memory whatever the size. Immutable, so thread- and fork-safe.

    Large sizes: an alternating Feistel network over the 2**ceil(log2(size)) numbers that hold the size (Luby and Rackoff 1988;
    the halves may differ by a bit), applied again to what falls outside of range(size) until it falls inside ("cycle
    walking", Black and Rogaway 2002): less than twice on average. Small sizes: a table, sorted by hashes.
    The same size and key give the same bijection on every machine and with every version of NumPy: saved positions rely on it.

    Args:
        size: 1 to 2**62.
        key: numbers of at least 0, of any size. As in any SeedSequence, zeros at the end of a short key do not count.

    Raises:
        ConfigError: a parameter is wrong.
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or not 1 <= size <= MAX_SIZE:
            raise ConfigError(f"Permutation: size: got {size!r}; wanted a whole number from 1 to 2**62")
        try:
            seeds = np.random.SeedSequence(key)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"Permutation: key: got {key!r}; wanted whole numbers of at least 0") from error
        self.size = int(size)
        self._table: NDArray[np.int64] | None = None
        self._keys: list[tuple[np.uint32, np.uint32]] = []
        if size <= TABLE_SIZE:
            self._table = tables(self.size, seeds.generate_state(1, np.uint64).astype(np.uint64))[0]
        else:
            drawn = seeds.generate_state(2 * ROUNDS, np.uint32)
            self._keys = list(zip(drawn[:ROUNDS] | np.uint32(1), drawn[ROUNDS:], strict=True))
        bits = (self.size - 1).bit_length()
        self._low_bits = bits - bits // 2
        self._high_bits = bits // 2

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers at these positions: int64, of the same shape. Raises IndexError outside of range(size)."""
        self._check(positions)
        return self._walk(positions, False) if self._table is None else self._table[positions]

    def inverse(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions of these numbers: int64, of the same shape. Raises IndexError outside of range(size)."""
        self._check(numbers)
        return self._walk(numbers, True) if self._table is None else np.argsort(self._table)[numbers]

    def _check(self, numbers: NDArray[np.int64]) -> None:
        if numbers.dtype != np.int64:
            raise TypeError(f"Permutation: got numbers of dtype {numbers.dtype}; wanted int64")
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < self.size:
            raise IndexError(f"Permutation: got numbers {numbers.min()} to {numbers.max()}; wanted them in range({self.size})")

    def _walk(self, numbers: NDArray[np.int64], backwards: bool) -> NDArray[np.int64]:
        """Apply the network until every result is in range(size). It ends: a cycle comes back to where it began."""
        walked = self._network(numbers.reshape(-1), backwards)
        outside = np.flatnonzero(walked >= self.size)
        while outside.size:
            again = self._network(walked[outside], backwards)
            walked[outside] = again
            outside = outside[again >= self.size]
        return walked.reshape(numbers.shape)

    def _network(self, numbers: NDArray[np.int64], backwards: bool) -> NDArray[np.int64]:
        """Apply the network once: to one axis of numbers below 2**bits, whose halves go through the rounds tile by tile."""
        through = np.empty(numbers.shape, np.int64)
        for begin in range(0, numbers.size, TILE):
            tile = numbers[begin : begin + TILE]
            low = (tile & ((1 << self._low_bits) - 1)).astype(np.uint32)
            high = (tile >> self._low_bits).astype(np.uint32)
            self._rounds(low, high, backwards)
            joined = through[begin : begin + TILE]
            np.left_shift(high, self._low_bits, out=joined, dtype=np.int64)
            joined |= low
        return through

    def _rounds(self, low: NDArray[np.uint32], high: NDArray[np.uint32], backwards: bool) -> None:
        """Change the halves in place: in even rounds the high one by the low one, in odd rounds the low one by the high one."""
        mixed, shifted = np.empty_like(low), np.empty_like(low)
        for index in reversed(range(ROUNDS)) if backwards else range(ROUNDS):
            factor, term = self._keys[index]
            read, changed, bits = (high, low, self._low_bits) if index % 2 else (low, high, self._high_bits)
            np.multiply(read, factor, out=mixed)
            np.add(mixed, term, out=mixed)
            np.right_shift(mixed, LOWBIAS_SHIFT, out=shifted)
            np.bitwise_xor(mixed, shifted, out=mixed)
            np.multiply(mixed, LOWBIAS, out=mixed)
            np.right_shift(mixed, np.uint32(32 - bits), out=mixed)  # the highest bits of a product depend on all others
            np.bitwise_xor(changed, mixed, out=changed)


def tables(size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return one permutation of range(size) for each key, int64 of shape (keys, size). `size` is at most TABLE_SIZE.

    The numbers are sorted by a hash of key and number, the number itself in its lowest bits: no two are equal, so every sort
    gives the same order. 52 bits of hash at least: two of 4,096 are equal, and then in their own order, once in 500 million.
    """
    numbers = np.arange(size, dtype=np.uint64)
    hashed = mixed_64(keys[:, None] + numbers * GOLDEN_64)
    low = np.uint64((1 << (size - 1).bit_length()) - 1)
    hashed &= ~low
    hashed |= numbers
    hashed.sort(axis=1)
    hashed &= low
    return hashed.view(np.int64)


def mixed_64(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the numbers mixed by SplitMix64's bijection (Steele, Lea and Flood 2014). They are changed in place."""
    for shift, factor in ((30, SPLITMIX_A), (27, SPLITMIX_B)):
        numbers ^= numbers >> np.uint64(shift)
        numbers *= factor
    numbers ^= numbers >> np.uint64(31)
    return numbers
