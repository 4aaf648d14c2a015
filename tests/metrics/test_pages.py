"""The pages: what /metrics, /healthz and /status.json say, of sources in every state and with any name."""

import gc
import json
import logging
import math
import os
import threading
import time
import types
import weakref
from typing import get_args, get_type_hints

import numpy as np
import pytest
from gates import Gate, await_true, register
from hypothesis import given, settings
from hypothesis import strategies as st
from metrics.http_client import get, in_threads, source
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

import input_workers as iw
from input_workers.coordinator.condition import Condition
from input_workers.metrics import pages as pages_module
from input_workers.metrics.exporter import StatsCollector
from input_workers.metrics.instruments import INSTRUMENTS, STATES
from input_workers.metrics.pages import Page, ShortMemory, plain

SOON = 0.001  # seconds after which a trainer that waits is a case for the doctor


def health(server):
    status, text = get(server, "/healthz")
    assert (status, text) == (200, "ok\n") or status == 503
    return text


def status(server):
    code, text = get(server, "/status.json")
    assert code == 200
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def samples(text):
    """Those of sources."""
    families = [family for family in parse(text) if not family.name.startswith("process_")]
    return [sample for family in families for sample in family.samples]


def state(server, name="train"):
    """Return the state of a source, of which /status.json and the metrics say the same."""
    told = [sample for sample in samples(get(server)[1]) if sample.name == "input_workers_state"]
    mine = {sample.labels["state"]: sample.value for sample in told if sample.labels["source"] == name}
    assert tuple(mine) == STATES == get_args(get_type_hints(Condition)["state"])
    assert sorted(mine.values()) == [0, 0, 0, 0, 0, 1]
    shown = status(server)["sources"][name]["state"]
    assert mine[shown] == 1
    return shown


def numbers(families):
    """Everything but the order of labels."""
    return [
        (family.name, family.type, family.documentation, sample.name, sorted(sample.labels.items()), sample.value)
        for family in families
        for sample in family.samples
    ]


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


# /metrics


def test_a_source_of_which_one_number_is_wrong_is_left_out_as_a_whole(caplog):
    coordinator = source(source(iw.GlobalCoordinator(), "good"), "bad")
    stats = coordinator["bad"].stats()
    half = types.SimpleNamespace(**{name: getattr(stats, name) for name in stats.__dataclass_fields__ if name != "queue_bytes"})
    coordinator["bad"]._core.stats = lambda: half
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        for _ in range(3):
            assert {sample.labels["source"] for sample in samples(get(server)[1])} == {"good"}
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("rank", "label"), [(0, "0"), (7, "7"), ("a\ud800", "a\\ud800"), ("auto", "12")])
def test_the_rank_is_a_label_of_every_metric(monkeypatch, rank, label):
    monkeypatch.setenv("RANK", "12")
    coordinator = source(iw.GlobalCoordinator())
    with iw.serve_metrics(0, coordinator=coordinator, rank=rank) as server:
        found = [sample for family in parse(get(server)[1]) for sample in family.samples]
    assert {sample.name for sample in found} >= {"process_open_fds", "input_workers_queue_bytes"}
    assert {sample.labels["rank"] for sample in found} == {label}


@pytest.mark.parametrize("more", [{"rank": "auto"}, {"rank": ""}, {"rank": True}, {"rank": 1.5}, {"stalled_after_s": 0}])
def test_a_wrong_argument_is_an_error(monkeypatch, more):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(iw.ConfigError, match=next(iter(more))):
        iw.serve_metrics(0, **more)


def test_without_a_rank_there_is_no_such_label():
    with iw.serve_metrics(0, coordinator=source(iw.GlobalCoordinator())) as server:
        assert "rank" not in get(server)[1]


@settings(max_examples=60)
@given(st.lists(st.text(max_size=30) | st.text('"\\\n\r{}=,# \ud800\u2028', max_size=12), min_size=1, max_size=4, unique=True))
def test_whatever_a_source_is_called_the_pages_parse(names):
    coordinator = iw.GlobalCoordinator()
    taken = []
    for name in names:
        try:
            source(coordinator, name, 8)
        except iw.ConfigError:
            continue
        taken.append(name)
    registry = CollectorRegistry()
    collector = StatsCollector(coordinator, rank=names[0].encode("utf-8", "backslashreplace").decode())
    registry.register(collector)
    shown = {name.encode("utf-8", "backslashreplace").decode() for name in taken}
    text = collector.text(openmetrics=False)
    assert numbers(parse(text)) == numbers(parse(generate_latest(registry).decode()))
    assert {sample.labels["source"] for sample in samples(text)} == shown
    assert len(samples(text)) >= len(INSTRUMENTS) * len(shown)
    told, theirs = (list(parse_openmetrics(each)) for each in (collector.text(True), generate_openmetrics(registry).decode()))
    assert numbers(told) == numbers(theirs)
    assert {sample.labels["source"] for family in told for sample in family.samples} == shown


