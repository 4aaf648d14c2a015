"""Metrics server: the numbers of all sources of a coordinator over HTTP, in Prometheus' format."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import socket
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Self

from input_workers.coordinator.data_input_coordinator import DataInputCoordinator
from input_workers.coordinator.global_coordinator import GlobalCoordinator
from input_workers.coordinator.init import global_coordinator
from input_workers.errors import ConfigError
from input_workers.metrics.http_messages import Page
from input_workers.metrics.instruments import INSTRUMENTS, Instrument, Sample
from input_workers.metrics.pages import Pages
from input_workers.metrics.server import HttpServer
from input_workers.metrics.snapshot import HistogramStats

try:
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.process_collector import ProcessCollector
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ConfigError(f"metrics need prometheus_client ({error}); pip install prometheus-client") from error

__all__ = ["MetricsServer", "StatsCollector", "serve_metrics"]

log = logging.getLogger("input_workers")

OPENMETRICS = "application/openmetrics-text"

# Different errors that a source names in its labels; further ones are counted together, as OTHER.
MOST_ERRORS = 50
OTHER = "other"

NOT_FINITE = {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}
LABEL_FORMS = ["%s" + "".join(f',{label}="%s"' for label in each.labels[1:]) for each in INSTRUMENTS]
LABELS = "\0"  # stands for them in the form of a histogram


def serve_metrics(
    port: int = 9108,
    host: str = "127.0.0.1",
    coordinator: GlobalCoordinator | None = None,
    *,
    rank: int | str | None = None,
    stalled_after_s: float = 60.0,
) -> MetricsServer:
    """Serve the numbers of every source of a coordinator, until the server is closed.

    `/` is a live page for people, which needs nothing from elsewhere. `/metrics` is for Prometheus, with the memory and
    processor time of this process. `/healthz` is 200 while every source that was started makes progress, has finished or
    was stopped by its user; otherwise 503, with the reasons.
    `/status.json` is all that `stats()` says, of every source.

    Nothing is counted for it: the numbers are read from `stats()` when they are asked for, so it costs nothing between
    scrapes. Sources that are added later appear by themselves. The coordinator is not kept alive by it.

    There is no encryption and no authentication: whoever reaches the port can read the numbers, the names of the sources
    and the messages of errors. Let a reverse proxy do both where that is more than this machine. Clients that are slow,
    many or hostile cost little: 5 s for a request, 10 s to take the answer, 256 connections, 40 requests at once.

    Args:
        port: 0 takes a free one; see the server's `port`.
        host: the address to listen on; "0.0.0.0" lets everybody in who reaches this machine.
        coordinator: by default `iw.global_coordinator`.
        rank: of this process, where several on a machine serve on ports of their own: a label `rank` of every metric.
            "auto" reads the environment variable RANK.
        stalled_after_s: a source is stalled, and `/healthz` complains, if a trainer asked for a batch so many seconds ago,
            got none, and none has come since. A trainer that does not ask is not waited for.

    Returns:
        The server, with `url`, `port` and `close()`; a context manager.

    Raises:
        ConfigError: the port is taken, the address or an argument is wrong, or prometheus_client or waitress is not
            installed.
    """
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
        raise ConfigError(f"port: got {port!r}; wanted a whole number from 0 to 65535")
    if coordinator is not None and not isinstance(coordinator, GlobalCoordinator):
        raise ConfigError(f"coordinator: got {type(coordinator).__qualname__}; wanted a GlobalCoordinator")
    if isinstance(stalled_after_s, bool) or not isinstance(stalled_after_s, (int, float)) or not stalled_after_s > 0:
        raise ConfigError(f"stalled_after_s: got {stalled_after_s!r}; wanted seconds above 0 (inf: never)")
    label = _rank(rank)
    collector = StatsCollector(global_coordinator if coordinator is None else coordinator, label, stalled_after_s)
    process = ProcessNumbers(label)
    # The content type is chosen among two, by words of our own: it would repeat what the client wrote.
    formats = {accept: _page_maker(collector, process, accept) for accept in (OPENMETRICS, "")}
    sock = _listening_socket(host, port)
    try:
        server = HttpServer(Pages(collector.sources, formats, label, stalled_after_s), sock)
    except BaseException:
        sock.close()
        raise
    return MetricsServer(server, host, sock.getsockname()[1])


def _rank(rank: int | str | None) -> str | None:
    if rank == "auto":
        text = os.environ.get("RANK", "")
        if not text:
            raise ConfigError('rank="auto": the environment variable RANK is not set; wanted the rank of this process')
        return text
    if rank is None or (isinstance(rank, (int, str)) and not isinstance(rank, bool) and rank != ""):
        return None if rank is None else _text(str(rank))
    raise ConfigError(f'rank: got {rank!r}; wanted a number, a text, "auto" or None')


def _page_maker(collector: StatsCollector, process: ProcessNumbers, accept: str) -> Callable[[], Page]:
    _, content_type = choose_encoder(accept)
    openmetrics = accept == OPENMETRICS

    def make() -> Page:
        return Page("200 OK", content_type, (process.text(openmetrics) + collector.text(openmetrics)).encode())

    return make


def _listening_socket(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind, proto)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen()
        except BaseException:
            sock.close()
            raise
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"metrics on {host} port {port}: {error}; wanted a free port (0 takes one) and an address of this machine"
        ) from error
    return sock


class MetricsServer:
    """The server, until it is closed. A context manager.

    Attributes:
        host: the address it listens on.
        port: the port, also where 0 was asked for.
    """

    def __init__(self, server: HttpServer, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self._server = server

    @property
    def url(self) -> str:
        """Where it is, without a path: "http://127.0.0.1:9108"."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    def close(self) -> None:
        """Close the port and every connection, and end the threads; it takes 5 s at most. Idempotent."""
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class ProcessNumbers:
    """prometheus_client's numbers of this process, with its rank, if it has one; none where the system has no /proc."""

    def __init__(self, rank: str | None) -> None:
        self._labels = "" if rank is None else f'{{rank="{_escaped(rank)}"}}'
        self._collector = ProcessCollector(registry=None)

    def text(self, openmetrics: bool) -> str:
        """Return every family with the samples of this moment."""
        lines = []
        for family in self._collector.collect():
            name = family.name + "_total" * (family.type == "counter" and not openmetrics)
            lines.append(f"# HELP {name} {family.documentation}\n# TYPE {name} {family.type}\n")
            lines += [f"{sample.name}{self._labels} {_number(sample.value)}\n" for sample in family.samples]
        return "".join(lines)


