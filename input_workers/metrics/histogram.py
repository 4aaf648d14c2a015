"""Histograms of durations, with their sum; and the names of timed parts, of which there is a bounded number."""

from __future__ import annotations

import operator
import threading
from array import array
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np

__all__ = ["BUCKETS_SECONDS", "PART_SAMPLES_BEFORE_FOLDING", "SAMPLES_BEFORE_FOLDING", "Durations", "Histogram", "PartNames"]

# What a histogram has observed: the count of each bucket and their seconds, and samples that are in none of them yet.
Durations: TypeAlias = "tuple[tuple[int, ...], float, array[float]]"

# Upper bounds, in seconds: from a call that only slices an array to one that waits for a far disk.
BUCKETS_SECONDS = (
    0.0001,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)

_BOUNDS = np.array(BUCKETS_SECONDS)
NOTHING = (0,) * (len(BUCKETS_SECONDS) + 1)

SAMPLES_BEFORE_FOLDING = 1024
# Few, or every part would keep 32 KB for each fetcher.
PART_SAMPLES_BEFORE_FOLDING = 256

# Parts of a fetch function that are kept apart; what is named beyond them is one more.
MOST_PARTS = 32
OTHER_PARTS = "other"


class Histogram:
    """Durations in seconds. One thread adds, any thread reads.

    Adding is an append to `samples`; `fold` sorts what has gathered into buckets. `_folded` and the list that goes with it
    are replaced as one, so a reader sees no sample twice.
    """

    __slots__ = ("_folded", "samples")

    def __init__(self) -> None:
        self.samples = array("d")  # a reader copies it whole: a list of floats takes fifty times as long
        self._folded: tuple[tuple[int, ...], float, array[float]] = (NOTHING, 0.0, self.samples)

    def observe(self, seconds: float) -> None:
        """Add one duration. (The fetch loop does these lines itself.)"""
        self.samples.append(seconds)
        if len(self.samples) >= SAMPLES_BEFORE_FOLDING:
            self.fold()

    def fold(self) -> None:
        """Sort the samples into the buckets. The adding thread's."""
        counts, seconds = self.read()
        fresh = array("d")
        self._folded = (counts, seconds, fresh)
        self.samples = fresh

    def take(self) -> Durations:
        """Return what was observed since the last time, and forget it. The adding thread's."""
        taken = self._folded
        fresh = array("d")
        self._folded = (NOTHING, 0.0, fresh)
        self.samples = fresh
        return taken

    def add(self, durations: Durations) -> None:
        """Add what another one has observed. The adding thread's."""
        counts, seconds, samples = durations
        mine, total, own = self._folded
        own += samples
        if any(counts):
            self._folded = (tuple(a + b for a, b in zip(mine, counts, strict=True)), total + seconds, own)
        if len(own) >= PART_SAMPLES_BEFORE_FOLDING:
            self.fold()

    def read(self) -> tuple[tuple[int, ...], float]:
        """Return (count of each bucket, the last one above all bounds; sum of the seconds)."""
        counts, total, samples = self._folded
        if not samples:
            return counts, total
        seconds = np.frombuffer(samples.tobytes())
        fresh = np.bincount(_BOUNDS.searchsorted(seconds), minlength=len(counts)).tolist()
        return tuple(map(operator.add, counts, fresh)), total + float(seconds.sum())

    def seconds(self) -> float:
        """Return the sum alone, which is quicker."""
        _, total, samples = self._folded
        return total + float(np.frombuffer(samples.tobytes()).sum())

    def count(self) -> int:
        """Return how many durations there were, alone."""
        counts, _, samples = self._folded
        return sum(counts) + len(samples)

    @classmethod
    def merged(cls, histograms: Iterable[Histogram]) -> Histogram:
        """Return a histogram of all that these have observed so far."""
        merged = cls()
        counts, seconds, samples = merged._folded
        for histogram in histograms:
            more, more_seconds = histogram.read()
            counts = tuple(map(operator.add, counts, more))
            seconds += more_seconds
        merged._folded = (counts, seconds, samples)
        return merged


class PartNames:
    """The names of the parts of a source's fetch function. Thread-safe."""

    # Invariant under _lock: at most MOST_PARTS names, and none leaves.

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: set[str] = set()

    def take(self, name: str) -> str:
        """Return the name, or "other" if there are too many."""
        with self._lock:
            if name not in self._names:
                if len(self._names) >= MOST_PARTS:
                    return OTHER_PARTS
                self._names.add(name)
            return name
