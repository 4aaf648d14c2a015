"""What the worker processes of a source share: how they are started, what they are sent, whom their threads ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from input_workers.contracts import ArraySpec, FetchRequest
from input_workers.fetchers import StartMethod
from input_workers.fetchers.worker_job import Job
from input_workers.metrics.fetcher_recorder import FetcherRecorder

__all__ = ["Requests", "WorkerSettings"]


class Requests(Protocol):
    """What deals a Stream's requests: see `sources.stream_calls.StreamCalls`. Thread-safe."""

    batch_size: int

    @property
    def has_given_back(self) -> bool:
        """Whether requests wait to be dealt again."""

    def deal(self, recorder: FetcherRecorder) -> FetchRequest:
        """Return the next request, waiting for it where they come one by one. Raises EndOfData after the last."""

    def deal_now(self, worker_id: int) -> FetchRequest | None:
        """Return the next request, or None while there is none yet. Raises EndOfData after the last."""

    def give_back(self, requests: Sequence[FetchRequest]) -> None:
        """These were not fetched, and are to be dealt again."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What the workers of a source share.

    Attributes:
        source: its name.
        start: how processes are started.
        preload: modules that the fork server imports.
        restarts: how many deaths within a minute are made good.
        fetch_timeout_s: how long a call may take.
        keep_blocks: free blocks kept.
        job: makes what a worker is sent first.
        requests: deals requests; None: a plain function is called.
        function: has the `batch_size` for calls of a plain function.
        specs: returns the specs of the source, once they are known.
        idle: waits so many seconds, or until the run ends.
        ended: whether the run has ended.
        count_restart: told each restart.
    """

    source: str
    start: StartMethod
    preload: Sequence[str]
    restarts: int
    fetch_timeout_s: float | None
    keep_blocks: int
    job: Callable[[int], Job]
    requests: Requests | None
    function: Any
    specs: Callable[[], Sequence[ArraySpec] | None]
    idle: Callable[[float], object]
    ended: Callable[[], bool]
    count_restart: Callable[[], object]
