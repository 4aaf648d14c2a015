"""The server against clients that are slow, many, wrong or hostile: it answers the others, stays small, and says nothing."""

import dataclasses
import itertools
import os
import random
import select
import socket
import subprocess
import sys
import threading
import time
import types

import psutil
import pytest
from gates import await_true
from metrics.http_client import connect, exchange, get, in_threads, keep_alive, source, until_closed
from prometheus_client.parser import text_string_to_metric_families as parse

import input_workers as iw
from input_workers.metrics import server as server_module
from input_workers.metrics.server import LIMITS

REQUEST = b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
BOUND_SECONDS = 15.0  # of what takes under a second on an idle machine


@pytest.fixture
def short(monkeypatch):
    """Deadlines short enough to be waited for."""
    limits = dataclasses.replace(LIMITS, request_seconds=0.4, answer_seconds=0.8, idle_seconds=0.8, tick_seconds=0.05)
    monkeypatch.setattr(server_module, "LIMITS", limits)
    return limits


@pytest.fixture
def server():
    coordinator = source(iw.GlobalCoordinator())
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        server.coordinator = coordinator
        yield server


def channels(server):
    return server._server.active_channels


def fast(server):
    """One scrape, quick whatever else goes on."""
    began = time.monotonic()
    status, text = get(server)
    assert status == 200
    assert list(parse(text))
    assert time.monotonic() - began < 5.0


def asked(sock):
    """A request that is answered, and leaves the connection open."""
    sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
    got = b""
    while not got.endswith(b"\r\n\r\nok\n"):
        got += sock.recv(1000)
    assert got.startswith(b"HTTP/1.1 200")


def test_the_limits_are_the_promised_ones():
    assert (LIMITS.request_seconds, LIMITS.answer_seconds, LIMITS.connections, LIMITS.in_flight) == (5.0, 10.0, 256, 40)
    assert LIMITS.backlog >= 128


@pytest.mark.parametrize("sent", [b"", b"G", b"GET /metrics HTTP/1.1\r\nHost: a\r\n", b"\r\n\r\n"])
def test_a_request_that_is_not_finished_is_dropped(server, short, sent):
    began = time.monotonic()
    with connect(server) as sock:
        sock.sendall(sent)
        assert until_closed(sock) == b""
    assert short.request_seconds * 0.9 <= time.monotonic() - began < BOUND_SECONDS


@pytest.mark.parametrize("text", [REQUEST[:-2] + b"X: " + b"y" * 10_000, b"\r\n" * 10_000], ids=["header", "blank lines"])
def test_a_request_that_trickles_in_is_dropped_too(server, short, text):
    began = time.monotonic()
    with connect(server) as sock:
        for byte in text:
            if select.select([sock], [], [], 0.05)[0]:
                break
            sock.sendall(bytes([byte]))
        assert until_closed(sock) == b""
    assert time.monotonic() - began < BOUND_SECONDS


def test_blank_lines_do_not_keep_a_connection_after_its_first_answer(server, short):
    with connect(server) as sock:
        asked(sock)
        began = time.monotonic()
        while not select.select([sock], [], [], 0.05)[0]:
            sock.sendall(b"\r\n")
            assert time.monotonic() - began < BOUND_SECONDS
        assert until_closed(sock) == b""


def test_an_idle_connection_lives_longer_than_a_request_may_take_and_not_for_ever(server, short):
    with connect(server) as sock:
        asked(sock)
        began = time.monotonic()
        assert until_closed(sock) == b""
    assert short.idle_seconds * 0.9 <= time.monotonic() - began < BOUND_SECONDS


def test_200_half_open_and_trickling_clients_do_not_hold_up_a_scrape(server):
    socks = [connect(server) for _ in range(200)]
    try:
        for sock in socks[::2]:
            sock.sendall(b"GET /met")
        for _ in range(5):
            for sock in socks[::2]:
                sock.sendall(b"x")
            fast(server)
    finally:
        for sock in socks:
            sock.close()


def test_40_clients_that_do_not_read_are_dropped_and_hold_up_nobody(short):
    coordinator = source(iw.GlobalCoordinator(), "x" * 10_000)  # some 600 KB a page
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        socks = [connect(server, SO_RCVBUF=2048) for _ in range(40)]
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


def test_unread_answers_are_bounded(short, monkeypatch):
    monkeypatch.setattr(server_module, "LIMITS", dataclasses.replace(LIMITS, unread_bytes=1 << 20))
    coordinator = source(iw.GlobalCoordinator(), "x" * 10_000)
    with iw.serve_metrics(0, coordinator=coordinator) as server, connect(server, SO_RCVBUF=2048) as sock:
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 100)
        assert sock.recv(1) == b"H"
        began, unread = time.monotonic(), []

        def dropped():
            unread.append(sum(each.total_outbufs_len for each in list(channels(server).values())))
            return not channels(server)

        await_true(dropped, "the connection closed")
        assert max(unread) < 8 << 20
        assert time.monotonic() - began < LIMITS.answer_seconds / 2  # not because it was late


