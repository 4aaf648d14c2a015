"""Requests come in over HTTP, what a function returns for their path goes out. One thread, whatever the clients do.

A client that sends slowly, sends nothing or never reads holds a socket for a few seconds and nothing else: each connection
has one deadline for everything, and a newcomer takes the place of the one that has been silent for longest.
"""

from __future__ import annotations

import errno
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Self, TypeAlias

from input_workers.errors import ConfigError

__all__ = ["HttpServer", "Response"]

log = logging.getLogger("input_workers")

# Status, content type, body.
Response: TypeAlias = "tuple[HTTPStatus, str, bytes]"

MAX_CONNECTIONS = 40
MAX_HEAD_BYTES = 16 * 1024
MAX_HEADERS = 100
REQUEST_SECONDS = 5.0
RESPONSE_SECONDS = 10.0
LINGER_SECONDS = 1.0
NO_DESCRIPTOR_SECONDS = 0.05
BACKLOG = 128
READ_BYTES = 64 * 1024


class _Connection:
    """A client: first its request is read, then the response is written, then its own end is waited for."""

    __slots__ = ("deadline", "head", "response", "state", "stream")

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self.state = "reading"
        self.head = b""
        self.response = memoryview(b"")
        self.deadline = time.monotonic() + REQUEST_SECONDS


class HttpServer:
    """Answers GET and HEAD. Runs from construction to `close`, in a daemon thread of its own; a context manager.

    Args:
        host: the address to listen on.
        port: 0 takes a free one.
        respond: called with path and headers (names in lower case), in the server's thread; must not wait. What it raises
            is logged, and is a response of status 500.

    Raises:
        ConfigError: the port is taken, or the address is not one of this machine.
    """

    def __init__(self, host: str, port: int, respond: Callable[[str, Mapping[str, str]], Response]) -> None:
        self._respond = respond
        self._listener = _listen(host, port)
        self.host = host
        self.port: int = self._listener.getsockname()[1]
        self._connections: dict[socket.socket, _Connection] = {}  # oldest first; the thread's own
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name=f"http-{self.port}", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it is, without a path: "http://127.0.0.1:9108"."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    def close(self) -> None:
        """End the thread and close every socket. Idempotent, and safe in several threads."""
        try:
            self._wake.send(b".")
        except OSError:  # closed before
            pass
        self._thread.join()
        self._wake.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _serve(self) -> None:
        try:
            while True:
                now = time.monotonic()
                nearest = min((connection.deadline for connection in self._connections.values()), default=None)
                for key, _ in self._selector.select(None if nearest is None else max(0.0, nearest - now)):
                    if key.fileobj is self._woken:
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.data in self._connections.values():  # not dropped for a newcomer just now
                        self._advance(key.data)
                now = time.monotonic()
                for connection in [each for each in self._connections.values() if each.deadline <= now]:
                    self._drop(connection)
        finally:
            for connection in list(self._connections.values()):
                self._drop(connection)
            self._selector.close()
            self._listener.close()
            self._woken.close()

    def _accept(self) -> None:
        try:
            stream, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # no descriptor is free: make a place, or leave time for one
                if self._connections:
                    self._drop(next(iter(self._connections.values())))
                else:
                    time.sleep(NO_DESCRIPTOR_SECONDS)
            return  # else the client has gone again
        if len(self._connections) >= MAX_CONNECTIONS:
            waiting = [each for each in self._connections.values() if each.state != "writing"]
            self._drop((waiting or list(self._connections.values()))[0])
        stream.setblocking(False)
        connection = self._connections[stream] = _Connection(stream)
        self._selector.register(stream, selectors.EVENT_READ, connection)

    def _advance(self, connection: _Connection) -> None:
        try:
            if connection.state == "reading":
                self._read(connection)
            elif connection.state == "writing":
                self._write(connection)
            elif not connection.stream.recv(READ_BYTES):
                self._drop(connection)
        except BlockingIOError:
            pass
        except OSError:
            self._drop(connection)

    def _read(self, connection: _Connection) -> None:
        more = connection.stream.recv(READ_BYTES)
        if not more:
            self._drop(connection)
            return
        connection.head += more
        head, end, _ = connection.head.partition(b"\r\n\r\n")
        if end or len(connection.head) > MAX_HEAD_BYTES:
            connection.response = memoryview(self._answer(head))
            connection.state = "writing"
            connection.deadline = time.monotonic() + RESPONSE_SECONDS
            self._selector.modify(connection.stream, selectors.EVENT_WRITE, connection)
            self._write(connection)

    def _write(self, connection: _Connection) -> None:
        sent = connection.stream.send(connection.response)
        connection.response = connection.response[sent:]
        if not connection.response:
            # Closing at once, with bytes of the client unread, could reset the connection and lose the response.
            connection.stream.shutdown(socket.SHUT_WR)
            connection.state = "lingering"
            connection.deadline = time.monotonic() + LINGER_SECONDS
            self._selector.modify(connection.stream, selectors.EVENT_READ, connection)

    def _drop(self, connection: _Connection) -> None:
        del self._connections[connection.stream]
        self._selector.unregister(connection.stream)
        connection.stream.close()

    def _answer(self, head: bytes) -> bytes:
        """Return the whole response to a request's head."""
        method, path, headers, status = _parse(head)
        kind, body = "text/plain; charset=utf-8", f"{status.value} {status.phrase}\n".encode()
        if status is HTTPStatus.OK:
            try:
                status, kind, body = self._respond(path, headers)
            except Exception:
                log.exception("the response to GET %s could not be made", path)
                status, body = HTTPStatus.INTERNAL_SERVER_ERROR, b"500 the response could not be made; see the log\n"
        lines = [
            f"HTTP/1.1 {status.value} {status.phrase}",
            f"Content-Type: {kind}",
            f"Content-Length: {len(body)}",
            "Connection: close",
            "Cache-Control: no-store",
        ]
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            lines.append("Allow: GET, HEAD")
        return "\r\n".join([*lines, "\r\n"]).encode("latin-1") + (b"" if method == "HEAD" else body)


def _parse(head: bytes) -> tuple[str, str, dict[str, str], HTTPStatus]:
    """Return (method, path without its query, headers, OK or what is wrong)."""
    request, *fields = head.decode("latin-1").split("\r\n")
    if len(head) > MAX_HEAD_BYTES or len(fields) > MAX_HEADERS:
        return "", "", {}, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    words = request.split(" ")
    if len(words) != 3 or words[2] not in ("HTTP/1.1", "HTTP/1.0") or not words[1].startswith("/"):
        return "", "", {}, HTTPStatus.BAD_REQUEST
    method, path, _ = words
    if method not in ("GET", "HEAD"):
        return method, path, {}, HTTPStatus.METHOD_NOT_ALLOWED
    headers = {}
    for field in fields:
        name, colon, value = field.partition(":")
        if not colon or not name.strip():
            return method, path, {}, HTTPStatus.BAD_REQUEST
        headers[name.strip().lower()] = value.strip()
    return method, path.partition("?")[0], headers, HTTPStatus.OK


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address, family=family, backlog=BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} of {host} is taken; wanted a free one (0 takes any)") from error
        raise ConfigError(f"cannot listen on port {port!r} of {host!r}: {error}; wanted an address of this machine") from error
    listener.setblocking(False)
    return listener