class StatsCollector(Collector):
    """Reads the stats of a coordinator's sources, once for each scrape. A source that cannot be read is left out.

    It holds the coordinator weakly: one that nobody else holds is gone, and its sources with it.
    """

    def __init__(self, coordinator: GlobalCoordinator, rank: str | None = None, stalled_after_s: float = 60.0) -> None:
        self._coordinator = weakref.ref(coordinator)
        self._rank = rank
        self._stalled_after_s = stalled_after_s
        self._unreadable: set[str] = set()
        self._errors: dict[str, set[str]] = {}  # by source: the first MOST_ERRORS

    def sources(self) -> list[DataInputCoordinator]:
        """Return the sources of this moment."""
        coordinator = self._coordinator()
        return list(coordinator) if coordinator is not None else []

    def describe(self) -> Iterable[Metric]:
        """Return the families without samples: registering reads no source."""
        return [self._family(instrument) for instrument in INSTRUMENTS]

    def collect(self) -> Iterator[Metric]:
        """Return every family with the samples of this moment."""
        families = [self._family(instrument) for instrument in INSTRUMENTS]
        ends = [] if self._rank is None else [self._rank]
        for name, read in self._read():
            for family, samples in zip(families, read, strict=True):
                for labels, value in samples:
                    texts = [_text(name), *map(_text, labels), *ends]
                    if isinstance(family, HistogramMetricFamily):
                        assert isinstance(value, HistogramStats)  # noqa: S101  by the table
                        family.add_metric(texts, _buckets(value), value.seconds)
                    else:
                        assert not isinstance(value, HistogramStats)  # noqa: S101
                        family.add_metric(texts, value)
        yield from families

    def text(self, openmetrics: bool) -> str:
        """Return what prometheus_client makes of `collect()`, in a third of its time: a scrape takes it from the trainer."""
        lines: list[list[str]] = [[] for _ in INSTRUMENTS]
        rank = "" if self._rank is None else f',rank="{_escaped(self._rank)}"'
        for name, read in self._read():
            start = f'source="{_escaped(name)}"{rank}'
            for instrument, form, mine, samples in zip(INSTRUMENTS, LABEL_FORMS, lines, read, strict=True):
                for labels, value in samples:
                    told = form % (start, *map(_escaped, labels))
                    if isinstance(value, HistogramStats):
                        text = _histogram_form(instrument.name, value.bounds).replace(LABELS, told.replace("%", "%%"))
                        totals = [*itertools.accumulate(value.counts)]
                        mine.append(text % (*totals, totals[-1], _number(value.seconds)))
                    else:
                        mine.append(f"{instrument.name}{{{told}}} {_number(value)}\n")
        for instrument, mine in zip(INSTRUMENTS, lines, strict=True):
            name = instrument.name.removesuffix("_total") if openmetrics else instrument.name
            mine.insert(0, f"# HELP {name} {instrument.text}\n# TYPE {name} {instrument.kind}\n")
        return "".join([*itertools.chain.from_iterable(lines), "# EOF\n" if openmetrics else ""])

    def _read(self) -> Iterator[tuple[str, list[list[Sample]]]]:
        """Return name and samples of every source that can be read."""
        sources = self.sources()
        names = {source.name for source in sources}
        self._unreadable &= names
        self._errors = {name: errors for name, errors in self._errors.items() if name in names}
        for source in sources:
            samples = self._samples(source)
            if samples:
                yield source.name, samples

    def _samples(self, source: DataInputCoordinator) -> list[list[Sample]]:
        """Return the samples of every family, in order; nothing if they cannot be read."""
        try:
            stats = source.stats()
            state = source.condition(self._stalled_after_s).state
            samples = [list(instrument.read(stats, state)) for instrument in INSTRUMENTS]
        except Exception:
            if source.name not in self._unreadable:  # once, not at every scrape
                log.exception("source %r: its numbers cannot be read, and are left out", source.name)
            self._unreadable.add(source.name)
            return []
        self._unreadable.discard(source.name)
        return [
            self._few_errors(source.name, mine) if instrument.labels == ("source", "error") else mine
            for instrument, mine in zip(INSTRUMENTS, samples, strict=True)
        ]

    def _few_errors(self, name: str, samples: list[Sample]) -> list[Sample]:
        """Return the samples by kind of error; what is not among the first kinds is added up. No sum ever falls."""
        known = self._errors.setdefault(name, set())
        kept: list[Sample] = []
        others = 0.0
        for labels, value in samples:
            assert not isinstance(value, HistogramStats)  # noqa: S101
            if len(known) < MOST_ERRORS:
                known.add(labels[0])
            if labels[0] in known and labels[0] != OTHER:
                kept.append((labels, value))
            else:
                others += value
        return [*kept, ((OTHER,), others)] if others else kept

    def _family(self, instrument: Instrument) -> CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily:
        name, text = instrument.name, instrument.text
        labels = instrument.labels if self._rank is None else (*instrument.labels, "rank")
        if instrument.kind == "counter":
            return CounterMetricFamily(name, text, labels=labels)
        if instrument.kind == "gauge":
            return GaugeMetricFamily(name, text, labels=labels)
        return HistogramMetricFamily(name, text, labels=labels)


def _text(label: str) -> str:
    return label.encode("utf-8", "backslashreplace").decode("utf-8")  # a lone surrogate cannot be sent


def _number(value: float) -> str:
    text = repr(float(value))
    return NOT_FINITE.get(text, text)


@functools.lru_cache(1024)
def _escaped(label: str) -> str:
    return _text(label).replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _buckets(histogram: HistogramStats) -> list[tuple[str, float]]:
    """Return (upper bound, how many were not above it)."""
    return list(zip(_bounds(histogram.bounds), itertools.accumulate(map(float, histogram.counts)), strict=True))


def _bounds(bounds: tuple[float, ...]) -> list[str]:
    return [*map(str, bounds), "+Inf"]


@functools.lru_cache(8)
def _histogram_form(name: str, bounds: tuple[float, ...]) -> str:
    """Return the lines of a histogram, with LABELS for its labels and % for its numbers."""
    buckets = "".join(f'{name}_bucket{{{LABELS},le="{le}"}} %d.0\n' for le in _bounds(bounds))
    return f"{buckets}{name}_count{{{LABELS}}} %d.0\n{name}_sum{{{LABELS}}} %s\n"
