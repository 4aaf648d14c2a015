"""Single requests to the server: odd, wrong and hostile ones are refused at once, without a word on stderr."""

import time

import pytest
from metrics import storms
from metrics.http_client import REQUEST, channels, exchange, fast, get, keep_alive, source
from metrics.storms import WRONG
from prometheus_client.parser import text_string_to_metric_families as parse

import input_workers as iw
from input_workers.metrics.http_messages import LIMITS


@pytest.fixture
def server():
    with iw.serve_metrics(0, coordinator=source(iw.GlobalCoordinator())) as server:
        yield server


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


def test_2000_requests_of_chance_bring_no_line_on_stderr_and_the_server_lives():
    storms.requests_of_chance(2000)
