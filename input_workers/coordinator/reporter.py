"""Log lines and calls of external loggers with the numbers of a source, every 60 s and at stop."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from input_workers.fetchers.threads import join_threads

if TYPE_CHECKING:
    from input_workers.coordinator.source_core import SourceCore
    from input_workers.metrics.snapshot import SourceStats

__all__ = ["INTERVAL_SECONDS", "LoggerFeed", "Ticker", "log_line"]

log = logging.getLogger("input_workers")

INTERVAL_SECONDS = 60.0


class Ticker:
    """Calls a function every `interval_s`, in a daemon thread of its own, and once more when it is stopped."""

    def __init__(self, name: str, tick: Callable[[], None], interval_s: float | None = None) -> None:
        self._tick = tick
        self._interval_s = INTERVAL_SECONDS if interval_s is None else interval_s
        self._stop: queue.SimpleQueue[None] = queue.SimpleQueue()  # its put may also be called by a finalizer
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def _run(self) -> None:
        stopping = False
        while not stopping:
            try:
                self._stop.get(timeout=self._interval_s)
                stopping = True
            except queue.Empty:
                pass
            self._tick()

    def request_stop(self) -> None:
        """Ask for the last call."""
        self._stop.put(None)

    def join(self, deadline: float) -> list[tuple[str, str]]:
        """Wait for it until `time.monotonic()` reaches the deadline; return (name, stack) if it hangs."""
        return join_threads([self._thread], deadline) if self._thread.ident is not None else []


def log_line(core: SourceCore) -> None:
    """Write the numbers of a source to the log."""
    stats = core.stats()
    window = stats.windows["run" if stats.verdict in ("starting", "stopped") else "60s"]
    log.info(
        "source %r: %.1f inputs/sec, %.1f batches not sent yet, %s; %s: %s",
        core.settings.name,
        stats.inputs_per_second,
        stats.queue_depth,
        stats.ledger,
        window.verdict,
        window.verdict_text,
    )


class LoggerFeed:
    """Gives an external logger the numbers of its interval. Whatever the logger does disturbs nobody else."""

    def __init__(self, core: SourceCore, logger: Any) -> None:
        self._core = core
        self._logger = logger
        self._since = time.monotonic()
        self._before = self._sums(core.stats())
        self._put_before = core.recorder.put_metrics()

    @staticmethod
    def _sums(stats: SourceStats) -> dict[str, float]:
        sends = [device.send for device in stats.devices.values()]
        return {
            "rows": stats.rows_delivered,
            "fetcher_time": stats.fetch.seconds,
            "fetcher_time_count": stats.fetch.count,
            "enqueue_time": sum(send.seconds for send in sends),
            "enqueue_time_count": sum(send.count for send in sends),
        }

    def tick(self) -> None:
        """Call the logger once."""
        now, stats, put = time.monotonic(), self._core.stats(), self._core.recorder.put_metrics()
        sums = self._sums(stats)
        elapsed = now - self._since
        metrics: dict[str, float] = {
            "inputs_per_sec": (sums["rows"] - self._before["rows"]) / elapsed if elapsed > 0 else 0.0,
            "queue_size": stats.queue_depth,
            "time_elapsed": elapsed,
        }
        for key in sums.keys() - {"rows"}:
            metrics[key] = sums[key] - self._before[key]
        for key, (total, times) in put.items():
            total_before, times_before = self._put_before.get(key, (0.0, 0))
            metrics[key] = total - total_before
            if times:
                metrics[f"{key}_count"] = times - times_before
        self._since, self._before, self._put_before = now, sums, put
        try:
            self._logger.log(metrics)
        except BaseException:  # SystemExit too: it would end the logger's thread in silence
            log.exception("source %r: the external logger %r raised", self._core.settings.name, type(self._logger).__name__)
