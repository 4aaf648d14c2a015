"""num_workers="auto": a thread that looks at a source's counters twice a second, and has its fetchers become more or fewer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from input_workers.contracts import FetcherBackend
from input_workers.coordinator.settings import SourceSettings
from input_workers.cores import usable_cores
from input_workers.errors import Failure, SourceFailed, describe
from input_workers.fetchers import Processes
from input_workers.fetchers.chunk_check import SpecBook
from input_workers.lifecycle import StopSignal
from input_workers.metrics.fetcher_recorder import FetcherRecorder
from input_workers.metrics.recorder import SourceRecorder
from input_workers.metrics.verdict import Setting
from input_workers.metrics.windows import Counters
from input_workers.metrics.worker_count import DECISION_SECONDS, WorkerCount

__all__ = ["AutoWorkers"]

log = logging.getLogger("input_workers")


class AutoWorkers:
    """Adds and releases the fetchers of a run.

    Args:
        settings: of the source.
        workers: how many fetchers are at work at first.
        backend: has them.
        recorder: of the source.
        book: its specs.
        worker_ids: of the source's fetchers; those of new ones are appended.
        new_worker_id: returns an id that nobody has.
        resized: told the number when it has changed.
        signal: says that the run ends.
        on_end: called in the thread when it ends.

    Attributes:
        workers: how many there should be.
        changed: the counters when that was last changed, or None.
        thread: to be started, and joined before the backend is.
    """

    def __init__(
        self,
        settings: SourceSettings,
        workers: int,
        backend: FetcherBackend,
        recorder: SourceRecorder,
        book: SpecBook,
        worker_ids: list[int],
        new_worker_id: Callable[[], int],
        resized: Callable[[int], object],
        signal: StopSignal,
        on_end: Callable[[], object],
    ) -> None:
        self.workers = workers
        self.changed: Counters | None = None
        self.thread = threading.Thread(target=self._run, name=f"auto-{settings.name}", daemon=True)
        self._settings = settings
        self._backend = backend
        self._recorder = recorder
        self._book = book
        self._worker_ids = worker_ids
        self._new_worker_id = new_worker_id
        self._resized = resized
        self._signal = signal
        self._on_end = on_end
        self._count = WorkerCount(settings.fetchers.min_workers)
        self._added: list[tuple[FetcherRecorder, int]] = []  # the last ones, and the rows that each had fetched then
        self._refused: tuple[int, str] | None = None  # more than so many could not be started, or may not be: why
        self._is_process = isinstance(settings.fetchers, Processes)

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
            fetchers="process" if self._is_process else "thread",
            workers=staying,
            devices=len(self._recorder.devices),
            cores=usable_cores(),
            held_by="",
        )
        ready = all(fetcher.rows > rows for fetcher, rows in self._added)
        most, by = self._most(reading)
        wanted = self._count.next(reading, staying, ready, most, by, setting)
        if wanted < staying:
            self._backend.release(staying - wanted)
            self._changed(wanted, [], reading)
        elif wanted > staying:
            self._grow(staying, min(wanted, most - leaving))
            added = [(each, each.rows) for each in self._backend.at_work() if each not in there]
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
        worker_id = self._new_worker_id()
        self._worker_ids.append(worker_id)
        return self._recorder.fetcher(worker_id)

    def _changed(self, workers: int, added: list[tuple[FetcherRecorder, int]], reading: Counters) -> None:
        self.workers = workers
        self.changed = reading
        self._added = added
        self._resized(workers)
