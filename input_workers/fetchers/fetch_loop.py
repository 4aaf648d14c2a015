"""The loop that every fetcher runs, wherever its calls are made: call, check, count, copy into batches."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from input_workers.contracts import FetchRequest
from input_workers.errors import EndOfData
from input_workers.fetchers.chunk_check import ChunkCheck
from input_workers.fetchers.context import Calls, FetchContext, FunctionCalls
from input_workers.fetchers.fetcher import Fetcher
from input_workers.fetchers.ownership import ownership
from input_workers.fetchers.recovery import TAKEN_AWAY, Attempt, keep_rows
from input_workers.metrics.histogram import SAMPLES_BEFORE_FOLDING
from input_workers.policy import TooManySkipped

__all__ = ["BackOff", "fetch_loop"]

log = logging.getLogger("input_workers")

# How long to wait before asking again when there is no data now; doubled from the first to the last.
FIRST_BACK_OFF_SECONDS = 0.001
LAST_BACK_OFF_SECONDS = 0.1
NO_DATA_WARNING_SECONDS = 10.0


class BackOff:
    """Waits 1 to 100 ms, longer each time, while a fetcher has no data; warns every ten seconds."""

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


def fetch_loop(fetcher: Fetcher, context: FetchContext, calls: Calls) -> bool:
    """Fetch until the data end, the assembly closes, the fetcher is released or a call fails, in the fetcher's thread.

    Returns:
        Whether this fetcher is through: its data have ended, or it has failed. It never raises.
    """
    recorder = fetcher.recorder
    recorder.alive = True
    try:
        return _fetch(fetcher, context, calls)
    except EndOfData:
        return True
    except BaseException as error:  # SystemExit too: it would end this thread in silence, and the trainer would wait
        if not fetcher.end_call():
            return False  # another fetcher has taken over, and this one's end is of no interest
        if not isinstance(error, TooManySkipped):  # the last that was to be skipped has been counted
            recorder.count_error(type(error).__name__)
        context.fail(context.failure_of(fetcher, error), fetcher.request)
        return True
    finally:
        recorder.call_started = math.inf
        recorder.alive = False


def _fetch(fetcher: Fetcher, context: FetchContext, calls: Calls) -> bool:
    """Run the loop; return whether the fetcher is through. Raises EndOfData, and the failure of a call."""
    recorder, assembly = fetcher.recorder, context.assembly
    check = ChunkCheck(context.book)
    samples = recorder.calls.samples
    clock, rows_of, pack, place = time.monotonic, check.rows_of, assembly.pack, assembly.place
    pack_below_nbytes = 0 if calls.is_stream else assembly.pack_below_nbytes
    # A plain function is called without a step between: of small chunks, a call more is a tenth of the time.
    function = calls.function if type(calls) is FunctionCalls else None
    shared = context.calls
    abandons, owns_results = context.abandons, calls.owns_results
    begins_calls = not (abandons and calls.is_stream)  # else `calls.next` does, when the request is known
    resumes = fetcher.resumes  # why it begins with what another fetcher did not finish
    back_off: BackOff | None = None
    result: Any
    now = clock()
    while not assembly.closed and (not fetcher.released or owns_results):
        if begins_calls:
            recorder.call_started = now
        attempt: Attempt | None = None
        request: FetchRequest | None = None
        try:
            if resumes is not None:
                error, resumes = resumes, None
                raise error
            if function is not None:
                result = function(fetcher.worker_id, shared.batch_size)
            else:
                answer = calls.next(fetcher)
                if answer is None:  # released, and everything that a worker was sent has been answered
                    return False
                result, request = answer
                answer = None  # or it would hold the chunk, and who holds it is looked at below
                attempt = fetcher.attempt  # of a worker process; else there is none yet
        except Exception as error:
            attempt = _begin_attempt(fetcher, context, calls, error)
            result = _finish_attempt(attempt, fetcher, context, calls, check)
            if result is TAKEN_AWAY or not attempt.is_over:
                return False
            request = attempt.request
        before, started, now = now, recorder.call_started, clock()
        if attempt is not None:
            samples.extend(attempt.durations)
            context.account_skipped(fetcher, request, attempt.take_skipped())
        elif abandons and not fetcher.end_call():
            return False
        else:
            samples.append(now - started)
            if (trace := recorder.trace) is not None:
                # A worker process tells how long its call took; this thread has waited since the call before.
                trace.add(trace.call, before if owns_results else started, now, recorder.request)
        if len(samples) >= SAMPLES_BEFORE_FOLDING:
            recorder.calls.fold()
            samples = recorder.calls.samples

        # Which rows are these? Those of an attempt were checked group by group, and may be none.
        if attempt is None:
            rows = rows_of(result, request)
            if request is not None and request.kept is not None:
                result, rows = keep_rows(result, request.kept, check.axes), len(request.kept)
        else:
            fetcher.attempt = None
            rows = rows_of(result, None) if result or request is None else 0
            if request is not None and not rows:
                context.skip_request(fetcher, request)
                now = clock()
                continue
        if not rows:
            recorder.call_started = math.inf
            back_off = back_off or BackOff(context.source, fetcher.worker_id)
            context.pause(back_off.next_seconds())
            started, now = now, clock()
            if (trace := recorder.trace) is not None:
                trace.add("no data", started, now)
            continue
        back_off = None

        # From here on the rows count as fetched: they are placed, or accounted for as stopped.
        recorder.rows += rows
        nbytes = rows * check.row_nbytes or sum(array.nbytes for array in result)
        if nbytes < pack_below_nbytes and pack(result, rows):
            continue
        recorder.call_started = math.inf
        ours = None
        if assembly.may_keep(rows, request):
            ours = ownership(result, owns_results, request.out if request is not None else None)
        waited = recorder.blocked[0]
        unplaced = place(result, rows, nbytes, request, ours, recorder)
        # The chunk's memory goes before the next call: the function may need it, or a worker process its block.
        del result, ours
        started, now = now, clock()
        recorder.copying += max(0.0, now - started - (recorder.blocked[0] - waited))
        if (trace := recorder.trace) is not None:
            trace.add("copying", started, now)  # "waiting for room" lies inside it
        if unplaced is not None:
            recorder.stopped_rows += unplaced.rows
            if unplaced.error is not None:
                raise unplaced.error
            return False
    return False


def _begin_attempt(fetcher: Fetcher, context: FetchContext, calls: Calls, error: Exception) -> Attempt:
    """A call raised: return what is to be fetched in its place. Raises the error, where the policy says so."""
    resumes, fetcher.resumes = fetcher.resumes, None
    if resumes is None:
        recorder, started = fetcher.recorder, fetcher.call_started
        if (trace := recorder.trace) is not None and started != math.inf and not isinstance(error, EndOfData):
            trace.add(trace.failed_call, started, time.monotonic(), recorder.request)
        if not fetcher.end_call(failed=not isinstance(error, EndOfData)):
            raise error  # the loop sees that the call was taken away
        if fetcher.attempt is not None:  # of a worker process
            context.account_skipped(fetcher, fetcher.attempt.request, fetcher.attempt.take_skipped())
        if isinstance(error, EndOfData) or context.policy.raises_at_once or calls.make_retry_call is None:
            raise error
        fetcher.attempt = Attempt(context.policy, fetcher.request)
    attempt = fetcher.attempt
    assert attempt is not None  # noqa: S101  made here, or by the fetcher before
    attempt.failed(error, fetcher)
    return attempt


def _finish_attempt(attempt: Attempt, fetcher: Fetcher, context: FetchContext, calls: Calls, check: ChunkCheck) -> Any:
    """Fetch what can be fetched in the place of a failed call, and account for what was skipped."""
    assert calls.make_retry_call is not None  # noqa: S101  an attempt has begun
    try:
        retry_call = calls.make_retry_call(fetcher)
        return attempt.run(retry_call, check, fetcher, context.pause, lambda: not context.assembly.closed)
    finally:
        if not fetcher.abandoned:
            context.account_skipped(fetcher, attempt.request, attempt.take_skipped())