def test_500_connections_leave_room_for_a_scrape_and_the_memory_as_it_was(server):
    fast(server)
    before = psutil.Process().memory_info().rss
    socks = []
    try:
        for _ in range(500):
            socks.append(connect(server))
            if len(socks) % 50 == 0:
                fast(server)
                assert len(channels(server)) <= LIMITS.connections
        assert psutil.Process().memory_info().rss - before < 20 << 20
    finally:
        for sock in socks:
            sock.close()


def test_500_connections_that_ask_at_once_are_answered_or_refused(server):
    replies = {200: 0, 503: 0, None: 0}
    socks = [connect(server) for _ in range(200)]
    for sock in socks:
        sock.sendall(REQUEST)
    for sock in socks:
        with sock:
            reply = until_closed(sock)
        replies[int(reply[9:12]) if reply else None] += 1
    assert replies[200] >= LIMITS.in_flight
    assert sum(replies.values()) == 200
    fast(server)


def test_more_than_40_at_once_are_refused_while_a_page_is_made(server):
    entered, go_on = threading.Event(), threading.Event()
    stats = server.coordinator["train"]._core.stats

    def slow():
        entered.set()
        assert go_on.wait(30.0)
        return stats()

    server.coordinator["train"]._core.stats = slow
    socks = [connect(server) for _ in range(60)]
    try:
        for sock in socks:
            sock.sendall(REQUEST)
        assert entered.wait(30.0)
        await_true(lambda: sum(bool(each.requests) for each in list(channels(server).values())) == 60, "all have asked")
        refused = sum(bool(each.requests[0].error) for each in channels(server).values())
        assert refused == 20
        go_on.set()
        replies = [until_closed(sock)[9:12] for sock in socks]
    finally:
        go_on.set()
        for sock in socks:
            sock.close()
    assert (replies.count(b"200"), replies.count(b"503")) == (40, 20)


METHODS = ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW", "PROPFIND"]


@pytest.mark.parametrize("method", METHODS)
def test_methods_other_than_get_and_head_are_405(server, method):
    reply = exchange(server, f"{method} /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc".encode())
    assert reply.startswith(b"HTTP/1.1 405 ")
    assert b"\r\nAllow: GET, HEAD\r\n" in reply


def test_head_has_the_headers_and_no_body(server):
    head, rest = exchange(server, REQUEST.replace(b"GET", b"HEAD")).split(b"\r\n\r\n", 1)
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nContent-Length: " in head
    assert rest == b""


def test_pipelined_requests_are_answered_in_their_order(server):
    paths = [b"/healthz", b"/none", b"/healthz", b"/none"]
    requests = [b"GET " + path + b" HTTP/1.1\r\nHost: a\r\n\r\n" for path in paths]
    reply = exchange(server, b"".join(requests) + REQUEST)
    assert [part[:3] for part in reply.split(b"HTTP/1.1 ")[1:]] == [b"200", b"404", b"200", b"404", b"200"]


def test_a_connection_is_kept_for_the_next_request(server):
    connection = keep_alive(server)
    for _ in range(3):
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b"ok\n"
        assert len(channels(server)) == 1
    connection.close()


@pytest.mark.parametrize("sent", [b"", b"GET", b"GET /metrics HTTP/1.1\r\nHo", REQUEST, REQUEST * 50])
def test_a_client_that_goes_away_leaves_nothing(server, sent):
    for _ in range(20):
        with connect(server) as sock:
            sock.sendall(sent)
    await_true(lambda: not channels(server), "every connection closed")
    fast(server)


PATHS = [
    "/metrics/",
    "/metricsx",
    "/Metrics",
    "/metrics/../metrics",
    "/index.html",
    "",
    "/healthz/",
    "/status",
    "/status.json/",
    "/%00",
]


@pytest.mark.parametrize("path", PATHS)
def test_paths_are_exact(server, path):
    assert exchange(server, REQUEST.replace(b"/metrics", path.encode()))[9:12] in (b"404", b"400")


def test_a_query_changes_nothing(server):
    assert {family.name for family in parse(get(server, "/metrics?name[]=x")[1])} == {
        family.name for family in parse(get(server)[1])
    }


def test_what_a_client_sends_comes_back_in_no_answer(server):
    request = REQUEST.replace(
        b"Host", b"Accept: text/plain;version=9.9.9-zebra, application/openmetrics-text;version=zebra\r\nHost"
    )
    for each in (request, request.replace(b"/metrics", b"/zebra?zebra"), request.replace(b"GET", b"ZEBRA")):
        reply = exchange(server, each)
        assert reply.startswith(b"HTTP/1.1 ")
        assert b"zebra" not in reply.lower()


HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(range(200))
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


@pytest.mark.parametrize("request_", WRONG.values(), ids=WRONG)
def test_what_is_no_good_request_is_an_error_at_once(server, request_):
    began = time.monotonic()
    reply = exchange(server, request_)
    assert reply == b"" or reply[9:10] == b"4", reply
    assert time.monotonic() - began < LIMITS.request_seconds
    fast(server)


def test_100_headers_are_good(server):
    request = WRONG["101 headers"].replace(b"X-7: 1\r\n", b"").replace(b"X-8: 1", b"Connection: close")
    assert exchange(server, request).startswith(b"HTTP/1.1 200 ")


CHILD = """
import sys
import input_workers as iw
from metrics.http_client import source
server = iw.serve_metrics(0, coordinator=source(iw.global_coordinator))
print(server.port, flush=True)
sys.stdin.read()
server.close()
"""


def mutant(rng):
    """Return a request with something wrong in it, most of the time."""
    request = bytearray(rng.choice([REQUEST, REQUEST * 3, *WRONG.values()])[:2000])
    for _ in range(rng.choice([0, 1, 3, 30])):
        at = rng.randrange(len(request) + 1)
        request[at : at + rng.choice([0, 0, 1, 5])] = rng.choice(
            [
                rng.randbytes(rng.randrange(4)),
                b"\r\n",
                b"\r\n\r\n",
                b":",
                b" ",
                b"\0",
                b"%",
                b"HTTP/1.1",
                b"Content-Length: 9\r\n",
            ]
        )
    return bytes(request)


def test_2000_requests_of_chance_bring_no_line_on_stderr_and_the_server_lives():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=-1, stdout=-1, stderr=-1, text=True, env=env)
    try:
        port = int(child.stdout.readline())
        there = types.SimpleNamespace(host="127.0.0.1", port=port, url=f"http://127.0.0.1:{port}")
        for request in WRONG.values():
            exchange(there, request)

        def some(seed):
            rng = random.Random(seed)
            for _ in range(250):
                with connect(there) as sock:
                    try:
                        sock.sendall(mutant(rng))
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


def test_a_page_that_cannot_be_made_is_500_and_one_line_in_the_log(server, caplog):
    server.coordinator["train"]._core.run = types.SimpleNamespace()  # a defect of ours
    for _ in range(3):
        status, text = get(server, "/healthz")
        assert status == 500
        assert "Traceback" not in text
    assert [record.message for record in caplog.records] == ["a page of the metrics server cannot be made"]
    server.coordinator["train"]._core.run = None


def test_without_a_descriptor_left_it_waits_and_goes_on(server, monkeypatch):
    full = threading.Event()

    def accept():
        full.set()
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(server._server, "accept", accept)
    with connect(server) as sock:
        sock.sendall(REQUEST)
        assert full.wait(30.0)
        monkeypatch.undo()
        assert until_closed(sock).startswith(b"HTTP/1.1 200")


def test_close_ends_open_connections_and_is_quick(server):
    with connect(server) as idle, connect(server) as half:
        half.sendall(b"GET /met")
        fast(server)
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < LIMITS.close_seconds
        assert until_closed(idle) == until_closed(half) == b""


def test_close_names_a_thread_that_hangs_and_may_be_called_again(server, monkeypatch, caplog):
    monkeypatch.setattr(server_module, "LIMITS", dataclasses.replace(LIMITS, close_seconds=0.1))
    entered, go_on = threading.Event(), threading.Event()
    server.coordinator["train"]._core.stats = lambda: (entered.set(), go_on.wait(30.0), 1 / 0)
    with connect(server) as sock:
        sock.sendall(REQUEST)
        assert entered.wait(30.0)
        server.close()
        assert "did not end: metrics-render-" in caplog.text
        assert until_closed(sock) == b""
    go_on.set()
    monkeypatch.undo()
    server.close()


def test_no_thread_to_be_had_is_an_error_and_leaves_nothing(monkeypatch):
    start, left = threading.Thread.start, iter([1, 1])

    def failing(thread):
        if thread.name.startswith("metrics-") and next(left, None) is None:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(RuntimeError, match="can't start"):
        iw.serve_metrics(0)


def test_a_forked_process_does_not_keep_the_port(server):
    read, write = os.pipe()
    here, there = socket.socketpair()
    child = os.fork()
    if not child:
        os.close(write)
        there.send(b"x")
        os.read(read, 1)  # until the parent has looked
        os._exit(0)
    try:
        assert here.recv(1) == b"x"
        here.close()
        there.close()
        server.close()
        with pytest.raises(OSError, match="refused"):
            connect(server)
    finally:
        os.close(write)
        os.waitpid(child, 0)
        os.close(read)
