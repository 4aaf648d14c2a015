"""The metrics server under storms of their full size, and with the deadlines that it really has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from metrics import storms
from metrics.http_client import source

import input_workers as iw
from input_workers.metrics.http_messages import LIMITS


@pytest.fixture
def server() -> Iterator[Any]:
    with iw.serve_metrics(0, coordinator=source(iw.GlobalCoordinator())) as server:
        yield server


@pytest.mark.parametrize("clients", [1, 40])
def test_clients_that_read_a_byte_now_and_then_are_dropped_after_10_seconds(clients: int) -> None:
    storms.slow_readers(clients)


def test_200_clients_that_send_a_byte_each_600_ms_are_dropped_after_5_seconds(server: Any) -> None:
    storms.trickle(server, 200, 0.6, within_s=LIMITS.request_seconds + 5.0)


def test_500_clients_that_ask_at_once_for_30_seconds(server: Any) -> None:
    storms.flood(server, 500, 30.0)


def test_50000_requests_of_chance_bring_no_line_on_stderr_and_the_server_lives() -> None:
    storms.requests_of_chance(50_000)


def test_10000_sources_that_come_and_go_leave_nothing() -> None:
    storms.come_and_go(10_000)


def test_a_storm_of_a_million_errors_is_counted_and_written_few_times(caplog: pytest.LogCaptureFixture) -> None:
    storms.errors(1_000_000, caplog)


def test_every_page_is_whole_for_a_minute_while_8_look_and_sources_start_and_stop() -> None:
    storms.looks(8, 60.0)
