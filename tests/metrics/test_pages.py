"""The pages: what /healthz and /status.json say, of sources in every state; how old a page may be."""

import json
import math
import os
import threading
from typing import get_args, get_type_hints

import numpy as np
import pytest
from gates import Gate, await_true, register
from metrics.http_client import get, health, in_threads, samples, source, status

import input_workers as iw
from input_workers.coordinator.condition import Condition
from input_workers.metrics import pages as pages_module
from input_workers.metrics.http_messages import Page
from input_workers.metrics.instruments import STATES
from input_workers.metrics.pages import ShortMemory, plain

SOON = 0.001  # seconds after which a trainer that waits is a case for the doctor


def state(server, name="train"):
    """Return the state of a source, of which /status.json and the metrics say the same."""
    told = [sample for sample in samples(get(server)[1]) if sample.name == "input_workers_state"]
    mine = {sample.labels["state"]: sample.value for sample in told if sample.labels["source"] == name}
    assert tuple(mine) == STATES == get_args(get_type_hints(Condition)["state"])
    assert sorted(mine.values()) == [0, 0, 0, 0, 0, 1]
    shown = status(server)["sources"][name]["state"]
    assert mine[shown] == 1
    return shown


# /healthz


def test_a_source_that_was_never_started_is_healthy_and_so_is_one_that_was_stopped_or_has_finished():
    coordinator = source(iw.GlobalCoordinator())
    with iw.serve_metrics(0, coordinator=coordinator, stalled_after_s=SOON) as server:
        assert (health(server), state(server)) == ("ok\n", "new")
        with coordinator:
            assert len(list(coordinator["train"])) == 1000 // 8
            assert (health(server), state(server)) == ("ok\n", "finished")
        assert (health(server), state(server)) == ("ok\n", "stopped")


def test_a_trainer_that_does_not_ask_is_not_waited_for():
    coordinator = source(iw.GlobalCoordinator())
    with coordinator, iw.serve_metrics(0, coordinator=coordinator, stalled_after_s=SOON) as server:
        coordinator["train"].next_batch()
        await_true(lambda: coordinator["train"].stats().device_queue_depth > 0, "a batch that nobody asks for")
        assert (health(server), state(server)) == ("ok\n", "running")


def test_a_trainer_that_waits_in_vain_is_a_reason_until_a_batch_comes(coordinator):
    gate = Gate()
    handle = register(coordinator, gate)
    with iw.serve_metrics(0, coordinator=coordinator, stalled_after_s=SOON) as server:
        coordinator.start()
        gate.await_calls()
        assert health(server) == "ok\n"  # nobody has asked
        trainer = threading.Thread(target=handle.next_batch)
        trainer.start()
        await_true(lambda: health(server) != "ok\n", "503 while the trainer waits")
        assert health(server).startswith("train: stalled: train: a trainer asked for a batch 0 s ago, and none has come")
        gate.release(4)
        trainer.join()
        assert health(server) == "ok\n"
        gate.open()


def test_a_trainer_that_polls_waits_too_and_one_with_time_is_patient(coordinator):
    gate = Gate()
    handle = register(coordinator, gate)
    with (
        iw.serve_metrics(0, coordinator=coordinator, stalled_after_s=SOON) as server,
        iw.serve_metrics(0, coordinator=coordinator) as patient,
    ):
        coordinator.start()
        for _ in range(3):
            with pytest.raises(iw.WaitTimeout):
                handle.next_batch(SOON)
        assert "stalled" in health(server)
        assert state(server) == "stalled"
        assert (health(patient), state(patient)) == ("ok\n", "running")
        gate.release(4)
        await_true(lambda: health(server) == "ok\n", "a batch has come, whether or not it is taken")
        gate.open()


def test_without_workers_a_call_that_takes_long_is_a_trainer_that_waits():
    found = []

    def fetch(worker_id, batch_size):
        found.append(coordinator["train"].condition(0.0).state)
        return [np.zeros(4)]

    coordinator = iw.GlobalCoordinator()
    iw.init_data_input_workers("numpy", ["data"], fetch, 4, 0, coordinator=coordinator)
    with coordinator:
        coordinator["train"].next_batch()
        assert coordinator["train"].condition(0.0).state == "running"
    assert found == ["stalled"]


