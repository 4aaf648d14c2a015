"""An HTTP server in a trainer: requests of anybody go in, and whatever they are, it stays small, quick and silent.

Waitress does the work. It has a time-out for inactivity only, so that a client that sends a byte now and then holds a
connection for ever: here every request and every answer has one deadline in all, connections are counted, and nothing that
a client sends makes a log line. There is no TLS and no authentication: a reverse proxy does both.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

from input_workers.errors import ConfigError
from input_workers.metrics.http_messages import LIMITS, Answer, Busy, Page, Request

try:
    from waitress import wasyncore
    from waitress.adjustments import Adjustments
    from waitress.channel import HTTPChannel
    from waitress.server import TcpWSGIServer
    from waitress.task import ThreadedTaskDispatcher
except ImportError as error:
    raise ConfigError(f"serving metrics needs waitress ({error}); pip install waitress") from error

__all__ = ["HttpServer"]

log = logging.getLogger("input_workers")

# What clients do is no news: this logger has no parent and no output.
QUIET = logging.Logger("input_workers.http")
QUIET.addHandler(logging.NullHandler())


Application: TypeAlias = "Callable[[str, str], Page]"

# Two: what only looks at a state does not wait for a page that is being made.
THREADS = 2
# The system's own choice grows to megabytes for each client that does not read.
SEND_BUFFER_BYTES = 64 << 10


class Channel(HTTPChannel):  # type: ignore[misc]
    """A connection, with deadlines. All but `service` runs in the thread that listens."""

    requests: list[Request]
    parser_class = Request
    task_class = Answer
    logger = QUIET

    def __init__(self, server: HttpServer, sock: socket.socket, addr: Any, adj: Adjustments, map: Any) -> None:  # noqa: A002
        self.served = 0
        self.since = self._partial_since = time.monotonic()
        self._phase = "request", 0
        self._partial: Request | None = None
        super().__init__(server, sock, addr, adj, map=map)

    def service(self) -> None:
        """Answer one request. The thread that listens is woken only if there is something for it to do."""
        request = self.requests[0]
        task = (self.task_class if request.error is None else self.error_task_class)(self, request)
        try:
            task.service()
        except Exception:  # the client has gone
            task.close_on_finish = True
        self.served += 1
        with self.requests_lock:
            has_more = len(self.requests) > 1  # and no more were read meanwhile
            if task.close_on_finish:
                self.close_when_flushed = True
                self.requests = []
            else:
                self.current_outbuf_count = self.adj.outbuf_high_watermark  # the next answer gets a buffer of its own
                del self.requests[0]
                if has_more:
                    self.server.add_task(self)
        if self.connected and (has_more or self.close_when_flushed or self.total_outbufs_len):
            self.server.pull_trigger()

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
    """Serves pages on a socket that is bound already, until `close`. `application(path, accept)` makes them, in any thread.

    One thread listens, reads and writes; two make answers. None of them ends the process or outlives `close`.
    """

    channel_class = Channel
    logger = QUIET

    def __init__(self, application: Application, sock: socket.socket) -> None:
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
            channel_request_lookahead=1,  # the listener goes on to read from a client that is being answered
            clear_untrusted_proxy_headers=False,  # would wrap the application in another
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
            self._poll()
            now = time.monotonic()
            self._drop_unread()
            if now >= look_again:
                look_again = now + LIMITS.tick_seconds
                for channel in list(self.active_channels.values()):
                    if channel.is_overdue(now):
                        channel.handle_close()  # at once: a flag would wait until the client reads

    def _poll(self) -> None:
        """Wait until something happens, at most for a tick, and do what is to be done."""
        poll = select.poll()
        for number, each in self._map.items():
            flags = (select.POLLIN | select.POLLPRI) * bool(each.readable())
            if not each.accepting and each.writable():
                flags |= select.POLLOUT
            if flags:
                poll.register(number, flags)
        ready = dict(poll.poll(1000 * LIMITS.tick_seconds if self.active_channels or self._not_before else None))
        # Last: a connection that it accepts may get the number of one that it closes, for which something came as well.
        port = ready.pop(self._fileno, 0)
        for number, flags in ready.items():
            if number in self._map:
                wasyncore.readwrite(self._map[number], flags)
        if port:
            wasyncore.readwrite(self, port)

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
