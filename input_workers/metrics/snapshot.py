"""Frozen numbers of an input source, made from its counters when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

__all__ = [
    "DeviceStats",
    "HistogramStats",
    "Reading",
    "SourceStats",
    "StageShares",
    "StopReport",
    "StuckThread",
    "WindowStats",
    "WorkerStats",
]


@dataclass(frozen=True, slots=True)
class HistogramStats:
    """Durations: how many calls fell under each bound, and their sum in seconds."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]  # one more than bounds: the last is above all of them
    seconds: float

    @property
    def count(self) -> int:
        """How many durations there were."""
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class DeviceStats:
    """What one device got."""

    rows_delivered: int
    batches_delivered: int
    rows_padded: int
    queue_depth: int  # batches on the device, waiting for the trainer
    inputs_per_second: float  # rows delivered, over the last ten seconds
    wait_seconds: float  # the trainer's, for batches of this device
    send: HistogramStats  # sending a batch to the device


@dataclass(frozen=True, slots=True)
class StageShares:
    """Where the time of a stage went: shares of 1, which add up to 1 where the stage was there all the time."""

    busy: float  # at work; near 1: this stage is as fast as it can be
    starved: float  # nothing to do: what comes before it is slower, or has no data
    blocked: float  # no room for what it has: what comes after it is slower


@dataclass(frozen=True, slots=True)
class WindowStats:
    """Who waited for whom in the last seconds, or since the first batch of the run."""

    seconds: float  # how long it is: shorter than its name says where the run is younger
    trainer_wait: float  # share of the trainer's time (mean of the devices) without a batch; under 0.05: input is ahead
    fetchers: StageShares  # busy in calls of the fetch function, failed ones too, and copying rows into batches; starved
    # without data; blocked because no batch has room, or it is another's turn; their mean
    fetchers_alive: float  # how many there were, on the average
    fetcher_cores: float  # processor cores that fetchers used; near 1 with several threads busy: they take turns (GIL). A
    # worker process counts with all its threads, and with the thread here that serves it: as a thread does that fetches itself
    enqueuer: StageShares  # busy laying out batches and sending them; starved without full ones; blocked without room on a
    # device
    feed: float  # share of the time inside the feed's send; it is part of the enqueuer's busy time
    device_queue_depth: float  # batches on the devices, the mean over time; near 0: the trainer takes them at once
    rows_per_second: float  # rows delivered
    batches: int  # delivered
    batches_not_ready: int  # of these, received before their copy to the device was done
    copying: float = 0.0  # share of the fetchers' time that went into copying rows into batches; part of their busy time
    batches_per_call: float = 0.0  # rows that a call of the fetch function returned, the mean, in batches
    verdict: str = ""  # as in SourceStats, of this window
    verdict_text: str = ""


class Reading(NamedTuple):
    """Sums at one moment of a run: what happened between two is their difference."""

    at: float  # seconds, of no meaning but their difference
    rows_delivered: float  # since the source was made
    trainer_wait_seconds: float  # since the source was made, all its trainers together
    device_queue_depth: float  # batches on the devices, the mean since the reading before


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """What one worker does, and has done since the source was started. The trainer's own thread is worker 0 without others."""

    state: Literal["fetching", "blocked", "idle", "ended"]  # blocked: all batches are full; idle: no data, or a pause
    seconds: float  # that it has been fetching or blocked for; else 0
    request: int | None  # of a Stream: what it fetches
    rows: int
    errors: int  # failed calls


@dataclass(frozen=True, slots=True)
class SourceStats:
    """A source's numbers since it was made. Counters never fall; rows are rows, not chunks."""

    rows_fetched: int  # rows of valid chunks, from the moment when a fetcher begins to copy them
    rows_delivered: int  # rows the trainer got
    rows_in_flight: int  # fetched, and neither delivered nor dropped yet
    rows_dropped: Mapping[str, int]  # by reason: final_partial, stopped, skipped_error, device_error
    rows_padded: int  # rows added to fill a last batch; in none of the other counts
    batches_delivered: int
    inputs_per_second: float  # rows delivered a second, over the last ten
    queue_depth: float  # rows in batches that are not sent yet, in batches: 0 means that fetching is the bottleneck
    queue_bytes: int  # of these rows
    block_bytes: int  # shared memory of chunks from worker processes: free, being written, being copied, or held by the trainer
    device_queue_depth: int  # batches on the devices: 0 means that the trainer waits
    fetch_errors: Mapping[str, int]  # by the error's type
    quarantine: tuple[Any, ...]
    fetchers_alive: int
    fetcher_restarts: int
    fetcher_busy_seconds: float  # in the fetch function, calls that raised too, or copying; all fetchers together
    fetcher_blocked_seconds: float  # waiting because all batches are full: input is ahead
    enqueuer_busy_seconds: float  # sending batches: the sum of `send` of all devices
    enqueuer_blocked_seconds: float  # waiting for room on a device: the trainer is the bottleneck
    consumer_wait_seconds: float  # the trainer's, for a batch
    batches_not_ready: int  # received before the copy to the device was done
    verdict: str  # trainer, fetch, enqueue, feed, starting or stopped: who is the bottleneck, in the last ten seconds
    devices: Mapping[str, DeviceStats]
    fetch: HistogramStats = field(repr=False)  # the calls of the fetch function that did not raise
    fetcher_copying_seconds: float = 0.0  # of the busy seconds, those of copying rows into batches
    verdict_text: str = ""  # the verdict in a sentence, with what to do; of a source that was stopped, over the whole run
    windows: Mapping[str, WindowStats] = field(default_factory=dict, repr=False)  # by "10s", "60s" and "run"
    fetch_parts: Mapping[str, HistogramStats] = field(default_factory=dict, repr=False)  # by name, what `timed` measured
    workers: Mapping[int, WorkerStats] = field(default_factory=dict, repr=False)  # by id; none of a source that was stopped
    history: tuple[Reading, ...] = field(default=(), repr=False)  # of the last five minutes of the run, five seconds apart

    @property
    def ledger(self) -> str:
        """Where the rows went, in one line."""
        dropped = ", ".join(f"{rows} {reason}" for reason, rows in self.rows_dropped.items() if rows)
        return (
            f"{self.rows_fetched} rows fetched = {self.rows_delivered} delivered + {self.rows_in_flight} in flight + "
            f"{sum(self.rows_dropped.values())} dropped{f' ({dropped})' if dropped else ''}"
        )


@dataclass(frozen=True, slots=True)
class StuckThread:
    """A thread that did not end in time, and where it was."""

    name: str
    stack: str


@dataclass(frozen=True, slots=True)
class StopReport:
    """How a stop went."""

    ended: bool  # every thread ended
    stuck: tuple[StuckThread, ...] = ()
    failures: Mapping[str, str] = field(default_factory=dict)  # by source: why it broke, or what was wrong with its end
    ledgers: Mapping[str, str] = field(default_factory=dict)  # by source
    seconds: float = 0.0
