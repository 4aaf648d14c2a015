"""An HTTP server in a trainer: requests of anybody go in, and whatever they are, it stays small, quick and silent.

Waitress does the work. It has a time-out for inactivity only, so that a client that sends a byte now and then holds a
connection for ever: here every request and every answer has one deadline in all, connections are counted, and nothing that
a client sends makes a log line. There is no TLS and no authentication: a reverse proxy does both.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from input_workers.errors import ConfigError

try:
    from waitress import wasyncore
    from waitress.adjustments import Adjustments
    from waitress.channel import HTTPChannel
    from waitress.parser import HTTPRequestParser, ParsingError
    from waitress.server import TcpWSGIServer
    from waitress.task import ThreadedTaskDispatcher
    from waitress.utilities import BadRequest, Error
except ImportError as error:
    raise ConfigError(f"serving metrics needs waitress ({error}); pip install waitress") from error

__all__ = ["LIMITS", "HttpServer", "Limits"]

log = logging.getLogger("input_workers")

# What clients do is no news: this logger has no parent and no output.
QUIET = logging.Logger("input_workers.http")
QUIET.addHandler(logging.NullHandler())


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

# Two: what only looks at a state does not wait for a page that is being made.
THREADS = 2
# The system's own choice grows to megabytes for each client that does not read.
SEND_BUFFER_BYTES = 64 << 10
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


class Channel(HTTPChannel):  # type: ignore[misc]
    """A connection, with deadlines. All but `service` runs in the thread that listens."""

    parser_class = Request
    logger = QUIET

    def __init__(self, server: HttpServer, sock: socket.socket, addr: Any, adj: Adjustments, map: Any) -> None:  # noqa: A002
        self.served = 0
        self.since = self._partial_since = time.monotonic()
        self._phase = "request", 0
        self._partial: Request | None = None
        super().__init__(server, sock, addr, adj, map=map)

    def service(self) -> None:
        """Answer one request."""
        super().service()
        self.served += 1

    def log_info(self, message: str, type: str = "info") -> None:  # noqa: A002
        """Say nothing."""

    @property
    def is_silent(self) -> bool:
        """Whether the next thing to happen is up to the client, who has nothing to take."""
        return not self.requests and not self.total_outbufs_len

    @property
    def seconds_unread(self) -> float:
        """For how long, to a tick, the client has not taken an answer."""
        return time.monotonic() - self.since if self._phase[0] == "answer" else 0.0

    def is_overdue(self, now: float) -> bool:
        """Whether the client has used up its time for what it does."""
        doing = "answer" if self.total_outbufs_len else "render" if self.requests else "request"
        if self._phase != (doing, self.served):
            self._phase = doing, self.served
            self.since = now
        if self.request is not self._partial:
            self._partial, self._partial_since = self.request, now
        if doing == "answer":
            return now - self.since >= LIMITS.answer_seconds
        if doing == "render":
            return False
        if self.request is not None and now - self._partial_since >= LIMITS.request_seconds:
            return True
        return now - self.since >= (LIMITS.idle_seconds if self.served else LIMITS.request_seconds)


class Renderers(ThreadedTaskDispatcher):  # type: ignore[misc]
    """The threads that make answers, known by name, so that they can be waited for."""

    logger = queue_logger = QUIET

    def __init__(self) -> None:
        super().__init__()
        self.started: list[threading.Thread] = []

    def start_new_thread(self, target: Callable[[int], None], thread_no: int) -> None:
        """Start one."""
        thread = threading.Thread(target=target, name=f"metrics-render-{thread_no}", args=(thread_no,), daemon=True)
        thread.start()
        self.started.append(thread)

    def add_task(self, task: Channel) -> None:
        """Let the next free thread answer a request."""
        with self.lock:
            self.queue.append(task)
            self.queue_cv.notify()


class HttpServer(TcpWSGIServer):  # type: ignore[misc]
    """Serves a WSGI application on a socket that is bound already, until `close`.

    One thread listens, reads and writes; two make answers. None of them ends the process or outlives `close`.
    """

    channel_class = Channel
    logger = QUIET

    def __init__(self, application: Callable[..., Any], sock: socket.socket) -> None:
        self.renderers = Renderers()
        self._closing = self._closed = False
        self._not_before = 0.0  # no connection is accepted
        self._close_lock = threading.Lock()
        sock.listen(LIMITS.backlog)
        adj = Adjustments(
            sockets=[sock],
            backlog=LIMITS.backlog,
            ident=None,
            log_socket_errors=False,
            max_request_header_size=LIMITS.header_bytes,
            outbuf_high_watermark=1 << 40,  # nobody waits in a render for a client that does not read
            outbuf_overflow=1 << 40,  # and nothing goes to a file
            channel_request_lookahead=0,
        )
        sockinfo = (sock.family, sock.type, sock.proto, sock.getsockname())
        map_: dict[int, Any] = {}
        super().__init__(
            application, map_, True, sock, dispatcher=self.renderers, adj=adj, bind_socket=False, sockinfo=sockinfo
        )
        self.listener = threading.Thread(target=self._listen, name=f"metrics-{self.effective_port}", daemon=True)
        try:
            self.renderers.set_thread_count(THREADS)
            self.listener.start()
        except BaseException:  # no thread can be had
            self.close()
            raise
        _servers.add(self)

    def _listen(self) -> None:
        look_again = 0.0
        while not self._closing:
            wasyncore.poll2(LIMITS.tick_seconds if self.active_channels or self._not_before else None, self._map)
            now = time.monotonic()
            self._drop_unread()
            if now >= look_again:
                look_again = now + LIMITS.tick_seconds
                for channel in list(self.active_channels.values()):
                    if channel.is_overdue(now):
                        channel.handle_close()  # at once: a flag would wait until the client reads

    def _drop_unread(self) -> None:
        while True:
            unread = [channel for channel in self.active_channels.values() if channel.total_outbufs_len]
            if sum(channel.total_outbufs_len for channel in unread) <= LIMITS.unread_bytes:
                return
            max(unread, key=lambda channel: (channel.seconds_unread, channel.total_outbufs_len)).handle_close()

    def log_info(self, message: str, type: str = "info") -> None:  # noqa: A002
        """Say nothing."""

    def readable(self) -> bool:
        """Whether a connection may be accepted."""
        if self._not_before and time.monotonic() >= self._not_before:
            self._not_before = 0.0
        return bool(self.accepting) and not self._not_before

    def handle_accept(self) -> None:
        """Accept those who wait."""
        for _ in range(LIMITS.backlog):
            try:
                accepted = self.accept()
            except OSError:  # no descriptor is left: not again at once, it would only spin
                self._not_before = time.monotonic() + LIMITS.tick_seconds
                return
            if accepted is None:
                return
            connection, address = accepted
            try:
                if len(self.active_channels) >= LIMITS.connections:
                    self._close_longest_silent()
                if len(self.active_channels) < LIMITS.connections:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    Channel(self, connection, address, self.adj, self._map)
                    continue
            except OSError:
                pass  # it has gone already
            connection.close()

    def _close_longest_silent(self) -> None:
        silent = [channel for channel in self.active_channels.values() if channel.is_silent]
        if silent:
            min(silent, key=lambda channel: channel.since).handle_close()

    def add_task(self, channel: Channel) -> None:
        """Let a request be answered, with 503 if there are too many."""
        channels = list(self.active_channels.values())
        in_flight = sum(bool(each.requests) for each in channels)
        if in_flight > LIMITS.in_flight or sum(each.total_outbufs_len for each in channels) > 2 * LIMITS.unread_bytes:
            request = channel.requests[0]
            request.error = request.error or Busy("too many requests at once")
        super().add_task(channel)

    def close(self) -> None:
        """Close every connection and end every thread, within a deadline. Idempotent; again, it waits for what was stuck."""
        with self._close_lock:
            if self._closed:
                return
            if not self._closing:
                self.renderers.set_thread_count(0)
            self._closing = True
            deadline = time.monotonic() + LIMITS.close_seconds
            self.pull_trigger()
            threads = [self.listener, *self.renderers.started]
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(0.0, deadline - time.monotonic()))
            for channel in list(self.active_channels.values()):
                channel.handle_close()
            wasyncore.dispatcher.close(self)
            stuck = [thread.name for thread in threads if thread.is_alive()]
            if stuck:  # the pipe by which they wake the listener stays open: its number could be somebody else's by then
                log.warning("metrics server on port %s: did not end: %s", self.effective_port, ", ".join(stuck))
            else:
                self.trigger.close()
                self._closed = True


_servers: weakref.WeakSet[HttpServer] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # The child has the sockets, but not the threads: the port would stay taken, and connections would hang.
    for server in list(_servers):
        server._close_lock, server._closed = threading.Lock(), True
        for each in (server, *server.active_channels.values()):
            if each.socket is not None:
                each.socket.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
