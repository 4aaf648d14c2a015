"""Pages of the metrics server: `/`, `/metrics`, `/healthz`, `/status.json`."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from input_workers import __version__
from input_workers.coordinator.condition import Condition
from input_workers.coordinator.data_input_coordinator import DataInputCoordinator
from input_workers.metrics.http_messages import Page
from input_workers.metrics.snapshot import Reading
from input_workers.metrics.status_page import status_page

__all__ = ["Pages", "ShortMemory"]

log = logging.getLogger("input_workers")

# A page is made anew for each request, but where more are asked for in a second, some get one that is this old.
PAGES_PER_SECOND = 10
MOST_OLD_SECONDS = 0.1

MAX_REASON_CHARS = 500
KEPT_OF_A_LIST = 20  # of what was skipped, the latest: `quarantine` may hold a megabyte


Sources: TypeAlias = "Callable[[], Iterable[DataInputCoordinator]]"


class ShortMemory:
    """Makes something one at a time. Those who waited for it meanwhile get the same; under a flood it is a little old."""

    # Invariant under _lock: `_page` was begun at `_begun`; `_times` are the last times that it was made.

    def __init__(self, make: Callable[[], Page]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._page: Page | None = None
        self._begun = -math.inf
        self._times: collections.deque[float] = collections.deque([-math.inf] * PAGES_PER_SECOND, PAGES_PER_SECOND)

    def get(self) -> Page:
        """Return the page as it was at some moment since this was called; or, in a flood, shortly before."""
        called = time.monotonic()
        with self._lock:
            now = time.monotonic()
            flood = now - self._times[0] < 1.0
            if self._page is not None and self._begun >= (called - MOST_OLD_SECONDS if flood else called):
                return self._page
            self._times.append(now)
            self._page, self._begun = self._make(), now
            return self._page


class Pages:
    """Answers by path alone: nothing else of a request is looked at, but for the wanted format.

    Args:
        sources: returns the sources of this moment.
        formats: by what Accept must contain, how to make the metrics; "" is for everybody else. In order.
        rank: of this process among its trainers, or None.
        stalled_after_s: see `DataInputCoordinator.condition`.
    """

    def __init__(
        self, sources: Sources, formats: Mapping[str, Callable[[], Page]], rank: str | None, stalled_after_s: float
    ) -> None:
        self._sources = sources
        self._rank = rank
        self._stalled_after_s = stalled_after_s
        self._started = time.monotonic()
        self._metrics = {accept: ShortMemory(make) for accept, make in formats.items()}
        health, status = ShortMemory(self._health), ShortMemory(self._status)
        html, headers = status_page()
        live = Page("200 OK", "text/html; charset=utf-8", html, headers)
        self._pages: dict[str, Callable[[str], Page]] = {
            "/": lambda _: live,
            "/metrics": self._metrics_page,
            "/healthz": lambda _: health.get(),
            "/status.json": lambda _: status.get(),
        }
        self._complained = False

    def __call__(self, path: str, accept: str) -> Page:
        """Return the answer to a request."""
        make = self._pages.get(path)
        try:
            return make(accept) if make is not None else NOT_FOUND
        except Exception:
            if not self._complained:  # once, not at every request
                log.exception("a page of the metrics server cannot be made")
            self._complained = True
            return FAILED

    def _metrics_page(self, accept: str) -> Page:
        return next(memory for wanted, memory in self._metrics.items() if wanted in accept).get()

    def _conditions(self) -> Iterator[tuple[DataInputCoordinator, Condition]]:
        for source in self._sources():
            yield source, source.condition(self._stalled_after_s)

    def _health(self) -> Page:
        lines = [
            _one_line(f"{source.name}: {condition.state}: {condition.reason}")
            for source, condition in self._conditions()
            if not condition.is_healthy
        ]
        text = "\n".join(lines or ["ok"]) + "\n"
        return Page("503 Service Unavailable" if lines else "200 OK", TEXT, text.encode("utf-8", "backslashreplace"))

    def _status(self) -> Page:
        sources = {}
        for source, condition in self._conditions():
            try:
                stats = source.stats()
                numbers = {"ledger": stats.ledger, **plain(stats), "history": _columns(stats.history)}
            except Exception as error:  # the others are shown
                numbers = {"error": f"its numbers cannot be read: {type(error).__name__}"}
            sources[source.name] = {"state": condition.state, "reason": condition.reason[:MAX_REASON_CHARS], **numbers}
        status = {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_seconds": time.monotonic() - self._started,
            "rank": self._rank,
            "sources": sources,
        }
        return Page("200 OK", "application/json", json.dumps(status, allow_nan=False).encode())


TEXT = "text/plain; charset=utf-8"
NOT_FOUND = Page("404 Not Found", TEXT, b"there are /, /metrics, /healthz and /status.json\n")
FAILED = Page("500 Internal Server Error", TEXT, b"this page cannot be made; see the log of the trainer\n")


def plain(value: Any) -> Any:
    """Return numbers, mappings, sequences and dataclasses as JSON has them; what is no finite number is null."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(each) for each in value[-KEPT_OF_A_LIST:]]
    item = getattr(value, "item", None)  # of NumPy's scalars
    return plain(item()) if callable(item) and getattr(value, "ndim", 1) == 0 else str(value)


def _columns(history: Sequence[Reading]) -> dict[str, list[float]]:
    return {name: [round(reading[index], 3) for reading in history] for index, name in enumerate(Reading._fields)}


def _one_line(text: str) -> str:
    return " ".join(text[:MAX_REASON_CHARS].split())
