"""The half of a run in which the fetchers work: what they call, where their chunks go, and what becomes of failures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from input_workers.contracts import FetcherBackend, FetchRequest
from input_workers.coordinator.settings import SourceSettings
from input_workers.errors import ConfigError, Failure, describe
from input_workers.fetchers import Processes, Threads
from input_workers.fetchers.chunk_check import ChunkCheck, SpecBook
from input_workers.fetchers.fetch_loop import FunctionCalls, again, fetch_loop
from input_workers.fetchers.processes import ProcessFetchers, pickled
from input_workers.fetchers.recovery import Attempt, Recovery
from input_workers.fetchers.threads import ThreadFetchers
from input_workers.fetchers.worker_calls import WorkerCalls
from input_workers.fetchers.worker_job import Job
from input_workers.fetchers.worker_settings import WorkerSettings
from input_workers.flow.chunk_queue import ChunkQueue
from input_workers.leases import CopyPool, SlotPool
from input_workers.lifecycle import StopSignal
from input_workers.metrics.fetcher_recorder import FetcherRecorder
from input_workers.metrics.recorder import SourceRecorder
from input_workers.metrics.timed import fetcher_here
from input_workers.packed_rows import PACK_BELOW_NBYTES
from input_workers.policy import Quarantine
from input_workers.progress import KEPT, DeliveryLog, Progress
from input_workers.sources.mix import MixPlan
from input_workers.sources.state import Position
from input_workers.sources.stream import Stream, StreamPlan
from input_workers.sources.stream_calls import StreamCalls

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FetchSide"]

# Free slabs of one size kept for copies of chunks: enough for a queue of small batches to be emptied at once.
COPY_SLABS_KEPT = 32

# Memory is lent for requests of so many sizes: of a Stream's usual ones. Where bad rows are cut out, there are parts of any
# size, and what each size keeps would add up.
MOST_OUT_SIZES = 4


class FetchSide:
    """What the fetchers of a run share, whatever they are. Thread-safe.

    Args:
        settings: of the source.
        workers: how many fetchers there are; 0: the trainer's own thread.
        batch_size: of the source.
        book: its specs.
        recorder: its counters.
        signal: why and that the run ends.
        quarantine: accounts for what is skipped.
        position: where a Stream begins.

    Attributes:
        calls: makes the calls.
        chunks: where the chunks go.
        keeps_epochs: an end mark follows each epoch.
        progress: what of a Stream was delivered; None of a plain function.
        recovery: from calls that fail; None: the first failure is the end.
    """

    def __init__(
        self,
        settings: SourceSettings,
        workers: int,
        batch_size: int,
        book: SpecBook,
        recorder: SourceRecorder,
        signal: StopSignal,
        quarantine: Quarantine,
        position: Position,
    ) -> None:
        self._settings = settings
        self._book = book
        self._recorder = recorder
        self._signal = signal
        self._copies = CopyPool(COPY_SLABS_KEPT)
        self._out_pools: dict[int, SlotPool] = {}
        self._out_keep = workers + 2
        self._plan: StreamPlan | MixPlan | None = None
        self._position = position
        self.progress: Progress | None = None
        self.calls: StreamCalls | FunctionCalls
        requests_in: Callable[[int], int] | None = None
        if isinstance(settings.fetch_fun, Stream):
            stream = settings.fetch_fun
            self._plan = stream.plan(settings.last_batch, settings.batch_axes, position.left)
            follow = getattr(self._plan, "follow", None)  # of a FedStream
            self.calls = calls = StreamCalls(
                self._plan,
                rows_per_request=position.rows_per_request or stream.rows_per_request or batch_size,
                batch_size=batch_size,
                seed=stream.seed,
                first=position.first,
                done=position.done,
                lend=self._lend,
                deals_again=not workers,
                allowed=math.inf if follow is None else 0,
            )
            if follow is not None:
                follow(calls.allow)
            requests_in = calls.requests_in if stream.epoch_end == "break" else None
        else:
            self.calls = FunctionCalls(settings.fetch_fun, batch_size)
        self.keeps_epochs = requests_in is not None
        self.chunks = ChunkQueue(
            settings.max_buffered_batches * (batch_size if settings.rebatch else 1),
            settings.max_buffered_bytes,
            signal.wake,
            by_rows=settings.rebatch,
            ordered=settings.ordered,
            requests_in=requests_in,
            first_epoch=position.first,
            pack_below_nbytes=PACK_BELOW_NBYTES if settings.rebatch and not any(settings.batch_axes) else 0,
        )
        self.recovery: Recovery | None = None
        policy = settings.on_error
        if not policy.raises_at_once:
            self.recovery = Recovery(
                policy,
                quarantine,
                drop=lambda rows: recorder.drop("skipped_error", rows),
                file_of=self._file_of,
                abandons=(
                    policy.skip
                    and settings.fetch_timeout_s is not None
                    and workers > 0
                    and isinstance(settings.fetchers, Threads)
                ),
            )

    def follow(self, logs: list[DeliveryLog]) -> Progress | None:
        """Follow what is delivered to these devices; None of a plain function."""
        if self._plan is not None:
            position = self._position
            self.progress = Progress(position.first, position.done, self._plan.epoch_rows, logs, self.keeps_epochs)
        return self.progress

    def position(self, delivered: int | None) -> Position | None:
        """Return what was delivered; None of a plain function. Raises ConfigError if `delivered` is no longer known."""
        if self.progress is None or self._plan is None or not isinstance(self.calls, StreamCalls):
            return None
        at = self.progress.at(delivered)
        if at is None:
            raise ConfigError(
                f"source {self._settings.name!r}: state_dict(delivered={delivered}): wanted one of the last {KEPT} of the "
                f"{self.progress.batches} batches that this run has delivered"
            )
        first, done = at
        return Position(first, done, self._plan.left, self.calls.rows_per_request)

    def close(self) -> None:
        """No more is wanted: wake who waits for a request."""
        if isinstance(self.calls, StreamCalls):
            self.calls.close()

    def retarget(self, batch_size: int) -> None:
        """The batch size has changed."""
        self.calls.batch_size = batch_size
        if self._settings.rebatch:
            self.chunks.max_weight = self._settings.max_buffered_batches * batch_size

    def backend(
        self, working: Sequence[FetcherRecorder], resting: Sequence[FetcherRecorder], on_end: Callable[[], None]
    ) -> FetcherBackend:
        """Return what runs these fetchers. Raises ConfigError: the function cannot be sent to processes."""
        settings = self._settings
        if isinstance(settings.fetchers, Processes):
            return ProcessFetchers(working, resting, self._workers(), self.fetch, self.fail, on_end, self.unfinished)
        return ThreadFetchers(
            settings.name,
            working,
            resting,
            self.fetch,
            self.fail,
            on_end,
            self.unfinished,
            settings.fetch_timeout_s,
            self.replace if settings.on_error.skip else None,
        )

    def _workers(self) -> WorkerSettings:
        """Return what worker processes need."""
        settings, processes = self._settings, self._settings.fetchers
        assert isinstance(processes, Processes)  # noqa: S101  asked for by them only
        is_stream = isinstance(self.calls, StreamCalls)
        if self._plan is not None:
            fetch = pickled(self._plan.fetch, "the source's fetch")
        else:
            fetch = pickled(settings.fetch_fun, "the fetch function")
        init = None if processes.worker_init_fun is None else pickled(processes.worker_init_fun, "worker_init_fun")
        packs = not is_stream and self.chunks.pack_below_nbytes > 0
        return WorkerSettings(
            source=settings.name,
            start=processes.start_method,
            preload=processes.preload,
            restarts=processes.restarts,
            fetch_timeout_s=settings.fetch_timeout_s,
            keep_blocks=settings.device_queue_depth + 2,  # of each worker: fewer, and some would be mapped anew all the time
            job=lambda worker_id: Job(fetch, init, worker_id, is_stream, settings.batch_axes, packs),
            requests=self.calls if isinstance(self.calls, StreamCalls) else None,
            function=self.calls,
            specs=lambda: self._book.specs,
            idle=self._signal.ended.wait,
            ended=lambda: self.chunks.closed,
            count_restart=self._recorder.count_restart,
        )

    def resize(self, workers: int) -> None:
        """There are so many fetchers now: memory that is lent for requests is kept for as many."""
        self._out_keep = workers + 2
        for pool in list(self._out_pools.values()):
            pool.keep(self._out_keep)

    def unfinished(self) -> bool:
        """Whether a fetcher that rests may have something left to fetch. Takes no lock."""
        if self.chunks.closed:
            return False
        return self.calls.has_given_back if isinstance(self.calls, StreamCalls) else True

    def fetch(
        self,
        recorder: FetcherRecorder,
        interrupted: tuple[Attempt, BaseException] | None,
        calls: WorkerCalls | None = None,
    ) -> bool:
        """Run the fetch loop, in a fetcher's thread, with these calls instead of our own; it never raises.

        Returns:
            Whether the fetcher was released before the end of its data.
        """
        recorder.begin_work()
        try:
            with fetcher_here(recorder):
                ended = fetch_loop(
                    self._settings.name,
                    self.calls if calls is None else calls,
                    ChunkCheck(self._book),
                    self.chunks,
                    recorder,
                    self._signal.ended.wait,
                    self.fail,
                    self._copies.copy,
                    self.recovery,
                    interrupted,
                    self.nothing_left,
                )
        finally:
            recorder.end_work()
        return recorder.released and not ended

    def fail(self, failure: Failure, request: FetchRequest | None) -> None:
        """A call has failed. In ordered delivery, what comes before it is delivered first."""
        if request is not None and self._settings.ordered:
            self.chunks.put_barrier(request.ordinal, lambda: self._signal.fail(failure))
        else:
            self._signal.fail(failure)

    def nothing_left(self, request: FetchRequest) -> None:
        """All rows of a request were skipped: it has had its turn."""
        if self.progress is not None:
            self.progress.add([(request.epoch, request.begin, request.begin + len(request.rows))])
        self.chunks.put(((), 0, 0, request))

    def replace(self, recorder: FetcherRecorder, failure: Failure) -> tuple[FetcherRecorder, tuple[Attempt, BaseException]]:
        """A fetcher's call took too long: return the recorder of another, and what it is to go on with."""
        assert self.recovery is not None  # noqa: S101  nobody is replaced without
        attempt = recorder.attempt or Attempt(self.recovery, recorder.request, again(self.calls, recorder.worker_id))
        other = self._recorder.fetcher(recorder.worker_id)
        other.request = recorder.request
        self._recorder.count_restart()
        return other, (attempt, failure.exception())

    def _file_of(self, row: int) -> str | None:
        try:
            return self._plan.file_of(row) if self._plan is not None else None
        except Exception as error:  # it is named for the user's sake: no reason to fail
            return describe(error)

    def _lend(self, rows: int) -> list[NDArray[Any]] | None:
        """Return memory for a request's rows, once the specs are known; None where rows have any shape."""
        specs = self._book.specs
        if specs is None or not all(spec.is_fixed for spec in specs):
            return None
        pool = self._out_pools.get(rows)
        if pool is None:
            if len(self._out_pools) >= MOST_OUT_SIZES:
                return None
            pool = self._out_pools.setdefault(rows, SlotPool(specs, self._settings.batch_axes, rows, self._out_keep))
        return list(pool.lease().arrays)
