"""Terminal view of a trainer's numbers, read from its metrics server: a block for each source."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from input_workers.errors import ConfigError, InputWorkersError

__all__ = ["NoAnswer", "frame", "read_status", "show_once", "watch"]

INTERVAL_SECONDS = 1.0
ANSWER_SECONDS = 10.0
MAX_ANSWER_BYTES = 64 << 20

Status = Mapping[str, Any]


class NoAnswer(InputWorkersError):
    """The metrics server does not answer, or is none."""


def read_status(url: str) -> tuple[Status, str]:
    """Return what /status.json says, and its text. Raises NoAnswer, or ConfigError for what is no address."""
    address = _address(url)
    # Straight there: a proxy of the environment's would look for this machine elsewhere.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=ANSWER_SECONDS) as response:
            text = response.read(MAX_ANSWER_BYTES).decode()
    except urllib.error.HTTPError as error:
        with error:
            raise NoAnswer(f"{address}: {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NoAnswer(f"{address}: no answer: {getattr(error, 'reason', None) or error}") from error
    try:
        status = json.loads(text)
    except ValueError as error:
        raise NoAnswer(f"{address}: its answer is no JSON: {error}") from error
    sources = status.get("sources") if isinstance(status, dict) else None
    if not isinstance(sources, dict) or not all(isinstance(source, dict) for source in sources.values()):
        raise NoAnswer(f"{address}: its answer is not that of a metrics server of input-workers")
    return status, text


def _address(url: str) -> str:
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urllib.parse.urlsplit(full)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        usable = False
    if not usable or not full.isprintable() or " " in full:
        raise ConfigError(f"URL: got {url!r}; wanted the address of a metrics server, such as http://127.0.0.1:9108")
    return full if parts.path.endswith("/status.json") else f"{full.rstrip('/')}/status.json"


def show_once(url: str, console: Console) -> None:
    """Print one frame. Raises NoAnswer."""
    console.print(frame(read_status(url)[0]))


def watch(
    url: str, console: Console, pause: Callable[[float], object] | None = None, read: Callable[[str], Any] = read_status
) -> None:
    """Show a frame every second until Ctrl-C. A server that does not answer is asked again."""
    _address(url)
    pause = threading.Event().wait if pause is None else pause
    before: tuple[float, Status] | None = None
    with Live(console=console, auto_refresh=False) as live:
        while True:
            try:
                status, _ = read(url)
                now = time.monotonic()
                shown: RenderableType = frame(status, *((before[1], now - before[0]) if before is not None else ()))
                before = now, status
            except NoAnswer as error:
                before = None
                shown = Text(f"{_clean(error)}; asking again every second, Ctrl-C ends", style="red")
            live.update(shown, refresh=True)
            pause(INTERVAL_SECONDS)


def frame(status: Status, before: Status | None = None, seconds: float = 0.0) -> RenderableType:
    """Return a picture of a status: a block for each source.

    Args:
        status: what /status.json says.
        before: an earlier status; where it is given, waiting and copying are shown as shares of the time since.
        seconds: how much earlier that was.
    """
    rank = "" if status.get("rank") is None else f", rank {_clean(status['rank'])}"
    head = Text(
        f"input-workers {_clean(status.get('version'))}, process {_clean(status.get('pid'))}{rank}, "
        f"serving for {_number(status, 'uptime_seconds'):.0f} s"
    )
    sources = status["sources"]
    earlier = before["sources"] if before is not None else {}
    blocks = [_block(name, source, earlier.get(name), seconds) for name, source in sources.items()]
    return Group(head, *(blocks or [Text("no source")]))


def _block(name: str, source: Status, before: Status | None, seconds: float) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def line(what: str, text: str) -> None:
        table.add_row(what, Text(text))

    state = _clean(source.get("state"))
    reason = _clean(source.get("reason") or "")
    line("state", f"{state}: {reason}" if reason else state)
    if "error" in source:
        line("numbers", _clean(source["error"]))
    else:
        line("rate", f"{_number(source, 'inputs_per_second'):,.1f} rows/s, {_number(source, 'batches_delivered'):,.0f} batches")
        line(
            "queues",
            f"{_number(source, 'queue_depth'):.1f} batches not sent yet ({_number(source, 'queue_bytes') / 2**20:.1f} MiB), "
            f"{_number(source, 'device_queue_depth'):.0f} batches on devices",
        )
        line("ledger", _clean(source.get("ledger")))
        line("waits", ", ".join(f"{who} {_seconds_or_share(source, before, key, seconds)}" for who, key in WAITS))
        line("copying", f"fetchers {_seconds_or_share(source, before, 'fetcher_copying_seconds', seconds)}")
        line("workers", f"{_number(source, 'fetchers_alive'):.0f} alive, {_number(source, 'fetcher_restarts'):.0f} restarts")
        errors = source.get("fetch_errors")
        told = [f"{_clean(error)} {_clean(count)}" for error, count in errors.items()] if isinstance(errors, dict) else []
        line("errors", ", ".join(told) or "none")
        line("verdict", _clean(source.get("verdict")))
    colour = "red" if state in ("failed", "stalled") else "green" if state == "running" else "dim"
    return Panel(table, title=Text(_clean(name)), title_align="left", border_style=colour)


WAITS = (
    ("trainer", "consumer_wait_seconds"),
    ("fetchers", "fetcher_blocked_seconds"),
    ("enqueuer", "enqueuer_blocked_seconds"),
)


def _seconds_or_share(source: Status, before: Status | None, key: str, seconds: float) -> str:
    if before is None or seconds <= 0:
        return f"{_number(source, key):.1f} s"
    share = (_number(source, key) - _number(before, key)) / seconds
    return f"{max(0.0, share):.0%}"


def _number(source: Status, key: str) -> float:
    value = source.get(key)
    return float(value) if isinstance(value, (int, float)) else 0.0


def _clean(value: object) -> str:
    """Return text that a terminal shows and does not obey."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(value)[:2000])