def test_the_text_is_the_one_that_prometheus_client_writes():
    coordinator = source(iw.GlobalCoordinator(), 'a"b')
    with coordinator:
        list(coordinator['a"b'])
    registry, collector = CollectorRegistry(), StatsCollector(coordinator)
    registry.register(collector)
    stats = coordinator['a"b'].stats()
    coordinator['a"b']._core.stats = lambda: stats
    for openmetrics, theirs, parser in ((False, generate_latest, parse), (True, generate_openmetrics, parse_openmetrics)):
        told, wanted = collector.text(openmetrics), theirs(registry).decode()
        assert numbers(parser(told)) == numbers(parser(wanted))
        assert [line for line in told.splitlines() if line[0] == "#"] == [x for x in wanted.splitlines() if x[0] == "#"]


def test_sources_come_and_go_and_so_do_their_series():
    shown = []
    for round_ in range(30):
        coordinator = source(iw.GlobalCoordinator(), f"s{round_}", 8)
        with iw.serve_metrics(0, coordinator=coordinator) as server:
            shown.append({sample.labels["source"] for sample in samples(get(server)[1])})
            gone = weakref.ref(coordinator)
            del coordinator
            await_true(lambda gone=gone: gc.collect() >= 0 and gone() is None, "a dropped coordinator is collected")
            assert samples(get(server)[1]) == []
    assert shown == [{f"s{round_}"} for round_ in range(30)]


def test_kinds_of_errors_are_bounded_and_their_counts_never_fall():
    coordinator = source(iw.GlobalCoordinator())
    collector = StatsCollector(coordinator)
    stats = coordinator["train"].stats()
    errors = {}
    coordinator["train"]._core.stats = lambda: types.SimpleNamespace(
        **{name: getattr(stats, name) for name in stats.__dataclass_fields__ if name != "fetch_errors"},
        fetch_errors=dict(reversed(errors.items())),
    )
    before = {}
    for number in range(300):
        errors[f"Error{number}"] = number
        errors["other"] = 1
        families = [family for family in collector.collect() if family.name == "input_workers_fetch_errors"]
        found = {sample.labels["error"]: sample.value for sample in families[0].samples}
        assert len(found) <= 51
        assert sum(found.values()) == sum(errors.values())
        assert all(found[label] >= value for label, value in before.items())
        before = found


def test_a_storm_of_errors_is_counted_and_written_few_times(caplog):
    caplog.set_level(logging.INFO)

    class Broken:
        def __len__(self):
            return 5000

        def fetch(self, rows, request):
            raise ValueError("no")

    coordinator = iw.GlobalCoordinator()
    policy = iw.ErrorPolicy(skip=True)
    stream = iw.Stream(Broken(), rows_per_request=100)
    iw.init_data_input_workers("numpy", ["data"], stream, 4, 1, on_error=policy, coordinator=coordinator)
    began = time.monotonic()
    with coordinator, iw.serve_metrics(0, coordinator=coordinator) as server:
        assert list(coordinator["train"]) == []
        errors = [sample for sample in samples(get(server)[1]) if sample.labels.get("error")]
    assert [sample.labels["error"] for sample in errors] == ["ValueError"]
    assert errors[0].value >= 5000
    assert len(caplog.records) <= 10 * (1 + time.monotonic() - began)


def test_every_page_is_whole_and_no_counter_falls_while_sources_start_and_stop():
    coordinator = source(iw.GlobalCoordinator(), rows=200, num_workers=2)
    finished = threading.Event()
    counters = {each.name for each in INSTRUMENTS if each.kind == "counter"}

    def look(number):
        highest = {}
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

    def run(number):
        if number:
            return look(number - 1)
        try:
            for round_ in range(20):
                with coordinator:
                    for _ in range(round_ % 5):
                        coordinator["train"].next_batch()
                if round_ % 7 == 0:
                    source(coordinator, f"more_{round_}", 80)
        finally:
            finished.set()
        return 1

    with iw.serve_metrics(0, coordinator=coordinator) as server:
        assert all(in_threads(9, run))


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
