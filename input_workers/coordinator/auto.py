"""num_workers="auto": a thread that looks at a source's counters twice a second, and adds or releases fetchers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from input_workers.coordinator.fetch_side import SourceParts
from input_workers.cores import usable_cores
from input_workers.errors import Failure, SourceFailed, describe
from input_workers.fetchers.fetcher import Fetcher
from input_workers.fetchers.threads import ThreadFetchers
from input_workers.lifecycle import StopSignal
from input_workers.metrics.fetcher_recorder import FetcherRecorder
from input_workers.metrics.verdict import Setting
from input_workers.metrics.windows import Counters
from input_workers.metrics.worker_count import DECISION_SECONDS, WorkerCount

__all__ = ["AutoWorkers"]

log = logging.getLogger("input_workers")


class AutoWorkers:
    """Adds and releases the fetchers of a run.

    Args:
        parts: of the source; the ids of new workers are appended to them.
        workers: how many fetchers are at work at first.
        backend: has them.
        signal: says that the run ends.
        resized: told the number when it has changed.
        on_end: called in the thread when it ends.

    Attributes:
        workers: how many there should be.
        changed: the counters when that was last changed, or None.
        thread: to be started, and joined before the backend is.
    """

    def __init__(
        self,
        parts: SourceParts,
        workers: int,
        backend: ThreadFetchers,
        signal: StopSignal,
        resized: Callable[[int], object],
        on_end: Callable[[], object],
    ) -> None:
        self.workers = workers
        self.changed: Counters | None = None
        settings = self._settings = parts.settings
        self.thread = threading.Thread(target=self._run, name=f"auto-{settings.name}", daemon=True)
        self._parts = parts
        self._backend = backend
        self._recorder = parts.recorder
        self._book = parts.book
        self._resized = resized
        self._signal = signal
        self._on_end = on_end
        self._count = WorkerCount(settings.fetchers.min_workers)
        self._added: list[tuple[Fetcher, int]] = []  # the last ones, and the rows that each had fetched then
        self._refused: tuple[int, str] | None = None  # more than this many could not be started, or may not be: why

    @property
    def held_by(self) -> str:
        """What keeps it from more while the trainer waits: a key of `verdict.HELD`; "": nothing."""
        return self._count.held_by

    def _run(self) -> None:
        try:
            while not self._signal.ended.wait(DECISION_SECONDS):
                self.step(time.monotonic())
        except BaseException as error:
            name = self._settings.name
            self._signal.fail(Failure(SourceFailed, f"source {name!r}: num_workers='auto' broke: {describe(error)}", error))
        finally:
            self._on_end()

    def step(self, now: float) -> None:
        """Look, and change the number if that is due."""
        there = self._backend.at_work()
        leaving = sum(each.released for each in there)
        staying = len(there) - leaving
        if not staying:  # the data end, or the last one is about to be at work again
            return
        reading = self._recorder.read(now)
        setting = Setting(
            fetchers=self._settings.fetchers.kind,
            workers=staying,
            devices=len(self._recorder.devices),
            cores=usable_cores(),
            held_by="",
        )
        ready = all(fetcher.recorder.rows > rows for fetcher, rows in self._added)
        most, by = self._most(reading)
        wanted = self._count.next(reading, staying, ready, most, by, setting)
        if wanted < staying:
            self._backend.release(staying - wanted)
            self._changed(wanted, [], reading)
        elif wanted > staying:
            self._grow(staying, min(wanted, most - leaving))
            added = [(each, each.recorder.rows) for each in self._backend.at_work() if each not in there]
            if added:
                self._changed(staying + len(added), added, reading)

    def _most(self, reading: Counters) -> tuple[int, str]:
        """Return how many there may be, and what for: a key of `verdict.HELD`."""
        settings = self._settings
        bounds = [(settings.fetchers.max_workers, "max_workers")]
        if self._refused is not None:
            bounds.append(self._refused)
        specs = self._book.specs
        is_known = specs is not None and all(spec.is_fixed for spec in specs)
        if settings.max_buffered_bytes is not None and specs is not None and is_known and reading.calls:
            # Each holds a chunk, and one is being copied: all of them may come to wait. (How large those of any shape are,
            # nobody counts.)
            chunk = sum(spec.row_nbytes for spec in specs) * reading.rows_fetched / reading.calls
            if chunk:
                bounds.append((max(settings.fetchers.min_workers, int(settings.max_buffered_bytes / chunk) - 1), "bytes"))
        return min(bounds)

    def _grow(self, workers: int, wanted: int) -> None:
        try:
            while workers < wanted and not self._signal.ended.is_set():
                if not self._backend.add(self._new):
                    self._refused = workers, "end"
                    break
                workers += 1
        except (OSError, RuntimeError) as error:
            self._refused = workers, "start"
            log.warning("source %r: more than %d workers cannot be started: %s", self._settings.name, workers, describe(error))

    def _new(self) -> FetcherRecorder:
        worker_id = self._parts.new_worker_id()
        self._parts.worker_ids.append(worker_id)
        return self._recorder.fetcher(worker_id)

    def _changed(self, workers: int, added: list[tuple[Fetcher, int]], reading: Counters) -> None:
        self.workers = workers
        self.changed = reading
        self._added = added
        self._resized(workers)
