"""The half of a run in which the fetchers work: what they call, where rows go, and what becomes of failures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from input_workers.contracts import FetchRequest
from input_workers.coordinator.settings import SourceSettings
from input_workers.errors import ConfigError
from input_workers.fetchers.chunk_check import SpecBook
from input_workers.fetchers.context import FetchContext, FunctionCalls
from input_workers.flow.assembly import Assembly
from input_workers.flow.batches import BatchRules
from input_workers.flow.turns import Turns
from input_workers.flow.window import ChunkWindow, Window
from input_workers.leases import SlotPool
from input_workers.lifecycle import StopSignal
from input_workers.metrics.recorder import SourceRecorder
from input_workers.policy import Quarantine
from input_workers.progress import KEPT, DeliveryLog, Progress
from input_workers.sources.mix import MixPlan
from input_workers.sources.state import Position
from input_workers.sources.stream import Stream, StreamPlan
from input_workers.sources.stream_calls import StreamCalls

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FetchSide", "SourceParts"]

# Memory is lent for requests of this many sizes: of a Stream's usual ones. Where bad rows are cut out, there are parts of any
# size, and what is kept of each size would add up.
MOST_OUT_SIZES = 4


@dataclass(frozen=True, slots=True)
class SourceParts:
    """What a source keeps from run to run.

    Attributes:
        settings: what it was asked to be.
        book: what its rows look like.
        recorder: its counters.
        quarantine: accounts for what is skipped.
        make_batch: builds what the trainer gets.
        worker_ids: one for each fetcher; none: the trainer's thread makes the calls. "auto" appends to them.
        new_worker_id: returns an id that no worker has.
    """

    settings: SourceSettings
    book: SpecBook
    recorder: SourceRecorder
    quarantine: Quarantine
    make_batch: Callable[[Sequence[Any]], Any]
    worker_ids: list[int]
    new_worker_id: Callable[[], int]


class FetchSide:
    """What the fetchers of a run share, whatever they are. Thread-safe.

    Args:
        parts: of the source.
        workers: how many fetchers there are at first; 0: the trainer's own thread makes the calls.
        batch_size: of the source.
        signal: why and that the run ends.
        position: where a Stream begins.

    Attributes:
        calls: makes the calls.
        assembly: where rows go.
        rules: how rows become batches.
        context: what fetchers share.
        keeps_epochs: an end mark follows each epoch.
        progress: what of a Stream was delivered; None of a plain function.
    """

    def __init__(self, parts: SourceParts, workers: int, batch_size: int, signal: StopSignal, position: Position) -> None:
        settings = self._settings = parts.settings
        self._book = parts.book
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
                allowed=math.inf if follow is None else 0,
            )
            if follow is not None:
                follow(calls.allow)
            requests_in = calls.requests_in if stream.epoch_end == "break" else None
        else:
            self.calls = FunctionCalls(settings.fetch_fun, batch_size)
        self.keeps_epochs = requests_in is not None
        turns = Turns(settings.ordered, requests_in, position.first) if settings.ordered or self.keeps_epochs else None
        self.rules = BatchRules(settings.name, settings.batch_axes, settings.last_batch, settings.rebatch)
        window = (Window if settings.rebatch else ChunkWindow)(self._max_rows(batch_size), settings.max_buffered_bytes)
        self.assembly = Assembly(self.rules, window, turns, self._keep_aside, signal.wake)
        policy = settings.on_error
        self.context = FetchContext(
            source=settings.name,
            calls=self.calls,
            assembly=self.assembly,
            book=parts.book,
            policy=policy,
            quarantine=parts.quarantine,
            recorder=parts.recorder,
            signal=signal,
            ordered=settings.ordered,
            fetch_timeout_s=settings.fetch_timeout_s,
            abandons=policy.skip and settings.fetch_timeout_s is not None and settings.fetchers.abandons_calls and workers > 0,
            file_of=self._file_of,
            on_skipped=self._note_skipped,
        )

    def follow(self, logs: list[DeliveryLog]) -> Progress | None:
        """Follow what is delivered to these devices; None of a plain function."""
        if self._plan is not None:
            position = self._position
            ended = self.ended_devices(len(logs))
            self.progress = Progress(position.first, position.done, self._plan.epoch_rows, logs, self.keeps_epochs, ended)
        return self.progress

    def ended_devices(self, count: int) -> tuple[int, ...]:
        """Return which of this many devices were given the end of the first epoch in an earlier run; never all of them."""
        ended = tuple(number for number in self._position.ended if number < count)
        return ended if self.keeps_epochs and len(ended) < count else ()

    def position(self, delivered: int | None) -> Position | None:
        """Return what was delivered; None of a plain function. Raises ConfigError if `delivered` is no longer known."""
        if self.progress is None or self._plan is None or not isinstance(self.calls, StreamCalls):
            return None
        at = self.progress.at(delivered)
        if at is None:
            raise ConfigError(
                f"source {self._settings.name!r}: state_dict(delivered={delivered}): it must be one of the last {KEPT} of the "
                f"{self.progress.batches} batches that this run has delivered"
            )
        first, done, ended = at
        return Position(first, done, self._plan.left, self.calls.rows_per_request, ended)

    def close(self) -> None:
        """No more is fetched: wake those that wait for a request."""
        if isinstance(self.calls, StreamCalls):
            self.calls.close()

    def set_batch_size(self, batch_size: int) -> None:
        """The batch size has changed."""
        self.calls.batch_size = batch_size
        self.assembly.set_max_rows(self._max_rows(batch_size))

    def _max_rows(self, batch_size: int) -> int:
        """Return the bound on rows that wait, or on chunks."""
        return self._settings.max_buffered_batches * (batch_size if self._settings.rebatch else 1)

    def resize(self, workers: int) -> None:
        """The number of fetchers has changed: memory that is lent for requests is kept for as many."""
        self._out_keep = workers + 2
        for pool in list(self._out_pools.values()):
            pool.keep(self._out_keep)

    def _note_skipped(self, request: FetchRequest) -> None:
        """No row of a request is left: as far as a state is concerned, it was delivered."""
        if self.progress is not None:
            self.progress.add([(request.epoch, request.begin, request.begin + len(request.rows))])

    def _file_of(self, row: int) -> str | None:
        return self._plan.file_of(row) if self._plan is not None else None

    def _lend(self, rows: int) -> list[NDArray[Any]] | None:
        """Return memory for this many rows, once the specs are known; None where rows have any shape."""
        specs = self._book.specs
        if specs is None or not all(spec.is_fixed for spec in specs):
            return None
        pool = self._out_pools.get(rows)
        if pool is None:
            if len(self._out_pools) >= MOST_OUT_SIZES:
                return None
            pool = self._out_pools.setdefault(rows, SlotPool(specs, self._settings.batch_axes, rows, self._out_keep))
        return list(pool.lease().arrays)

    def _keep_aside(self, arrays: Sequence[NDArray[Any]], rows: int) -> Sequence[NDArray[Any]]:
        """Return copies of a chunk's arrays, in memory that is used again where their size is a usual one."""
        lent = self._lend(rows)
        if lent is None:
            return [array.copy() for array in arrays]
        for target, array in zip(lent, arrays, strict=True):
            target[...] = array
        return lent
