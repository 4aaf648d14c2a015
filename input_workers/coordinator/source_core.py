"""Everything of a source but the handle that its user holds: settings, counters, and the run, if there is one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

from input_workers.checks import check_whole
from input_workers.contracts import ArraySpec, DeviceFeed, batch_type
from input_workers.coordinator.attribution import attribute
from input_workers.coordinator.fetch_side import SourceParts
from input_workers.coordinator.reporter import LoggerFeed, Ticker
from input_workers.coordinator.run import Run
from input_workers.coordinator.settings import DeviceSettings, SourceSettings
from input_workers.coordinator.tracing import Tracing
from input_workers.errors import ConfigError, LifecycleError, StateMismatch
from input_workers.fetchers.chunk_check import SpecBook
from input_workers.lifecycle import refuse_inside, released
from input_workers.metrics.device_recorder import DeviceRecorder
from input_workers.metrics.fetcher_recorder import FetcherRecorder, waited
from input_workers.metrics.histogram import BUCKETS_SECONDS, Histogram
from input_workers.metrics.recorder import SourceRecorder
from input_workers.metrics.snapshot import DeviceStats, HistogramStats, SourceStats, StuckThread
from input_workers.metrics.trace import Trace
from input_workers.policy import Quarantine
from input_workers.sources.mix import ENDLESS
from input_workers.sources.state import Position, position_of, state_of
from input_workers.sources.stream import Stream

__all__ = ["LAST_CALL_SECONDS", "SourceCore"]

# What a logger gets for its last call where stuck fetchers have used up the time of a stop.
LAST_CALL_SECONDS = 0.2


class SourceCore:
    """A source. Thread-safe; starting and stopping are the coordinator's, one at a time."""

    # Invariant under _lock: `run` is the one that was started last; `_unended` holds earlier and current runs whose
    # threads have not all ended.

    def __init__(self, settings: SourceSettings, new_worker_id: Callable[[], int]) -> None:
        self.settings = settings
        self.devices: dict[str, DeviceSettings] = {}
        self.worker_ids: list[int] = []
        self.device_recorders: dict[str, DeviceRecorder] = {}
        self.recorder = SourceRecorder(self.device_recorders)
        self.book = SpecBook(settings.name, settings.input_names, settings.batch_axes)
        if settings.specs is not None:
            self.book.learn(settings.specs)
        self.make_batch: Callable[[Sequence[Any]], Any] = batch_type(settings.name, settings.input_names)._make
        self.quarantine = Quarantine(settings.name, settings.on_error, self._tried)
        self._parts = SourceParts(
            settings, self.book, self.recorder, self.quarantine, self.make_batch, self.worker_ids, new_worker_id
        )
        self.initialised = False
        self.run: Run | None = None
        self._lock = threading.RLock()
        self._unended: list[Run] = []
        self._built: Run | None = None  # the run that is being started, and the one before it
        self._before: Run | None = None
        self._feeds: dict[str, tuple[DeviceSettings, DeviceFeed]] = {}  # made for the next run
        self._loaded: Position | None = None  # where the next run begins
        self._tickers: list[Ticker] = []  # those of external loggers; changed by starting and stopping only
        self.tracing: Tracing | None = None  # set while it goes on, by itself

    def device_name(self, name_scope: str) -> str:
        """Return "gpu_0/train", or "train" without a scope."""
        return f"{name_scope}/{self.settings.name}" if name_scope else self.settings.name

    def add_device(self, device: DeviceSettings, worker_ids: Sequence[int]) -> None:
        """Add a device, whose name is not taken, and its workers. Raises LifecycleError while the source runs."""
        name = self.device_name(device.name_scope)
        with self._lock:
            if self.is_running:
                raise LifecycleError(f"source {self.settings.name!r} is running; add devices before it is started")
            self.device_recorders[name] = DeviceRecorder()
            self.devices[name] = device
            self.worker_ids += worker_ids

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped; it may have ended by itself."""
        return self.run is not None and not self.run.signal.stopping

    def make_feeds(self) -> None:
        """Make the feeds of the next run: frameworks are imported here. Raises ConfigError: one cannot be made."""
        self.quarantine.open()
        self._feeds = {name: (device, device.make_feed()) for name, device in self.devices.items()}

    def build(self) -> None:
        """Make the next run, after the init functions, which may have loaded a state or reset a device."""
        feeds, self._feeds = self._feeds, {}
        for name, device in self.devices.items():
            made = feeds.get(name)
            feeds[name] = made if made is not None and made[0] is device else (device, device.make_feed())
        # As many workers as were enough in the last run; the others may have begun data that they have not finished.
        workers = len(self.worker_ids) if self.run is None else self.run.workers
        with self._lock:
            run = Run(self._parts, feeds, workers, self._loaded or Position())
            self._unended.append(run)
            # Known before its threads run: they may call stop().
            self._before, self._built, self.run = self.run, run, run

    def start(self) -> None:
        """Start what was built."""
        assert self.run is not None  # noqa: S101  built just before
        name = f"logger-{self.settings.name}"
        # Made first: what they tell begins with the run.
        tickers = [Ticker(name, LoggerFeed(self, logger).tick) for logger in self.settings.external_loggers]
        self.run.start()
        for ticker in tickers:
            self._tickers.append(ticker)  # known before it runs: Ctrl-C while it starts ends it again
            ticker.start()

    def started(self) -> None:
        """Every source has started: what was loaded has been used."""
        self._loaded = self._before = self._built = None

    def not_started(self) -> None:
        """No source has started, because one could not be: the last run is the one before."""
        if self._built is not None:
            self.run, self._built, self._before = self._before, None, None

    def request_stop(self) -> None:
        """Ask every thread to end. Takes no lock: a finalizer calls it."""
        if self.run is not None:
            self.run.request_stop()
        for ticker in self._tickers:
            ticker.request_stop()

    def abort(self) -> None:
        """First phase of a stop: flag and wake everybody."""
        for run in self._runs():
            run.abort()

    def locks(self) -> list[Any]:
        """Return the re-entrant locks of its runs, of the one that has ended too; see `Run.locks`."""
        runs = [*self._runs(), *([] if self.run is None else [self.run])]
        return [lock for run in runs for lock in run.locks()]

    def join(self, deadline: float) -> tuple[tuple[StuckThread, ...], tuple[str, ...]]:
        """Second phase: wait until the deadline; return (what is stuck, what went wrong)."""
        with released(self.locks()):
            return self._join(deadline)

    def _join(self, deadline: float) -> tuple[tuple[StuckThread, ...], tuple[str, ...]]:
        stuck: tuple[StuckThread, ...] = ()
        wrong: tuple[str, ...] = ()
        if self.run is not None and self.run.forked:  # the threads, and what they still count, are the parent's
            return (), ()
        for run in self._runs():
            more_stuck, more_wrong = run.stop(deadline)
            stuck += more_stuck
            wrong += more_wrong
            if not more_stuck:
                with self._lock:
                    if run in self._unended:
                        self._unended.remove(run)
        with self._lock:
            stands_still = not self._unended
        if stands_still:
            ledger = self.recorder.check(0)
            if ledger is not None:
                wrong += (f"source {self.settings.name!r}: {ledger}",)
            self.recorder.retire()
        for ticker in self._tickers:  # only now do their last numbers stand
            ticker.request_stop()
        deadline = max(deadline, time.monotonic() + LAST_CALL_SECONDS)
        hanging = [(ticker, ticker.join(deadline)) for ticker in self._tickers]
        self._tickers = [ticker for ticker, alive in hanging if alive]
        stuck += tuple(StuckThread(*each) for _, alive in hanging for each in alive)
        tracing = self.tracing
        if tracing is not None and tracing.is_over:
            stuck += tuple(StuckThread(*each) for each in tracing.stop(deadline))
        return stuck, wrong

    def has_thread(self, thread: threading.Thread) -> bool:
        """Whether a stop waits for this thread."""
        return any(run.has_thread(thread) for run in self._runs())

    def _runs(self) -> list[Run]:
        with self._lock:
            return list(self._unended)

    def started_run(self) -> Run:
        """Return the last run. Raises LifecycleError before the first start."""
        if self.run is None:
            raise LifecycleError(f"source {self.settings.name!r} was not started; call start() first")
        return self.run

    def specs(self, timeout_s: float | None) -> tuple[ArraySpec, ...]:
        """Return what a row looks like; see `DataInputCoordinator.specs`."""
        if self.book.specs is not None:
            return self.book.specs
        return self.started_run().await_specs(self.settings.timeout_s if timeout_s is None else timeout_s)

    @property
    def stream(self) -> Stream | None:
        """What the source reads, if it is a Stream."""
        return self.settings.fetch_fun if isinstance(self.settings.fetch_fun, Stream) else None

    @property
    def batches_of_epoch(self) -> int | None:
        """How many batches an epoch has, where that is known."""
        if self.stream is None or len(self.devices) != 1 or not self.settings.rebatch:
            return None
        (device,) = self.devices.values()
        rows = self.stream.plan(self.settings.last_batch, self.settings.batch_axes).epoch_rows(0)
        if rows >= ENDLESS:
            return None
        return rows // device.batch_size if self.settings.last_batch == "drop" else -(-rows // device.batch_size)

    def state(self, delivered: int | None) -> dict[str, Any]:
        """Return the position as plain data; see `DataInputCoordinator.state_dict`."""
        settings, run = self.settings, self.run
        stream = self._stream_or_raise()
        for device in run.devices.values() if run is not None else ():
            refuse_inside(device.queue.lock)
        if delivered is not None:
            check_whole("state_dict: delivered", delivered, 0)
        batch_size = max(device.batch_size for device in self.devices.values())
        position = self._loaded
        if position is None and run is not None:
            position = run.fetching.position(delivered)
        elif delivered:
            raise ConfigError(
                f"source {settings.name!r}: state_dict(delivered={delivered}): the run that begins here has not been started"
            )
        if position is None:
            position = Position(rows_per_request=stream.rows_per_request or batch_size)
        return state_of(settings.name, settings.input_names, stream, settings.last_batch, position)

    def check_state(self, state: Any) -> Position:
        """Return the position that a state says. Raises StateMismatch, or LifecycleError while the source runs."""
        settings = self.settings
        if self.is_running:
            raise LifecycleError(f"source {settings.name!r} is running; load a state before start(), or after stop()")
        return position_of(state, settings.name, settings.input_names, self._stream_or_raise(), settings.last_batch)

    def load(self, position: Position) -> None:
        """Begin the next run there."""
        self._loaded = position

    def _stream_or_raise(self) -> Stream:
        stream = self.stream
        if stream is None:
            raise StateMismatch(
                f"source {self.settings.name!r}: a plain function has no position; wanted a Stream as fetch_fun"
            )
        return stream

    def _tried(self) -> tuple[int, int]:
        """Return (rows tried, or calls of a plain function; calls made)."""
        total = FetcherRecorder.merged(self.recorder.fetchers())
        calls = sum(total.calls.read()[0]) + sum(total.errors.values())
        return (total.rows if self.stream is not None else calls), calls

    def stats(self) -> SourceStats:
        """Return the numbers of this moment."""
        now = time.monotonic()
        run = self.run
        dropped, delivered, fetched = self.recorder.rows()
        fetchers = self.recorder.fetchers()
        total = FetcherRecorder.merged(fetchers)
        calls = _histogram(total.calls)
        queue_depth, queue_bytes = self._queued()
        devices = {name: self._device_stats(name, now) for name in self.devices}
        wait = sum(device.wait_seconds for device in devices.values())
        enqueuer_busy = sum(device.send.seconds for device in devices.values())
        parts = {name: _histogram(part) for name, part in sorted(total.parts.items())}
        slowest = max(parts, key=lambda name: parts[name].seconds, default="")
        state = run.state if run is not None else "starting"
        workers = len(self.worker_ids) if run is None else run.workers
        cores, auto = (run.cores, run.auto) if run is not None else (1.0, None)
        read = self.recorder.read(now)
        targets = [device.target for device in run.devices.values()] if run is not None else []
        keeps_chunks = all(target.chunk_alignment is not None for target in targets)
        windows, latest = attribute(self.settings, workers, cores, auto, self.recorder, state, slowest, keeps_chunks, read)
        alive = sum(recorder.alive for recorder in fetchers) if run is not None else 0
        return SourceStats(
            rows_fetched=fetched,
            rows_delivered=delivered,
            rows_in_flight=fetched - delivered - sum(dropped.values()),
            rows_dropped=MappingProxyType(dropped),
            rows_padded=sum(device.rows_padded for device in devices.values()),
            batches_delivered=sum(device.batches_delivered for device in devices.values()),
            inputs_per_second=sum(device.inputs_per_second for device in devices.values()),
            queue_depth=queue_depth,
            queue_bytes=queue_bytes,
            block_bytes=run.block_bytes if run is not None else 0,
            device_queue_depth=sum(device.queue_depth for device in devices.values()),
            fetch_errors=MappingProxyType(total.errors),
            quarantine=self.quarantine.latest,
            fetchers_alive=alive,
            fetcher_restarts=self.recorder.restarts,
            fetcher_busy_seconds=calls.seconds + total.failed[1] + total.copying,
            fetcher_copying_seconds=total.copying,
            fetcher_blocked_seconds=sum(waited(recorder.blocked, now) for recorder in fetchers),
            enqueuer_busy_seconds=enqueuer_busy,
            enqueuer_blocked_seconds=waited(self.recorder.enqueuer_blocked, now),
            consumer_wait_seconds=wait,
            batches_not_ready=sum(recorder.batches_not_ready for recorder in self.device_recorders.values()),
            verdict=latest.verdict,
            devices=MappingProxyType(devices),
            fetch=calls,
            verdict_text=latest.verdict_text,
            windows=windows,
            fetch_parts=MappingProxyType(parts),
            workers=MappingProxyType(self.recorder.workers(now)),
            history=self.recorder.marks.history(read) if run is not None else (),
        )

    def _queued(self) -> tuple[float, int]:
        """Return (batches' worth, bytes) of rows that are in batches, or wait for their turn, and were not sent yet."""
        weight, nbytes = self.run.assembly.charged if self.run is not None else (0, 0)
        return weight / (max(device.batch_size for device in self.devices.values()) if self.settings.rebatch else 1), nbytes

    def note_depths(self, trace: Trace, now: float) -> None:
        """Note in a trace how many batches wait in each queue."""
        trace.add_depth(now, f"assembly of {self.settings.name}", self._queued()[0])
        for name, device in self.run.devices.items() if self.run is not None else ():
            trace.add_depth(now, f"device queue of {name}", len(device.queue))

    def _device_stats(self, name: str, now: float) -> DeviceStats:
        recorder = self.device_recorders[name]
        run = self.run
        return DeviceStats(
            rows_delivered=recorder.rows_delivered,
            batches_delivered=recorder.batches_delivered,
            rows_padded=recorder.rows_padded,
            queue_depth=len(run.devices[name].queue) if run is not None else 0,
            inputs_per_second=recorder.rows_per_second(now),
            wait_seconds=recorder.waited_seconds(now),
            send=_histogram(recorder.send),
        )


def _histogram(histogram: Histogram) -> HistogramStats:
    counts, seconds = histogram.read()
    return HistogramStats(BUCKETS_SECONDS, counts, seconds)
