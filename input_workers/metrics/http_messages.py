"""Requests over HTTP, checked, and answers as bytes; with the limits that clients are held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from input_workers.errors import ConfigError

try:
    from waitress.parser import HTTPRequestParser, ParsingError
    from waitress.task import Task
    from waitress.utilities import BadRequest, Error, build_http_date
except ImportError as error:
    raise ConfigError(f"serving metrics needs waitress ({error}); pip install waitress") from error

__all__ = ["LIMITS", "Answer", "Busy", "Limits", "Page", "Request"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may take. Prometheus waits 10 s for a scrape, and asks every 15 to 60 s."""

    request_seconds: float = 5.0  # from the first byte of a request, or a new connection, to its last
    answer_seconds: float = 10.0  # to take an answer
    idle_seconds: float = 60.0  # between two requests of a connection
    tick_seconds: float = 0.5  # how exact those are
    connections: int = 256  # one more closes the one that has been silent for longest
    in_flight: int = 40  # requests that wait for their answer; others get 503
    unread_bytes: int = 16 << 20  # answers that were not taken yet, all together; then the slowest client is dropped
    backlog: int = 1024
    headers: int = 100
    header_bytes: int = 16 << 10
    close_seconds: float = 5.0


LIMITS = Limits()

FIRST_BYTES = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ\r\n")


class MethodNotAllowed(Error):  # type: ignore[misc]
    """405."""

    code = 405
    reason = "Method Not Allowed"

    def to_response(self, ident: str | None = None) -> tuple[str, list[tuple[str, str]], bytes]:
        """Return status, headers and body."""
        status, headers, body = super().to_response(ident)
        return status, [*headers, ("Allow", "GET, HEAD")], body


class Busy(Error):  # type: ignore[misc]
    """503."""

    code = 503
    reason = "Service Unavailable"


class Request(HTTPRequestParser):  # type: ignore[misc]
    """GET and HEAD of HTTP 1.0 and 1.1, without a body; all else is an error before any of it is kept."""

    def received(self, data: bytes) -> int:
        """Take some bytes; return how many."""
        if not self.header_plus and data[0] not in FIRST_BYTES:  # TLS, or anything binary
            super().parse_header(b"GET / HTTP/1.0\r\n")
            self._refuse(BadRequest("this is not HTTP"))
            self.completed = True
            return len(data)
        return int(super().received(data))

    def parse_header(self, header_plus: bytes) -> None:
        """Read the first line and the headers."""
        if sum(map(bool, header_plus.split(b"\r\n"))) - 1 > LIMITS.headers:
            raise ParsingError(f"more than {LIMITS.headers} headers")
        super().parse_header(header_plus)
        if self.version not in ("1.0", "1.1"):
            raise ParsingError("this is not HTTP 1.0 or 1.1")
        if self.command not in ("GET", "HEAD"):
            self._refuse(MethodNotAllowed("wanted GET or HEAD"))
        elif self.content_length or self.chunked:
            self._refuse(BadRequest("a body is not wanted"))

    def _refuse(self, error: Error) -> None:
        self.error = error
        self.body_rcv = None
        self.content_length = 0
        self.chunked = self.expect_continue = False


class Page(NamedTuple):
    """What is answered. `headers` come besides those that every answer has."""

    status: str
    content_type: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


class Answer(Task):  # type: ignore[misc]
    """The answer to a good request, in one write. (Waitress' own, of a WSGI application, takes as long as the page.)"""

    def execute(self) -> None:
        """Make and send it."""
        wants = self.request.headers
        page: Page = self.channel.server.application(self.request.path, wants.get("ACCEPT", ""))
        connection = wants.get("CONNECTION", "").lower()
        self.close_on_finish = connection == "close" if self.version == "1.1" else connection != "keep-alive"
        lines = [
            f"HTTP/{self.version} {page.status}",
            "Cache-Control: no-store",
            f"Connection: {'close' if self.close_on_finish else 'keep-alive'}",
            f"Content-Length: {len(page.body)}",
            f"Content-Type: {page.content_type}",
            f"Date: {build_http_date(self.start_time)}",
            "X-Content-Type-Options: nosniff",
            *(f"{name}: {value}" for name, value in page.headers),
        ]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        self.wrote_header = True
        self.channel.write_soon(head if self.request.command == "HEAD" else head + page.body)
