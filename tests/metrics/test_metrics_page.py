"""What /metrics says, of sources with any name, and whatever goes wrong in one of them; storms of errors and of scrapes."""

import gc
import types
import weakref

import pytest
from gates import await_true
from hypothesis import given, settings
from hypothesis import strategies as st
from metrics import storms
from metrics.http_client import get, samples, source
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

import input_workers as iw
from input_workers.metrics.exporter import StatsCollector
from input_workers.metrics.instruments import INSTRUMENTS


def numbers(families):
    """Everything but the order of labels."""
    return [
        (family.name, family.type, family.documentation, sample.name, sorted(sample.labels.items()), sample.value)
        for family in families
        for sample in family.samples
    ]


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


def test_200_sources_that_come_and_go_leave_nothing():
    storms.come_and_go(200)


def test_a_storm_of_10000_errors_is_counted_and_written_few_times(caplog):
    storms.errors(10_000, caplog)


def test_every_page_is_whole_and_no_counter_falls_for_8_who_look_while_sources_start_and_stop():
    storms.looks(8, 0.0)
