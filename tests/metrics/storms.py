"""Storms of any size around the metrics server: `make test` runs small ones, `make chaos` those that take minutes."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import random
import select
import socket
import subprocess
import sys
import threading
import time
import types
import weakref
from typing import Any

import psutil
from gates import await_true
from metrics.http_client import (
    REQUEST,
    channels,
    connect,
    exchange,
    fast,
    get,
    health,
    in_threads,
    samples,
    source,
    status,
    until_closed,
)

import input_workers as iw
from input_workers.metrics.exporter import StatsCollector
from input_workers.metrics.http_messages import LIMITS
from input_workers.metrics.instruments import INSTRUMENTS

MOST_BYTES_MORE = 20 << 20

HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(range(200))
# No good request: an error at once.
WRONG = {
    "a line of 64 KB": b"GET /" + b"a" * 65536 + b" HTTP/1.1\r\n\r\n",
    "a header of 64 KB": b"GET /metrics HTTP/1.1\r\nX: " + b"a" * 65536 + b"\r\n\r\n",
    "101 headers": b"GET /metrics HTTP/1.1\r\n" + b"".join(b"X-%d: 1\r\n" % index for index in range(101)) + b"\r\n",
    "a body": b"GET /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
    "chunks": b"GET /metrics HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "a body that is waited for": b"GET /metrics HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n",
    "a negative length": b"GET /metrics HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    "two lengths": b"GET /metrics HTTP/1.1\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\n",
    "version 9.9": b"GET /metrics HTTP/9.9\r\n\r\n",
    "version 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no version": b"GET /metrics\r\n\r\n",
    "small letters": b"get /metrics HTTP/1.1\r\n\r\n",
    "binary": bytes(range(128, 256)),
    "zeros": b"\0" * 1000,
    "binary later": b"GET " + bytes(range(256)) + b"\r\n\r\n",
    "TLS": HELLO,
    "a bare line feed": b"GET /metrics HTTP/1.1\nX: 1\n\r\n\r\n",
    "a header of nothing": b"GET /metrics HTTP/1.1\r\n: 1\r\n\r\n",
    "a header folded": b"GET /metrics HTTP/1.1\r\n X: 1\r\n\r\n",
    "an address that is none": b"GET http://[/metrics HTTP/1.1\r\n\r\n",
}

CHILD = """
import sys
import input_workers as iw
from metrics.http_client import source
server = iw.serve_metrics(0, coordinator=source(iw.global_coordinator))
print(server.port, flush=True)
sys.stdin.read()
server.close()
"""


def _mutant(rng: random.Random) -> bytes:
    """Return a request with something wrong in it, most of the time."""
    request = bytearray(rng.choice([REQUEST, REQUEST * 3, *WRONG.values()])[:2000])
    known = [b"\r\n", b"\r\n\r\n", b":", b" ", b"\0", b"%", b"HTTP/1.1", b"Content-Length: 9\r\n"]
    for _ in range(rng.choice([0, 1, 3, 30])):
        at = rng.randrange(len(request) + 1)
        request[at : at + rng.choice([0, 0, 1, 5])] = rng.choice([rng.randbytes(rng.randrange(4)), *known])
    return bytes(request)


def requests_of_chance(number: int) -> None:
    """Send so many to a server in a process of its own: it lives, and nothing is on its stderr."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=-1, stdout=-1, stderr=-1, text=True, env=env)
    try:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        there = types.SimpleNamespace(host="127.0.0.1", port=port, url=f"http://127.0.0.1:{port}")
        for request in WRONG.values():
            exchange(there, request)

        def some(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(number // 8):
                with connect(there) as sock:
                    try:
                        sock.sendall(_mutant(rng))
                        sock.shutdown(socket.SHUT_WR)
                    except OSError:
                        pass
                    reply = until_closed(sock)
                    assert reply == b"" or reply.startswith(b"HTTP/1."), reply

        in_threads(8, some)
        fast(there)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
        child.communicate()
    assert (child.returncode, out, err) == (0, "", "")


def slow_readers(clients: int) -> None:
    """Clients that take a byte now and then are dropped by the deadline of an answer; meanwhile others are answered."""
    coordinator = source(iw.GlobalCoordinator(), "x" * 10_000)  # some 600 KB a page
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        socks = [connect(server, SO_RCVBUF=2048) for _ in range(clients)]
        try:
            for sock in socks:
                sock.sendall(REQUEST)
            for sock in socks:
                assert sock.recv(1) == b"H"
            fast(server)
            for index in itertools.count():  # a byte each, again and again
                fast(server)
                if not any(channel.total_outbufs_len for channel in list(channels(server).values())):
                    break
                assert index < 10_000
                for sock in socks:
                    sock.setblocking(False)
                    try:
                        sock.recv(1)
                    except OSError:
                        pass
        finally:
            for sock in socks:
                sock.close()
        await_true(lambda: not channels(server), "every connection closed")


def trickle(server: Any, clients: int, pause_s: float, within_s: float) -> None:
    """Clients that send a byte of a request now and then are dropped in time, all of them; meanwhile others are answered."""
    socks = [connect(server) for _ in range(clients)]
    began = time.monotonic()
    tick, left = threading.Event(), set(socks)
    try:
        while left:
            assert time.monotonic() - began < within_s
            left -= set(select.select(list(left), [], [], 0.0)[0])
            for sock in left:
                try:
                    sock.sendall(b"G")
                except OSError:
                    pass  # it was dropped just now
            fast(server)
            tick.wait(pause_s)
        assert time.monotonic() - began >= LIMITS.request_seconds * 0.9
        assert {until_closed(sock) for sock in socks} == {b""}
    finally:
        for sock in socks:
            sock.close()


def flood(server: Any, clients: int, seconds: float) -> None:
    """So many ask at once, again and again: each is answered, refused or closed, and the memory stays as it was."""
    fast(server)
    before, began = psutil.Process().memory_info().rss, time.monotonic()
    for _ in itertools.count():
        replies = {200: 0, 503: 0, None: 0}
        socks = [connect(server) for _ in range(clients)]
        for sock in socks:
            try:
                sock.sendall(REQUEST)
            except ConnectionError:
                pass  # closed, for there are too many
        for sock in socks:
            with sock:
                reply = until_closed(sock)
            replies[int(reply[9:12]) if reply else None] += 1
        assert sum(replies.values()) == clients
        assert replies[200] >= LIMITS.in_flight, replies
        assert replies[None] <= max(0, clients + 1 - LIMITS.connections), replies  # the last scrape may still be closing
        fast(server)
        assert psutil.Process().memory_info().rss - before < MOST_BYTES_MORE
        if time.monotonic() - began >= seconds:
            return


def come_and_go(rounds: int) -> None:
    """Sources are registered and dropped: their series go with them, and nothing grows."""
    dropped: list[weakref.ref[iw.GlobalCoordinator]] = []
    before = 0
    for round_ in range(rounds):
        coordinator = source(iw.GlobalCoordinator(), f"s{round_}", 8)
        collector = StatsCollector(coordinator)
        assert {sample.labels["source"] for sample in samples(collector.text(openmetrics=False))} == {f"s{round_}"}
        dropped.append(weakref.ref(coordinator))
        del coordinator
        if round_ % 100 == 99:
            gc.collect()
            assert [each() for each in dropped] == [None] * len(dropped)
            assert samples(collector.text(openmetrics=False)) == []
            dropped = []
            memory = psutil.Process().memory_info().rss
            before = before or memory
            assert memory - before < MOST_BYTES_MORE


def errors(rows: int, caplog: Any) -> None:
    """Every row fails: the errors are counted, and the log says so now and then, with how many it did not say."""
    caplog.set_level(logging.INFO)

    class Broken:
        def __len__(self) -> int:
            return rows

        def fetch(self, rows: Any, request: Any) -> Any:
            raise ValueError("no")

    coordinator = iw.GlobalCoordinator()
    stream = iw.Stream(Broken(), rows_per_request=100)
    policy = iw.ErrorPolicy(skip=True)
    iw.init_data_input_workers("numpy", ["data"], stream, 4, 1, on_error=policy, coordinator=coordinator)
    began = time.monotonic()
    with coordinator, iw.serve_metrics(0, coordinator=coordinator) as server:
        assert list(coordinator["train"]) == []
        told = [sample for sample in samples(get(server)[1]) if sample.labels.get("error")]
    assert [(each.labels["error"], each.value) for each in told] == [("ValueError", rows + -(-rows // 100))]
    seconds = 1 + time.monotonic() - began
    assert 1 <= len(caplog.records) <= 10 * seconds
    assert seconds < 12 or "such since the last of these lines" in caplog.text


def looks(clients: int, seconds: float) -> None:
    """Clients look all the time while sources start, run and stop: each page is whole, and no counter falls."""
    coordinator = source(iw.GlobalCoordinator(), rows=200, num_workers=2)
    finished = threading.Event()
    counters = {each.name for each in INSTRUMENTS if each.kind == "counter"}

    def look(number: int) -> int:
        highest: dict[Any, float] = {}
        while not finished.is_set():
            if number % 4 == 3:
                health(server)
                told = [(("rows", name), each["rows_fetched"]) for name, each in status(server)["sources"].items()]
            else:
                found = samples(get(server)[1])
                told = [((each.name, frozenset(each.labels.items())), each.value) for each in found if each.name in counters]
            for key, value in told:
                assert value >= highest.get(key, 0)
                highest[key] = value
        return len(highest)

    def run(number: int) -> int:
        if number:
            return look(number - 1)
        began = time.monotonic()
        try:
            for round_ in itertools.count():
                if round_ >= 20 and time.monotonic() - began >= seconds:
                    break
                with coordinator:
                    for _ in range(round_ % 5):
                        coordinator["train"].next_batch()
                if round_ in (0, 7, 14):
                    source(coordinator, f"more_{round_}", 80)
        finally:
            finished.set()
        return 1

    with iw.serve_metrics(0, coordinator=coordinator) as server:
        assert all(in_threads(clients + 1, run))
