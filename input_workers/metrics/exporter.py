"""The numbers of all sources of a coordinator go out over HTTP, in Prometheus' format, read when somebody asks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Self

from input_workers.coordinator.global_coordinator import GlobalCoordinator
from input_workers.coordinator.init import global_coordinator
from input_workers.errors import ConfigError
from input_workers.metrics.instruments import INSTRUMENTS, Instrument
from input_workers.metrics.snapshot import HistogramStats, SourceStats

try:
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import start_wsgi_server
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ConfigError(f"metrics need prometheus_client ({error}); pip install prometheus-client") from error

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

__all__ = ["MetricsServer", "StatsCollector", "serve_metrics"]

log = logging.getLogger("input_workers")


def serve_metrics(port: int = 9108, host: str = "127.0.0.1", coordinator: GlobalCoordinator | None = None) -> MetricsServer:
    """Serve the numbers of every source of a coordinator at `/metrics`, until the server is closed.

    Nothing is counted for it: the numbers are read from `stats()` when they are asked for, so it costs nothing between
    scrapes. Sources that are added later appear by themselves.

    Args:
        port: 0 takes a free one; see the server's `port`.
        host: the address to listen on; "0.0.0.0" lets everybody in who reaches this machine.
        coordinator: by default `iw.global_coordinator`.

    Returns:
        The server, with `url`, `port` and `close()`; a context manager.

    Raises:
        ConfigError: the port is taken, the address is wrong, or prometheus_client is not installed.
    """
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
        raise ConfigError(f"port: got {port!r}; wanted a whole number from 0 to 65535")
    if coordinator is not None and not isinstance(coordinator, GlobalCoordinator):
        raise ConfigError(f"coordinator: got {type(coordinator).__qualname__}; wanted a GlobalCoordinator")
    registry = CollectorRegistry()
    registry.register(StatsCollector(global_coordinator if coordinator is None else coordinator))

    try:
        httpd, thread = start_wsgi_server(port, host, registry)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"metrics on {host} port {port}: {error}; wanted a free port (0 takes one) and an address of this machine"
        ) from error
    return MetricsServer(httpd, thread, host)


class MetricsServer:
    """prometheus_client's server, until it is closed. A context manager.

    Attributes:
        host: the address it listens on.
        port: the port, also where 0 was asked for.
    """

    def __init__(self, httpd: WSGIServer, thread: threading.Thread, host: str) -> None:
        self.host = host
        self.port: int = httpd.server_port
        self._httpd = httpd
        self._thread = thread

    @property
    def url(self) -> str:
        """Where it is, without a path: "http://127.0.0.1:9108"."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    def close(self) -> None:
        """Stop listening and end the thread, which takes up to half a second. Idempotent."""
        if self._thread.is_alive():
            self._httpd.shutdown()
            self._thread.join()
        self._httpd.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class StatsCollector(Collector):
    """Reads the stats of a coordinator's sources, once for each scrape. A source that cannot be read is left out."""

    def __init__(self, coordinator: GlobalCoordinator) -> None:
        self._coordinator = coordinator
        self._unreadable: set[str] = set()

    def describe(self) -> Iterable[Metric]:
        """Return the families without samples: registering reads no source."""
        return [_family(instrument) for instrument in INSTRUMENTS]

    def collect(self) -> Iterator[Metric]:
        """Return every family with the samples of this moment."""
        sources = list(self._stats())
        for instrument in INSTRUMENTS:
            family = _family(instrument)
            for name, stats in sources:
                for labels, value in instrument.read(stats):
                    texts = [_text(name), *map(_text, labels)]
                    if isinstance(family, HistogramMetricFamily):
                        assert isinstance(value, HistogramStats)  # noqa: S101  by the table
                        family.add_metric(texts, _buckets(value), value.seconds)
                    else:
                        assert not isinstance(value, HistogramStats)  # noqa: S101
                        family.add_metric(texts, value)
            yield family

    def _stats(self) -> Iterator[tuple[str, SourceStats]]:
        for source in self._coordinator:
            try:
                stats = source.stats()
            except Exception:
                if source.name not in self._unreadable:  # once, not at every scrape
                    log.exception("source %r: its numbers cannot be read, and are left out", source.name)
                self._unreadable.add(source.name)
            else:
                self._unreadable.discard(source.name)
                yield source.name, stats


def _family(instrument: Instrument) -> CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily:
    name, text, labels = instrument.name, instrument.text, instrument.labels
    if instrument.kind == "counter":
        return CounterMetricFamily(name, text, labels=labels)
    if instrument.kind == "gauge":
        return GaugeMetricFamily(name, text, labels=labels)
    return HistogramMetricFamily(name, text, labels=labels)


def _text(label: str) -> str:
    return label.encode("utf-8", "backslashreplace").decode("utf-8")  # a lone surrogate cannot be sent


def _buckets(histogram: HistogramStats) -> list[tuple[str, float]]:
    """Return (upper bound, how many were not above it)."""
    names = [*map(str, histogram.bounds), "+Inf"]
    total = 0
    buckets = []
    for name, count in zip(names, histogram.counts, strict=True):
        total += count
        buckets.append((name, float(total)))
    return buckets
