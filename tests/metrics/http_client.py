"""A client that may be rude: bytes go out, whatever came back is returned."""

from __future__ import annotations

import http.client
import socket
import threading
import urllib.error
import urllib.request
from typing import Any

import numpy as np

import input_workers as iw

HANG_SECONDS = 30.0


def connect(server: Any, **options: int) -> socket.socket:
    sock = socket.socket()
    for option, value in options.items():
        sock.setsockopt(socket.SOL_SOCKET, getattr(socket, option), value)
    sock.settimeout(HANG_SECONDS)
    try:
        sock.connect((server.host, server.port))
    except OSError:
        sock.close()
        raise
    return sock


def until_closed(sock: socket.socket) -> bytes:
    """Return all that comes until the server closes; TimeoutError if it does not."""
    got = b""
    while True:
        try:
            more = sock.recv(65536)
        except ConnectionError:
            return got
        if not more:
            return got
        got += more


def exchange(server: Any, request: bytes) -> bytes:
    """Send bytes; return the answer, once the server has closed."""
    with connect(server) as sock:
        try:
            sock.sendall(request)
        except ConnectionError:
            pass  # it has heard enough
        return until_closed(sock)


def get(server: Any, path: str = "/metrics") -> tuple[int, str]:
    """Return status and body."""
    try:
        with urllib.request.urlopen(f"{server.url}{path}", timeout=HANG_SECONDS) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def keep_alive(server: Any) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(server.host, server.port, timeout=HANG_SECONDS)


def source(coordinator: iw.GlobalCoordinator, name: str = "train", rows: int = 1000, **more: Any) -> iw.GlobalCoordinator:
    """Register a source of so many rows in batches of 8."""
    stream = iw.Stream(iw.sources.Arrays(np.arange(rows), np.zeros((rows, 5), np.float32)), rows_per_request=7)
    more = {"num_workers": 1, **more}
    iw.init_data_input_workers("numpy", ["label", "data"], stream, 8, input_source_name=name, coordinator=coordinator, **more)
    return coordinator


def in_threads(number: int, call: Any) -> list[Any]:
    """Call `call(k)` in so many threads; return what they returned, raise what one raised."""
    results: list[Any] = [None] * number
    failures: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] = call(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results
