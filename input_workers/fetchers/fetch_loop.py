"""The loop that every fetcher runs, wherever it runs: call, check, count, put; until no more is wanted or there is no more."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from input_workers.contracts import Chunk, FetchFunction, FetchRequest
from input_workers.errors import EndOfData, Failure, FetchFailed, FetchTimeout, WorkerDied, describe
from input_workers.fetchers.chunk_check import ChunkCheck
from input_workers.fetchers.ownership import owned
from input_workers.fetchers.recovery import Attempt, Recovery, keep_rows
from input_workers.metrics.fetcher_recorder import Abandoned, FetcherRecorder, Released
from input_workers.metrics.histogram import SAMPLES_BEFORE_FOLDING
from input_workers.policy import TooManySkipped

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BackOff", "Calls", "FunctionCalls", "fetch_failure", "fetch_loop"]

log = logging.getLogger("input_workers")

# How long to wait before asking again when there is no data now; doubled from the first to the last.
FIRST_BACK_OFF_SECONDS = 0.001
LAST_BACK_OFF_SECONDS = 0.1
NO_DATA_WARNING_SECONDS = 10.0


class FunctionCalls:
    """Calls of a plain function `function(worker_id, batch_size)`. `batch_size` may be changed at any time."""

    __slots__ = ("batch_size", "function")

    def __init__(self, function: FetchFunction, batch_size: int) -> None:
        self.function = function
        self.batch_size = batch_size


class OtherCalls(Protocol):
    """Calls that are dealt, or made elsewhere: see `sources.stream_calls` and `worker_calls`.

    What the latter return belongs to nobody else, as their `owns_results` says.
    """

    def next(self, recorder: FetcherRecorder) -> tuple[Any, FetchRequest | None]:
        """Make the next call; return its result and the request. Raises EndOfData after the last."""

    def fetch(self, request: FetchRequest | None) -> Any:
        """Make the call for a request, or for a part of one, or one of a plain function."""


Calls: TypeAlias = "FunctionCalls | OtherCalls"


class Chunks(Protocol):
    """Where chunks go: see `flow.chunk_queue.ChunkQueue`."""

    pack_below_nbytes: int

    @property
    def closed(self) -> bool:
        """Whether no more is wanted."""

    def pack(self, arrays: Sequence[NDArray[Any]], rows: int, nbytes: int) -> bool:
        """Copy a small chunk without waiting."""

    def offer(self, chunk: Chunk) -> bool:
        """Put without waiting."""

    def put(self, chunk: Chunk) -> bool:
        """Put, waiting; False if it was not taken."""


class BackOff:
    """Waits 1 to 100 ms, longer each time, while a fetcher has no data; says so every ten seconds."""

    def __init__(self, source: str, worker_id: int) -> None:
        self._who = f"source {source!r}, worker {worker_id}"
        self._seconds = 0.0
        self._since = self._warned = time.monotonic()

    def next_seconds(self) -> float:
        """Return how long to wait now."""
        now = time.monotonic()
        if now - self._warned >= NO_DATA_WARNING_SECONDS:
            self._warned = now
            log.warning("%s: the fetch function has returned no data for %.0f s", self._who, now - self._since)
        self._seconds = min(max(self._seconds * 2, FIRST_BACK_OFF_SECONDS), LAST_BACK_OFF_SECONDS)
        return self._seconds


def fetch_failure(source: str, recorder: FetcherRecorder, error: BaseException) -> Failure:
    """Return the failure that an exception of the fetch function, or of the check of its result, is."""
    where = f"source {source!r}, worker {recorder.worker_id}"
    notes = [f"source: {source!r}", f"worker: {recorder.worker_id}"]
    if recorder.request is not None:
        where += f", request {recorder.request.index}"
        notes.append(f"request: {recorder.request.index} (epoch {recorder.request.epoch})")
    if isinstance(error, (FetchTimeout, WorkerDied)):  # of a worker process, in its own words
        return Failure(type(error), str(error), error.__cause__, notes)
    if isinstance(error, TooManySkipped):  # the last of what was to be skipped is the cause
        return Failure(FetchFailed, f"{error}: {describe(error.__cause__ or error)}", error.__cause__, notes)
    return Failure(FetchFailed, f"{where}: {describe(error)}", error, notes)


def fetch_loop(
    source: str,
    calls: Calls,
    check: ChunkCheck,
    chunks: Chunks,
    recorder: FetcherRecorder,
    idle: Callable[[float], object],
    fail: Callable[[Failure, FetchRequest | None], object],
    copy: Callable[[NDArray[Any]], NDArray[Any]],
    recovery: Recovery | None = None,
    interrupted: tuple[Attempt, BaseException] | None = None,
    nothing_left: Callable[[FetchRequest], object] = lambda request: None,  # noqa: ARG005
) -> bool:
    """Fetch until the data end, the queue closes, the fetcher is released or something is raised, in its own thread.

    Returns:
        Whether this fetcher is through: its data have ended, or it has failed. Raises nothing but what `fail` raises.

    Args:
        source: the name, for errors.
        calls: makes the next call.
        check: of its result.
        chunks: where the chunks go.
        recorder: of this fetcher.
        idle: waits so many seconds when there is no data now, or before a retry, or less when the queue closes; returns
            whether the run has ended.
        fail: told the failure and the request that failed; called at most once.
        copy: copies an array that somebody else can reach.
        recovery: from calls that fail; None: the first failure is the end.
        interrupted: what another fetcher was at, and why it did not come to an end.
        nothing_left: told a request all of whose rows were skipped.
    """
    back_off: BackOff | None = None
    function = calls.function if isinstance(calls, FunctionCalls) else None
    result: Any
    request: FetchRequest | None = None
    worker_id = recorder.worker_id
    durations = recorder.calls
    samples = durations.samples
    clock, rows_of, offer, pack = time.monotonic, check.rows_of, chunks.offer, chunks.pack
    owns_results = getattr(calls, "owns_results", False)
    can_be_abandoned = recovery is not None and recovery.abandons
    deal: Callable[[FetcherRecorder], FetchRequest] | None = getattr(calls, "deal", None)
    deals = can_be_abandoned and deal is not None
    recorder.alive = True
    try:
        if interrupted is not None:
            recorder.attempt, cause = interrupted
            recorder.attempt.failed(cause, recorder)
        attempt: Attempt | None = recorder.attempt  # in the trainer's own thread: what it did not come to the end of
        now = clock()
        # A worker process was sent more than it has answered: its calls say when it may rest.
        while not (chunks.closed or (recorder.released and attempt is None and not owns_results)):
            if not deals:
                recorder.call_started = now
            try:
                if attempt is not None:
                    result, request = attempt.run(check, recorder, idle, lambda: not chunks.closed), attempt.request
                elif function is not None:
                    result = function(worker_id, calls.batch_size)  # type: ignore[union-attr]
                elif deals and deal is not None:
                    recorder.request = None
                    recorder.request = request = deal(recorder)
                    # The call begins when its request is known: whoever takes it over needs that.
                    recorder.call_started = now = clock()
                    result = calls.fetch(request)  # type: ignore[union-attr]
                else:
                    recorder.request = None
                    result, request = calls.next(recorder)  # type: ignore[union-attr]
            except Exception as error:
                if (trace := recorder.trace) is not None and attempt is None and not isinstance(error, EndOfData):
                    trace.add(trace.failed_call, now, clock(), index_of(recorder.request))
                recorder.end_call(failed=not isinstance(error, EndOfData))
                if recovery is None or attempt is not None or isinstance(error, EndOfData):
                    raise
                if deal is not None and recorder.request is None:  # it could not be dealt: there is no call to make again
                    raise
                attempt = recorder.attempt = Attempt(recovery, recorder.request, again(calls, worker_id))
                attempt.failed(error, recorder)
                now = clock()
                continue
            if attempt is not None and not attempt.is_over:
                break
            # Not before it began: a worker process says how long a call took, and a request may have been waited for.
            before, started, now = now, recorder.call_started, clock()
            if (trace := recorder.trace) is not None and attempt is None:
                trace.add(trace.call, before if owns_results else started, now, index_of(request))
            if can_be_abandoned:
                recorder.end_call()
            # One look at the clock a call: what lies between two calls is shorter than it is worth to measure.
            if attempt is None:
                samples.append(now - started)
            else:
                samples.extend(attempt.durations)
            if len(samples) >= SAMPLES_BEFORE_FOLDING:
                durations.fold()
                samples = durations.samples
            if attempt is not None:
                attempt = recorder.attempt = None
                # Of a request, the rows were checked one group after the other, perhaps by another fetcher.
                rows = rows_of(result, None) if result or request is None else 0
                if request is not None and not rows:
                    nothing_left(request)
                    continue
            else:
                rows = rows_of(result, request)
                if request is not None and request.kept is not None:
                    result, rows = keep_rows(result, request.kept, check.axes), len(request.kept)
            if not rows:
                recorder.call_started = math.inf
                back_off = back_off or BackOff(source, recorder.worker_id)
                idle(back_off.next_seconds())
                started, now = now, clock()
                if (trace := recorder.trace) is not None:
                    trace.add("no data", started, now)
                continue
            back_off = None
            recorder.rows += rows
            nbytes = rows * check.row_nbytes or sum(array.nbytes for array in result)
            if nbytes < chunks.pack_below_nbytes and request is None and pack(result, rows, nbytes):
                continue
            lent = request.out if request is not None else None
            chunk: Chunk = result if owns_results else owned(result, lent, copy), rows, nbytes, request
            del result
            if offer(chunk):
                del chunk
                continue
            recorder.call_started = math.inf
            recorder.blocked = recorder.blocked[0], now
            taken = chunks.put(chunk)
            started, now = now, clock()
            recorder.blocked = recorder.blocked[0] + now - started, math.inf
            if (trace := recorder.trace) is not None:
                trace.add("waiting for room", started, now)
            if not taken:
                recorder.stopped_rows += rows
                break
            del chunk
    except EndOfData:
        return True
    except (Abandoned, Released):
        pass
    except BaseException as error:  # SystemExit too: it would end this thread in silence, and the trainer would wait
        try:
            recorder.end_call()
        except Abandoned:  # another one has taken over, and nobody waits for this
            return False
        counted = error.__cause__ if isinstance(error, TooManySkipped) else error
        recorder.count_error(type(counted).__name__)
        fail(fetch_failure(source, recorder, error), recorder.request)
        return True
    finally:
        recorder.call_started = math.inf
        recorder.alive = False
    return False


def index_of(request: FetchRequest | None) -> int | None:
    """Return the request's number, if it has one."""
    return None if request is None else request.index


def again(calls: Calls, worker_id: int) -> Callable[[FetchRequest | None], Any]:
    """Return what makes a call once more: for a request, or of a plain function for None."""
    if isinstance(calls, FunctionCalls):
        return lambda _: calls.function(worker_id, calls.batch_size)
    return calls.fetch
