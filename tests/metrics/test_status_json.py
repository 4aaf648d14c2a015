"""What /status.json says beside the sums: the last minutes of a run, and what each worker does."""

import json
import threading

import pytest
from gates import Gate, await_true, register
from metrics import browser
from metrics.http_client import exchange, get, source

import input_workers as iw
from input_workers.metrics.snapshot import Reading
from input_workers.metrics.windows import HISTORY_KEPT, HISTORY_SECONDS, Counters, Marks


def counters(at):
    return Counters(at, trainer_wait=at / 4, rows_delivered=10 * at, batches=at, depth_seconds=3.0 * at)


def test_readings_are_kept_some_seconds_apart_and_for_five_minutes_only():
    marks = Marks(counters(0.0))
    for second in range(1, 1001):
        marks.add(counters(float(second)))
    history = marks.history(counters(1000.0))
    assert len(history) == HISTORY_KEPT
    assert [reading.at for reading in history] == [1000.0 - HISTORY_SECONDS * back for back in reversed(range(HISTORY_KEPT))]
    assert history[-1] == Reading(1000.0, 10_000.0, 250.0, 3.0)
    assert history[-1].at - history[0].at == 300.0


def test_the_depth_of_a_reading_is_the_mean_over_the_time_since_the_one_before():
    marks = Marks(counters(0.0))
    for second in range(1, 12):
        marks.add(counters(float(second))._replace(depth_seconds=float(second * second)))
    assert [reading.device_queue_depth for reading in marks.history(counters(11.0))] == [0.0, 5.0, 15.0]


def test_where_nothing_was_delivered_for_long_the_history_goes_on_in_steps():
    marks = Marks(counters(0.0))
    marks.add(counters(7.0))
    assert [reading.at for reading in marks.history(counters(11.9))] == [0.0, 7.0]
    for now in (12.0, 16.9):
        assert marks.history(counters(now))[-1] == pytest.approx(Reading(12.0, 120.0, 3.0, 3.0))
    assert [reading.at for reading in marks.history(counters(100.0))] == [0.0, 7.0, 97.0]


def test_the_history_of_a_run_that_has_ended_stands_still():
    marks = Marks(counters(0.0))
    marks.add(counters(6.0))
    marks.last = counters(13.0)
    assert marks.history(counters(1000.0)) == marks.history(counters(14.0))
    assert marks.history(counters(1000.0))[-1].at == 11.0


def workers(handle):
    return {number: (worker.state, worker.rows, worker.errors) for number, worker in handle.stats().workers.items()}


def test_each_worker_is_shown_with_what_it_does(coordinator):
    gate = Gate()
    handle = register(coordinator, gate, num_workers=2, max_buffered_batches=1)
    assert (handle.stats().workers, handle.stats().history) == ({}, ())
    coordinator.start()
    gate.await_calls(2)
    assert {state for state, _, _ in workers(handle).values()} == {"fetching"}
    first, second = workers(handle)
    for _ in range(12):  # more than all queues hold
        gate.release(4, first)
    await_true(lambda: workers(handle)[first][0] == "blocked", "the first worker waits for room")
    assert handle.stats().workers[first].seconds >= 0
    gate.end(second)
    await_true(lambda: workers(handle)[second] == ("ended", 0, 0), "the second has no more data")
    told = json.loads(json.dumps(_status(coordinator)))
    assert told["workers"][str(first)]["state"] == "blocked"
    assert told["workers"][str(first)]["rows"] == workers(handle)[first][1] > 0
    gate.open()
    coordinator.stop()
    assert handle.stats().workers == {}


def _status(coordinator):
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        return json.loads(get(server, "/status.json")[1])["sources"]["train"]


class Stuck:
    """Rows of which the second request hangs, once."""

    def __init__(self):
        self.go_on, self.hangs = threading.Event(), iter([True])

    def __len__(self):
        return 8

    def fetch(self, rows, request):
        if request.index == 1 and next(self.hangs, False):
            self.go_on.wait(30.0)
        return [rows.copy()]


@pytest.mark.parametrize("limit", [None, 0.05])
def test_a_worker_says_what_it_fetches_and_whose_place_it_took(coordinator, limit):
    stuck = Stuck()
    stream, policy = iw.Stream(stuck, rows_per_request=4, shuffle=False), iw.ErrorPolicy(skip=True)
    more = {"fetch_timeout_s": limit, "coordinator": coordinator}
    iw.init_data_input_workers("numpy", ["row"], stream, 4, 1, on_error=policy, **more)
    handle = coordinator["train"]
    coordinator.start()
    handle.next_batch()
    if limit is None:
        await_true(lambda: [each.request for each in handle.stats().workers.values()] == [1], "it fetches the second request")
        (worker,) = handle.stats().workers.values()
        assert (worker.state, worker.rows, worker.errors) == ("fetching", 4, 0)
        stuck.go_on.set()
    handle.next_batch()
    await_true(lambda: next(iter(workers(handle).values()))[0] == "ended", "there are no more rows")
    assert [*workers(handle).values()] == [("ended", 8, 0 if limit is None else 1)]
    stuck.go_on.set()


def test_every_reading_is_served_in_columns_and_none_before_a_start():
    coordinator = source(iw.GlobalCoordinator())
    assert _status(coordinator)["history"] == {name: [] for name in Reading._fields}
    with coordinator:
        list(coordinator["train"])
    told, history = _status(coordinator)["history"], coordinator["train"].stats().history
    assert {name: len(values) for name, values in told.items()} == dict.fromkeys(Reading._fields, len(history))
    assert told["rows_delivered"] == [reading.rows_delivered for reading in history]


def test_the_page_is_one_answer_with_head_and_a_policy():
    with iw.serve_metrics(0, coordinator=iw.GlobalCoordinator()) as server:
        page = exchange(server, b"GET / HTTP/1.0\r\n\r\n")
        head = exchange(server, b"HEAD / HTTP/1.0\r\n\r\n")
        headers, _, body = page.partition(b"\r\n\r\n")
        assert head.rstrip().endswith(headers.split(b"\r\n")[-1])
        assert b"<script" not in head
        assert b"Content-Type: text/html; charset=utf-8" in headers
        assert b"Content-Security-Policy: default-src 'none'" in headers
        assert body.startswith(b"<!doctype html>")
        for outside in (b"http:", b"https:", b"//cdn", b"@import", b"src=", b"innerHTML"):
            assert outside not in body.replace(b"xmlns='http://www.w3.org/2000/svg'", b"")
        assert b"Content-Security-Policy" not in exchange(server, b"GET /status.json HTTP/1.0\r\n\r\n")


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("1", pytest.fail.Exception)])
def test_without_a_browser_its_tests_are_skipped_but_not_where_all_must_run(monkeypatch, tmp_path, ci, outcome):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(browser, "CHROMIUM", str(tmp_path / "chromium"))
    with pytest.raises(outcome, match=r"missing: .*chromium"):
        next(browser.chromium(tmp_path))
