"""A client that may be rude: bytes go out, whatever came back is returned."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

import input_workers as iw

HANG_SECONDS = 30.0

REQUEST = b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


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


def fast(server: Any) -> None:
    """Scrape once, which is quick whatever else goes on."""
    began = time.monotonic()
    status, text = get(server)
    assert status == 200
    assert list(parse(text))
    assert time.monotonic() - began < 5.0


def channels(server: Any) -> dict[int, Any]:
    """Return the open connections."""
    return server._server.active_channels  # type: ignore[no-any-return]


def health(server: Any) -> str:
    """Return what /healthz says."""
    status, text = get(server, "/healthz")
    assert (status, text) == (200, "ok\n") or status == 503
    return text


def status(server: Any) -> Any:
    """Return what /status.json says."""
    code, text = get(server, "/status.json")
    assert code == 200
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def samples(text: str) -> list[Any]:
    """Return the samples of sources."""
    families = [family for family in parse(text) if not family.name.startswith("process_")]
    return [sample for family in families for sample in family.samples]


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
