"""Many fetchers that fill an assembly at once, and what hypothesis draws for them."""

from __future__ import annotations

import collections
import itertools
import os
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flow.assembly_driver import LIMIT_SECONDS, ROW_NBYTES, Driver, make_request, stacks_of
from hypothesis import Phase, settings
from hypothesis import strategies as st
from self_certifying import make_chunk

from input_workers.contracts import FetchRequest
from input_workers.metrics.fetcher_recorder import FetcherRecorder

# What hangs takes long to be noticed, so examples are not made smaller.
with_threads = settings(max_examples=60, phases=[Phase.explicit, Phase.reuse, Phase.generate])


class Yielding:
    """Gives way to other threads before some of the copies."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self, key: Any, value: Any) -> None:
        for _ in range(self._random.choice((0, 0, 1, 3, 10))):
            os.sched_yield()


class Fetchers:
    """Threads that place what `work` says: for each, pairs of (rows, request or None).

    Attributes:
        fetched: rows that were given to the assembly; unplaced: those that it gave back.
        on_chunk: called before each chunk, with how many came before it in all.
    """

    def __init__(self, driver: Driver, work: Sequence[Sequence[tuple[int, FetchRequest | None]]], seed: int) -> None:
        self.driver = driver
        self.fetched: collections.Counter[int] = collections.Counter()
        self.unplaced: collections.Counter[int] = collections.Counter()
        self.errors: list[BaseException] = []
        self.on_chunk: Callable[[int], object] = lambda number: None
        self.at_request: dict[int, Callable[[FetchRequest], bool]] = {}  # by ordinal; True: no chunk for it
        self.largest = max((rows for chunks in work for rows, _ in chunks), default=0)
        self._numbers = itertools.count()
        self._left = len(work)
        self._lock = threading.Lock()
        self._seed = seed
        self.threads = [
            threading.Thread(target=self._run, args=(worker, chunks), name=f"fetcher-{worker}", daemon=True)
            for worker, chunks in enumerate(work)
        ]

    def _run(self, worker: int, chunks: Sequence[tuple[int, FetchRequest | None]]) -> None:
        try:
            self._place_all(worker, chunks)
        except BaseException as error:
            self.errors.append(error)
        finally:
            with self._lock:
                self._left -= 1
                is_last = not self._left
            if is_last:
                self.driver.assembly.close()

    def _place_all(self, worker: int, chunks: Sequence[tuple[int, FetchRequest | None]]) -> None:
        assembly, recorder = self.driver.assembly, FetcherRecorder(worker)
        owner = random.Random(self._seed + worker)
        for call, (rows, request) in enumerate(chunks):
            self.on_chunk(next(self._numbers))
            at_request = self.at_request.get(request.ordinal) if request is not None else None
            if at_request is not None and request is not None and at_request(request):
                continue
            # Of a Stream, a row is certified by its request, whoever fetches it.
            chunk = make_chunk(worker, call, rows, axes=self.driver.axes)
            if request is not None:
                chunk = make_chunk(request.ordinal, 0, rows, axes=self.driver.axes)
            self.fetched[worker] += rows
            nbytes = rows * ROW_NBYTES
            if request is None and nbytes < assembly.pack_below_nbytes and assembly.pack(chunk, rows):
                self._use_again(chunk, (False, False))
                continue
            ours = (owner.random() < 0.5, owner.random() < 0.5) if assembly.may_keep(rows, request) else None
            unplaced = assembly.place(chunk, rows, nbytes, request, ours, recorder)
            self._use_again(chunk, ours or (False, False))
            if unplaced is not None:
                self.unplaced[worker] += unplaced.rows
                if unplaced.error is not None:
                    raise unplaced.error
                return

    @staticmethod
    def _use_again(chunk: list[np.ndarray], ours: Sequence[bool]) -> None:
        """The fetch function goes on using the memory that it did not hand over."""
        for array, is_ours in zip(chunk, ours, strict=True):
            if not is_ours:
                array[...] = -9

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def join(self) -> None:
        for thread in self.threads:
            thread.join(LIMIT_SECONDS)
        if any(thread.is_alive() for thread in self.threads):
            stacks = stacks_of(self.threads)
            self.driver.assembly.abort()
            raise AssertionError(f"fetchers wait for ever:\n{stacks}")

    def run(self) -> int:
        """Run all to the end; return the rows that a last abort counts."""
        self.start()
        self.driver.run(self.threads)
        self.join()
        return self.driver.assembly.abort()

    def assert_ledger(self, aborted: int) -> None:
        """Every row was taken, aborted or given back."""
        fetched, unplaced = sum(self.fetched.values()), sum(self.unplaced.values())
        assert fetched == self.driver.rows_taken + aborted + unplaced, (fetched, self.driver.rows_taken, aborted, unplaced)


@st.composite
def settings_of_an_assembly(draw: st.DrawFn) -> dict[str, Any]:
    batch_size = draw(st.integers(1, 7))
    max_batches = draw(st.sampled_from([1, 2, 3, 4, 5]))
    axes = draw(st.sampled_from([(0, 0), (0, 0), (1, 0), (1, 1)]))
    return {
        "batch_size": batch_size,
        "max_batches": max_batches,
        "axes": axes,
        "max_nbytes": draw(st.sampled_from([None, 1, batch_size * ROW_NBYTES * max_batches, 2 * batch_size * ROW_NBYTES])),
        "chunk_alignment": draw(st.sampled_from([None, 1])),
        "pack_below_nbytes": draw(st.sampled_from([0, 3 * ROW_NBYTES])) if axes == (0, 0) else 0,
        "on_copy": Yielding(draw(st.integers(0, 99))),
    }


def lengths(batch_size: int) -> st.SearchStrategy[int]:
    """Return lengths of chunks around what could go wrong at the border of a batch."""
    return st.sampled_from([1, 1, 2, batch_size, batch_size, batch_size + 1, max(1, batch_size - 1), 3 * batch_size + 1])


def assert_bound(driver: Driver, more: int = 0) -> Callable[[], None]:
    """Return a check that what was reserved, or kept, never exceeds the bounds by more than `more` rows."""
    bound = max(driver.max_rows, driver.batch_size) + more

    def check() -> None:
        rows, _ = driver.assembly.charged
        assert rows <= bound, f"{rows} rows are held, of {bound}"

    return check


def deal(rows: Sequence[int], epochs: Sequence[int], workers: int, seed: int) -> list[list[tuple[int, FetchRequest | None]]]:
    """Deal requests of these lengths to workers, each its own in rising order, as fetchers take them."""
    dealer = random.Random(seed)
    work: list[list[tuple[int, FetchRequest | None]]] = [[] for _ in range(workers)]
    for ordinal, (count, epoch) in enumerate(zip(rows, epochs, strict=True)):
        dealer.choice(work).append((count, make_request(ordinal, count, epoch)))
    return work