def test_a_source_that_broke_is_named_until_it_is_started_again(coordinator):
    gate = Gate()
    handle = register(coordinator, gate, name="bro\nken")
    source(coordinator, "whole")
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        coordinator.start()
        gate.raise_in(OSError("disk\n" + "x" * 1000))
        with pytest.raises(iw.FetchFailed):
            handle.next_batch()
        for _ in range(2):
            text = health(server)
            assert text.startswith("bro ken: failed: ")
            assert state(server, "bro\nken") == "failed"
            assert "whole" not in text
            assert text.count("\n") == 1
            assert len(text) <= pages_module.MAX_REASON_CHARS + 1
            coordinator.stop()  # a failure is no less one for that
        coordinator.start()
        assert health(server) == "ok\n"
        gate.open()


# /status.json


def test_the_status_is_what_stats_says():
    coordinator = source(source(iw.GlobalCoordinator()), "test", 80)
    with iw.serve_metrics(0, coordinator=coordinator, rank=3) as server:
        with coordinator:
            list(coordinator["train"])
        told = status(server)
        stats = coordinator["train"].stats()
    assert (told["version"], told["pid"], told["rank"]) == (iw.__version__, os.getpid(), "3")
    assert 0 <= told["uptime_seconds"] < 600
    assert list(told["sources"]) == ["train", "test"]
    train = told["sources"]["train"]
    assert train["ledger"] == stats.ledger
    assert {"state", "reason", "ledger", *stats.__dataclass_fields__} == set(train)
    assert train["rows_fetched"] == stats.rows_fetched == 1000
    assert train["rows_dropped"] == dict(stats.rows_dropped)
    assert train["devices"]["train"]["rows_delivered"] == stats.devices["train"].rows_delivered
    assert train["fetch"]["counts"] == list(stats.fetch.counts)


def test_numbers_become_json_whatever_they_are():
    value = {
        "nan": math.nan,
        "inf": [math.inf, -math.inf, 1.5],
        3: np.float32(2),
        "i": np.int64(7),
        "b": np.True_,
        "n": np.float64("nan"),
        "many": tuple(range(100)),
        "other": OSError("x"),
        "condition": iw.StopReport(True),
    }
    told = plain(value)
    json.dumps(told, allow_nan=False)
    assert told["nan"] is told["n"] is told["inf"][0] is told["inf"][1] is None
    assert (told["3"], told["i"], told["b"], told["other"]) == (2.0, 7, True, "x")
    assert told["many"] == list(range(100 - pages_module.KEPT_OF_A_LIST, 100))
    assert told["condition"]["stuck"] == []


def test_a_source_whose_numbers_cannot_be_read_hides_no_other(caplog):
    coordinator = source(source(iw.GlobalCoordinator(), "good"), "bad")
    coordinator["bad"]._core.stats = lambda: 1 / 0
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        told = status(server)["sources"]
    assert told["bad"]["error"] == "its numbers cannot be read: ZeroDivisionError"
    assert told["good"]["rows_fetched"] == 0


# Made anew, or not


class Clock:
    """Stands still, until it is told."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(pages_module, "time", clock)
    return clock


def test_a_page_is_made_anew_for_everybody_who_asks_now_and_then(clock):
    made = []
    memory = ShortMemory(lambda: made.append(0) or Page("", "", b"%d" % len(made)))
    for number in range(50):
        clock.now += 0.11
        assert memory.get().body == b"%d" % (number + 1)


def test_in_a_flood_it_is_at_most_a_little_old(clock):
    times = []
    memory = ShortMemory(lambda: times.append(clock.now) or Page("", "", b""))
    for _ in range(3000):
        clock.now += 0.001
        memory.get()
        assert clock.now - times[-1] <= pages_module.MOST_OLD_SECONDS + 0.001
    assert len(times) <= 3 * 10 + 11


def test_one_page_is_made_at_a_time_and_those_who_waited_get_it():
    entered, go_on, made = threading.Event(), threading.Event(), []

    def make():
        made.append(0)
        entered.set()
        assert go_on.wait(30.0)
        return Page("", "", b"%d" % len(made))

    memory = ShortMemory(make)

    def ask(number):
        if number:
            assert entered.wait(30.0)
        if number == 20:
            go_on.set()
        return memory.get().body

    bodies = in_threads(21, ask)
    assert len(made) <= 11  # until it is a flood
    assert bodies[0] == b"1"


def test_a_page_that_could_not_be_made_is_tried_again():
    outcomes = iter([1, 0])
    memory = ShortMemory(lambda: Page("", "", b"%d" % (1 // (1 - next(outcomes)))))
    with pytest.raises(ZeroDivisionError):
        memory.get()
    assert memory.get().body == b"1"
