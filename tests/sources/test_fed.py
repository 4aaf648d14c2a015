"""A Stream that the trainer feeds: what is given is fetched in order; a fetcher that finds none waits; every end wakes it."""

from __future__ import annotations

import gc
import os
import signal
from typing import Any

import numpy as np
import pytest
from gates import HANG_SECONDS, await_true, register

import input_workers as iw
from input_workers.sources.fed import FedStream
from input_workers.sources.stream_calls import StreamCalls


def echo(rows: Any, request: iw.FetchRequest) -> list[np.ndarray[Any, Any]]:
    """Return what was given, and its number."""
    text = bytes(rows[0])
    if text == b"bad":
        raise ValueError("bad")
    if text.startswith(b"die once") and not os.path.exists(text[9:]):
        open(text[9:], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return [np.array([int(text)]) if text.isdigit() else np.array([-1]), np.array([request.index])]


def feed(coordinator: iw.GlobalCoordinator, fetchers: str, workers: int = 2) -> tuple[FedStream, Any]:
    stream = FedStream(echo)
    source = register(coordinator, stream, 1, num_workers=workers, fetchers=fetchers, rebatch=False, ordered=True)
    return stream, source


@pytest.mark.parametrize("fetchers", ["thread", "process"])
def test_what_is_given_comes_back_in_order_whenever_it_is_given(coordinator, fetchers) -> None:
    stream, source = feed(coordinator, fetchers)
    for number in range(3):  # before there is a run
        assert stream.give(b"%d" % (number * 7)) == number
    with coordinator:
        for number in range(60):
            batch = source.next_batch()
            assert (int(batch.data[0]), int(batch.label[0])) == (number * 7, number)
            stream.forget(number)
            stream.give(b"%d" % ((number + 3) * 7))
        for _ in range(3):
            source.next_batch()
        with pytest.raises(iw.WaitTimeout):
            source.next_batch(timeout_s=0.01)
        await_true(lambda: source.stats().fetcher_blocked_seconds > 0)  # who waits for a request does not fetch
        assert source.stats().rows_delivered == 63


@pytest.mark.parametrize("fetchers", ["thread", "process"])
def test_fetchers_that_wait_are_woken_by_a_stop_a_drop_and_a_failure(fetchers) -> None:
    for end in ("stop", "drop", "fail"):
        coordinator = iw.GlobalCoordinator()
        stream, source = feed(coordinator, fetchers)
        coordinator.start()
        stream.give(b"1")
        assert int(source.next_batch().data[0]) == 1
        if end == "fail":
            stream.give(b"bad")
            with pytest.raises(iw.FetchFailed, match="bad"):
                source.next_batch()
        if end == "drop":
            del source, coordinator
            gc.collect()
        else:
            assert coordinator.stop(HANG_SECONDS), coordinator.last_stop
    # That nothing is left, the fixture looks after.


def test_the_request_of_a_worker_that_died_is_fetched_by_another(coordinator, tmp_path) -> None:
    stream, source = feed(coordinator, "process", workers=1)
    with coordinator:
        for text in (b"4", b"die once " + bytes(tmp_path / "dead"), b"6"):
            stream.give(text)
        assert [int(source.next_batch().data[0]) for _ in range(3)] == [4, -1, 6]
        assert source.stats().fetcher_restarts == 1


def test_of_several_who_give_the_last_to_say_so_need_not_be_the_last_to_give() -> None:
    stream = FedStream(echo)
    plan = stream.plan("drop", (0,))
    calls = StreamCalls(plan, rows_per_request=1, batch_size=1, seed=0, first=0, done={}, lend=lambda rows: None, allowed=0)
    plan.follow(calls.allow)
    for text in (b"1", b"2"):
        stream.give(text)
    calls.allow(1)
    requests = [calls.deal_now(0) for _ in range(3)]
    assert [bytes(each.rows[0]) if each is not None else None for each in requests] == [b"1", b"2", None]
