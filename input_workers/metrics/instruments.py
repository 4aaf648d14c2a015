"""Table of all metrics: names, help texts, and how each is read from a source's numbers. Dashboards are checked against it.

Beside it are served prometheus_client's numbers of the process, `process_...`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from input_workers.metrics.snapshot import HistogramStats, SourceStats
from input_workers.metrics.verdict import VERDICTS

__all__ = ["INSTRUMENTS", "STATES", "Instrument"]

# The words of a source's condition, as /healthz has them.
STATES = ("new", "running", "finished", "stopped", "failed", "stalled")

# The values of the labels after `source`, and the number.
Sample: TypeAlias = "tuple[tuple[str, ...], float | HistogramStats]"


@dataclass(frozen=True, slots=True)
class Instrument:
    """A metric family.

    Attributes:
        name: as Prometheus shows it; a counter's ends in _total.
        kind: what may be asked of it.
        text: its help line.
        labels: `source` first. `device` is a key of `SourceStats.devices`; "" where a sample is not about a device.
        read: returns the samples of a source, from its stats and the word for its condition, of STATES.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...]
    read: Callable[[SourceStats, str], Iterable[Sample]]


def _queue_depth(stats: SourceStats, _: str) -> Iterable[Sample]:
    yield ("chunks", ""), stats.queue_depth
    for name, device in stats.devices.items():
        yield ("device", name), device.queue_depth


def _stage_share(stats: SourceStats, _: str) -> Iterable[Sample]:
    window = stats.windows["10s"]
    yield ("trainer", "starved"), window.trainer_wait
    for stage, shares in (("fetchers", window.fetchers), ("enqueuer", window.enqueuer)):
        yield (stage, "busy"), shares.busy
        yield (stage, "starved"), shares.starved
        yield (stage, "blocked"), shares.blocked
    yield ("copying", "busy"), window.copying
    yield ("feed", "busy"), window.feed


INSTRUMENTS = (
    Instrument(
        "input_workers_rows_fetched_total",
        "counter",
        "Rows of valid chunks that the fetch function returned.",
        ("source",),
        lambda stats, _: [((), stats.rows_fetched)],
    ),
    Instrument(
        "input_workers_rows_delivered_total",
        "counter",
        "Rows that the trainer got.",
        ("source", "device"),
        lambda stats, _: [((name,), device.rows_delivered) for name, device in stats.devices.items()],
    ),
    Instrument(
        "input_workers_rows_dropped_total",
        "counter",
        "Rows that were fetched and will not be delivered, by reason.",
        ("source", "reason"),
        lambda stats, _: [((reason,), rows) for reason, rows in stats.rows_dropped.items()],
    ),
    Instrument(
        "input_workers_batches_total",
        "counter",
        "Batches that the trainer got.",
        ("source", "device"),
        lambda stats, _: [((name,), device.batches_delivered) for name, device in stats.devices.items()],
    ),
    Instrument(
        "input_workers_inputs_per_second",
        "gauge",
        "Rows delivered a second, over the last ten seconds.",
        ("source", "device"),
        lambda stats, _: [((name,), device.inputs_per_second) for name, device in stats.devices.items()],
    ),
    Instrument(
        "input_workers_queue_depth",
        "gauge",
        "Batches that wait: queue=chunks, those that are not sent yet, by their rows (0: fetching is the bottleneck); "
        "queue=device, those on the device (0: the trainer waits).",
        ("source", "queue", "device"),
        _queue_depth,
    ),
    Instrument(
        "input_workers_queue_bytes",
        "gauge",
        "Bytes of rows in batches that are not sent yet.",
        ("source",),
        lambda stats, _: [((), stats.queue_bytes)],
    ),
    Instrument(
        "input_workers_block_bytes",
        "gauge",
        "Shared memory of chunks from worker processes: free, being written, being copied, or held by the trainer.",
        ("source",),
        lambda stats, _: [((), stats.block_bytes)],
    ),
    Instrument(
        "input_workers_fetch_seconds",
        "histogram",
        "Duration of the calls of the fetch function that did not raise.",
        ("source",),
        lambda stats, _: [((), stats.fetch)],
    ),
    Instrument(
        "input_workers_enqueue_seconds",
        "histogram",
        "Duration of sending a batch to its device.",
        ("source", "device"),
        lambda stats, _: [((name,), device.send) for name, device in stats.devices.items()],
    ),
    Instrument(
        "input_workers_consumer_wait_seconds_total",
        "counter",
        "Seconds that the trainer waited for a batch.",
        ("source", "device"),
        lambda stats, _: [((name,), device.wait_seconds) for name, device in stats.devices.items()],
    ),
    Instrument(
        "input_workers_fetcher_blocked_seconds_total",
        "counter",
        "Seconds that fetchers waited for room in the batches, all fetchers together: input is ahead.",
        ("source",),
        lambda stats, _: [((), stats.fetcher_blocked_seconds)],
    ),
    Instrument(
        "input_workers_fetcher_copying_seconds_total",
        "counter",
        "Seconds that fetchers copied rows into batches, all fetchers together.",
        ("source",),
        lambda stats, _: [((), stats.fetcher_copying_seconds)],
    ),
    Instrument(
        "input_workers_fetch_errors_total",
        "counter",
        "Calls of the fetch function that failed, by the error's type.",
        ("source", "error"),
        lambda stats, _: [((error,), count) for error, count in stats.fetch_errors.items()],
    ),
    Instrument(
        "input_workers_fetchers",
        "gauge",
        "Fetchers, by state.",
        ("source", "state"),
        lambda stats, _: [(("alive",), stats.fetchers_alive)],
    ),
    Instrument(
        "input_workers_fetcher_restarts_total",
        "counter",
        "Fetchers that died or hung and were started again.",
        ("source",),
        lambda stats, _: [((), stats.fetcher_restarts)],
    ),
    Instrument(
        "input_workers_fetch_part_seconds",
        "histogram",
        "Duration of the parts of the fetch function that it has timed.",
        ("source", "part"),
        lambda stats, _: [((name,), part) for name, part in stats.fetch_parts.items()],
    ),
    Instrument(
        "input_workers_stage_share",
        "gauge",
        "Share of its time that a stage was busy, starved (waiting for what comes before it) or blocked (no room after it), "
        "over the last ten seconds. Copying is part of the fetchers' busy time, the feed of the enqueuer's.",
        ("source", "stage", "state"),
        _stage_share,
    ),
    Instrument(
        "input_workers_verdict",
        "gauge",
        "1 for the bottleneck of now: trainer (input is ahead), fetch, enqueue or feed; or starting, stopped.",
        ("source", "verdict"),
        lambda stats, _: [((verdict,), float(verdict == stats.verdict)) for verdict in VERDICTS],
    ),
    Instrument(
        "input_workers_state",
        "gauge",
        "1 for the condition of a source: new, running, finished, stopped; failed or stalled (a trainer waits, and nothing "
        "comes), of which /healthz complains.",
        ("source", "state"),
        lambda _, state: [((each,), float(each == state)) for each in STATES],
    ),
)
