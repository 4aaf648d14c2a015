"""Spans of what an input source's threads do while a trace runs, by track. Bounded."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from input_workers.metrics.fetcher_recorder import FetcherRecorder

__all__ = ["MOST_EVENTS", "FetcherTrack", "Room", "SourceTrace", "Span", "Trace", "Track"]

# A trace ends when it has so many: some 30 MB, as much again to write it, and 20 MB of file.
MOST_EVENTS = 200_000

# What it was, when it began and ended (`time.monotonic()`), and a word more, or None.
Span: TypeAlias = tuple[str, float, float, Any]


class Room:
    """Says whether one more event may be recorded, on whichever track. Thread-safe.

    Attributes:
        used_up_at: `time.monotonic()` when none was left, or `inf`.
    """

    __slots__ = ("_taken", "used_up_at")

    def __init__(self) -> None:
        self._taken = itertools.count()
        self.used_up_at = math.inf

    def take(self) -> bool:
        """Take the room of one event; False: there is none."""
        if next(self._taken) < MOST_EVENTS:
            return True
        self.used_up_at = min(self.used_up_at, time.monotonic())
        return False


class Track:
    """A row of the trace: what one thread did, in one of its roles. One thread adds.

    Attributes:
        name: of the row.
        process: whose it is, as (process id, name); None: this one.
        call, failed_call: what those of the fetch function are called here.
        spans: what has been added; of spans inside each other the inner ones come first.
        now: what a trainer does, and since when; None: nobody knows.
    """

    __slots__ = ("_room", "call", "failed_call", "name", "now", "process", "spans")

    def __init__(self, name: str, room: Room, process: tuple[int, str] | None = None) -> None:
        self.name = name
        self.process = process
        self.call, self.failed_call = "call", "failed call"
        self.spans: list[Span] = []
        self.now: tuple[str, float, str] | None = None
        self._room = room

    def add(self, name: str, started: float, ended: float, detail: Any = None) -> None:
        """Add a span."""
        if self._room.take():
            self.spans.append((name, started, ended, detail))

    @contextmanager
    def next_batch(self, device: str) -> Iterator[None]:
        """A trainer gets a batch, and works with it until it comes again."""
        asked = time.monotonic()
        if self.now is not None:
            self.add("training", self.now[1], asked)
        self.now = "next_batch", asked, device
        try:
            yield
        finally:
            given = time.monotonic()
            self.now = "training", given, device
            self.add("next_batch", asked, given, device)


class FetcherTrack(Track):
    """The track of a fetcher, and of the worker processes that it serves.

    Attributes:
        trace: the whole.
    """

    __slots__ = ("_source", "_worker", "_worker_id", "trace")

    def __init__(self, trace: Trace, source: str, worker_id: int, in_process: bool) -> None:
        super().__init__(f"fetcher-{source}-{worker_id}", trace.room)
        if in_process:  # which makes the calls, while its thread here waits
            self.call = self.failed_call = "waiting for the worker"
        self.trace = trace
        self._source = source
        self._worker_id = worker_id
        self._worker: Track | None = None

    def add_from(self, pid: int, spans: Iterable[Span]) -> None:
        """Add what a worker process has told."""
        worker = self._worker
        if worker is None or worker.process is None or worker.process[0] != pid:
            process = pid, f"worker {self._worker_id} of {self._source}"
            worker = self._worker = Track("fetch function", self._room, process)
            self.trace.workers.append(worker)
        for span in spans:
            worker.add(*span)


class Trace:
    """What is recorded, of one source or several. Thread-safe.

    Attributes:
        path: of the file that is to be.
        began, until: `time.monotonic()`.
        sources: what is recorded of each.
        trainers: the tracks of threads that took batches, by thread.
        workers: the tracks of worker processes.
        depths: of queues, as (when, of which, how many batches).
    """

    def __init__(self, path: str, seconds: float) -> None:
        self.path = path
        self.seconds = seconds
        self.began = time.monotonic()
        self.until = self.began + seconds
        self.room = Room()
        self.sources: list[SourceTrace] = []
        self.trainers: dict[int, Track] = {}
        self.workers: list[Track] = []
        self.depths: list[tuple[float, str, float]] = []

    def add_depth(self, now: float, queue: str, batches: float) -> None:
        """Add how many batches wait in a queue. The tracing thread's."""
        if self.room.take():
            self.depths.append((now, queue, batches))

    def trainer(self, thread: int | None = None) -> Track:
        """Return the track of a trainer's thread: of the calling one."""
        thread = threading.get_ident() if thread is None else thread
        track = self.trainers.get(thread)
        if track is None:
            name = next((each.name for each in threading.enumerate() if each.ident == thread), str(thread))
            track = self.trainers.setdefault(thread, Track(f"trainer {name}", self.room))
        return track


class SourceTrace:
    """What is recorded of one source. Thread-safe.

    Attributes:
        whole: with the other sources.
        source: its name.
        enqueuer: the track of its enqueuer.
        fetchers: its fetchers, with their tracks.
    """

    def __init__(self, whole: Trace, source: str, in_processes: bool) -> None:
        self.whole = whole
        self.enqueuer = Track(f"enqueuer-{source}", whole.room)
        self.fetchers: list[tuple[FetcherRecorder, FetcherTrack]] = []
        self.source = source
        self._in_processes = in_processes

    def fetcher(self, recorder: FetcherRecorder) -> FetcherTrack:
        """Return the track of a fetcher."""
        track = FetcherTrack(self.whole, self.source, recorder.worker_id, self._in_processes)
        self.fetchers.append((recorder, track))
        return track
