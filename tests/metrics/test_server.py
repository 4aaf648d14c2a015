"""The server against clients that are slow or many: it answers the others, stays small, and says nothing."""

import dataclasses
import os
import select
import socket
import threading
import time
import types

import psutil
import pytest
from gates import await_true
from metrics import storms
from metrics.http_client import REQUEST, channels, connect, fast, get, source, until_closed

import input_workers as iw
from input_workers.metrics import server as server_module
from input_workers.metrics.http_messages import LIMITS

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


@pytest.mark.parametrize("clients", [1, 40])
def test_clients_that_do_not_read_are_dropped_and_hold_up_nobody(short, clients):
    storms.slow_readers(clients)


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
    storms.flood(server, 500, 0.0)


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


@pytest.mark.parametrize("sent", [b"", b"GET", b"GET /metrics HTTP/1.1\r\nHo", REQUEST, REQUEST * 50])
def test_a_client_that_goes_away_leaves_nothing(server, sent):
    for _ in range(20):
        with connect(server) as sock:
            sock.sendall(sent)
    await_true(lambda: not channels(server), "every connection closed")
    fast(server)


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
