"""What all fetchers of a run share: where calls come from, where rows go, and what happens when a call fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from input_workers.contracts import FetchFunction, FetchRequest
from input_workers.errors import Failure, FetchFailed, FetchTimeout, WorkerDied, describe
from input_workers.fetchers.chunk_check import SpecBook
from input_workers.fetchers.fetcher import Fetcher
from input_workers.fetchers.recovery import Skipped
from input_workers.lifecycle import StopSignal
from input_workers.metrics.fetcher_recorder import FetcherRecorder
from input_workers.metrics.recorder import SourceRecorder
from input_workers.policy import ErrorPolicy, Quarantine, QuarantinedRows, TooManySkipped

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Assembly", "Calls", "FetchContext", "FunctionCalls"]


class Calls(Protocol):
    """Makes calls of the fetch function: a plain function's, a Stream's (`sources.stream_calls`), or those of a worker.

    Attributes:
        owns_results: nothing else refers to the memory of what `next` returns.
        is_stream: each call is for a request.
    """

    owns_results: bool
    is_stream: bool

    def next(self, fetcher: Fetcher) -> tuple[Any, FetchRequest | None] | None:
        """Make the next call; return its result and request, or None: the fetcher was released and may rest.

        Raises EndOfData after the last, and what the function raises. `fetcher.attempt` is set where it has made other calls
        in the place of one that failed.
        """

    @property
    def make_retry_call(self) -> Callable[[Fetcher], Callable[[FetchRequest | None], Any]] | None:
        """Returns what makes a call once more, for a request or a part of one; for a plain function, for None.

        None: `next` itself does what the ErrorPolicy says, and what it raises is final.
        """


class Assembly(Protocol):
    """Where rows go: see `flow.assembly.Assembly`."""

    pack_below_nbytes: int
    closed: bool

    def may_keep(self, rows: int, request: FetchRequest | None) -> bool:
        """Whether a chunk may be kept as it is."""

    def pack(self, arrays: Sequence[NDArray[Any]], rows: int) -> bool:
        """Reserve rows for a small chunk and note its bytes."""

    def place(
        self,
        arrays: Sequence[NDArray[Any]],
        rows: int,
        nbytes: int,
        request: FetchRequest | None,
        ours: Sequence[bool] | None,
        recorder: FetcherRecorder,
    ) -> Any:
        """Copy a chunk's rows into batches."""

    def skip(self, request: FetchRequest, recorder: FetcherRecorder) -> None:
        """All rows of a request were skipped."""

    def fail_in_turn(self, request: FetchRequest, failure: Failure) -> None:
        """Place nothing from this request on."""

    def take_failures(self) -> Sequence[Failure]:
        """Return failures whose turn has come."""


class FunctionCalls:
    """Calls of a plain function `function(worker_id, batch_size)`. `batch_size` may be changed at any time."""

    __slots__ = ("batch_size", "function")

    owns_results = False
    is_stream = False
    has_pending_work = True  # each worker that has begun its data is called until it raises EndOfData

    def __init__(self, function: FetchFunction, batch_size: int) -> None:
        self.function = function
        self.batch_size = batch_size

    def next(self, fetcher: Fetcher) -> tuple[Any, None]:
        """Call the function."""
        return self.function(fetcher.worker_id, self.batch_size), None

    def make_retry_call(self, fetcher: Fetcher) -> Callable[[FetchRequest | None], Any]:
        """Return what calls the function again."""
        return lambda _: self.function(fetcher.worker_id, self.batch_size)


@dataclass(frozen=True, slots=True)
class FetchContext:
    """What the fetchers of a run share. Thread-safe.

    Attributes:
        source: the name, for errors and thread names.
        calls: makes the calls, where they are made in this process; its `function` makes them elsewhere.
        assembly: where rows go.
        book: the specs of the source.
        policy: what to do when a call fails.
        quarantine: accounts for what is skipped.
        recorder: the counters of the source.
        signal: says that the run ends, and why.
        ordered: requests are delivered in their order.
        fetch_timeout_s: how long a call may take, or None.
        abandons: a call that takes longer is given to another fetcher.
        file_of: returns where a row is read from, if that is known.
        on_skipped: told a request of which no row is left.
    """

    source: str
    calls: Any
    assembly: Assembly
    book: SpecBook
    policy: ErrorPolicy
    quarantine: Quarantine
    recorder: SourceRecorder
    signal: StopSignal
    ordered: bool
    fetch_timeout_s: float | None
    abandons: bool
    file_of: Callable[[int], str | None]
    on_skipped: Callable[[FetchRequest], object]

    def pause(self, seconds: float) -> bool:
        """Wait, or until the run ends; return whether it has."""
        return self.signal.ended.wait(seconds)

    @property
    def has_pending_work(self) -> bool:
        """Whether a fetcher that rests may have something left to fetch. Takes no lock."""
        return not self.assembly.closed and self.calls.has_pending_work

    def fail(self, failure: Failure, request: FetchRequest | None = None) -> None:
        """A call has failed. In ordered delivery, what comes before it is delivered first."""
        if request is not None and self.ordered:
            self.assembly.fail_in_turn(request, failure)
            for each in self.assembly.take_failures():  # if its turn has come, or will never come
                self.signal.fail(each)
        else:
            self.signal.fail(failure)

    def failure_of(self, fetcher: Fetcher, error: BaseException) -> Failure:
        """Return the failure that an exception of the fetch function, or of the check of its result, is."""
        request, worker_id = fetcher.request, fetcher.worker_id
        where = f"source {self.source!r}, worker {worker_id}"
        notes = [f"source: {self.source!r}", f"worker: {worker_id}"]
        if request is not None:
            where += f", request {request.index}"
            notes.append(f"request: {request.index} (epoch {request.epoch})")
        if isinstance(error, (FetchTimeout, WorkerDied)):  # they say already where and what
            return Failure(type(error), str(error), error.__cause__, notes)
        if isinstance(error, TooManySkipped):  # the last one that was to be skipped is the cause
            return Failure(FetchFailed, f"{error}: {describe(error.__cause__ or error)}", error.__cause__, notes)
        return Failure(FetchFailed, f"{where}: {describe(error)}", error, notes)

    def account_skipped(self, fetcher: Fetcher, request: FetchRequest | None, skipped: Sequence[Skipped]) -> None:
        """Account for what was skipped. Raises TooManySkipped: more than the policy allows."""
        for each in skipped:
            if request is None:
                entry = QuarantinedRows(fetcher.worker_id, None, None, (), (), each.text)
                self.quarantine.skip(entry, 1, each.error)
                continue
            rows = tuple(int(request.rows[row]) for row in each.rows)
            names = tuple(name for name in map(self._name_of, rows) if name is not None)
            entry = QuarantinedRows(fetcher.worker_id, request.index, request.epoch, rows, names, each.text)
            self.quarantine.skip(entry, len(rows), each.error)
            fetcher.recorder.rows += len(rows)
            self.recorder.drop("skipped_error", len(rows))

    def skip_request(self, fetcher: Fetcher, request: FetchRequest) -> None:
        """All rows of a request were skipped: it has had its turn."""
        self.on_skipped(request)
        self.assembly.skip(request, fetcher.recorder)

    def _name_of(self, row: int) -> str | None:
        try:
            return self.file_of(row)
        except Exception as error:  # it is named for the user's sake: no reason to fail
            return describe(error)
