"""The exporter: what a scrape shows is what stats() says, whatever clients and sources do."""

import itertools
import mmap
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import numpy as np
import psutil
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

import input_workers as iw
from input_workers.metrics.exporter import StatsCollector
from input_workers.metrics.instruments import INSTRUMENTS

DESIGNED = {  # the names other programs rely on
    "input_workers_rows_fetched_total": {"source"},
    "input_workers_rows_delivered_total": {"source", "device"},
    "input_workers_rows_dropped_total": {"source", "reason"},
    "input_workers_batches_total": {"source", "device"},
    "input_workers_inputs_per_second": {"source", "device"},
    "input_workers_queue_depth": {"source", "queue", "device"},
    "input_workers_queue_bytes": {"source"},
    "input_workers_block_bytes": {"source"},
    "input_workers_fetch_seconds": {"source"},
    "input_workers_enqueue_seconds": {"source", "device"},
    "input_workers_consumer_wait_seconds_total": {"source", "device"},
    "input_workers_fetcher_blocked_seconds_total": {"source"},
    "input_workers_fetcher_copying_seconds_total": {"source"},
    "input_workers_fetch_errors_total": {"source", "error"},
    "input_workers_fetchers": {"source", "state"},
    "input_workers_fetcher_restarts_total": {"source"},
    "input_workers_fetch_part_seconds": {"source", "part"},
    "input_workers_stage_share": {"source", "stage", "state"},
    "input_workers_verdict": {"source", "verdict"},
    "input_workers_state": {"source", "state"},
}
OF_PROCESS = {
    "process_cpu_seconds_total",
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_virtual_memory_bytes",
}


def source(coordinator, name="train", rows=1000, scopes=("",), workers=1):
    stream = iw.Stream(iw.sources.Arrays(np.arange(rows), np.zeros((rows, 5), np.float32)), rows_per_request=7)
    for scope in scopes:
        iw.init_data_input_workers(
            "numpy", ["label", "data"], stream, 8, workers, name, name_scope=scope, coordinator=coordinator
        )
    return coordinator


def scrape(server, accept=""):
    request = urllib.request.Request(f"{server.url}/metrics", headers={"Accept": accept} if accept else {})
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode()


def samples(text):
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(text)
        for sample in family.samples
        if sample.name not in OF_PROCESS
    }


def value(found, name, **labels):
    return found[name, frozenset(labels.items())]


def test_the_table_has_the_designed_names_and_labels():
    assert {each.name: set(each.labels) for each in INSTRUMENTS} == DESIGNED
    assert all((each.kind == "counter") == each.name.endswith("_total") for each in INSTRUMENTS)
    assert all(each.labels[0] == "source" and each.text.endswith(".") for each in INSTRUMENTS)


def test_a_scrape_shows_what_stats_says():
    coordinator = source(iw.GlobalCoordinator(), scopes=("gpu_0", "gpu_1"))
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        with coordinator:
            for pair in zip(coordinator["gpu_0/train"], coordinator["gpu_1/train"], strict=True):
                assert len(pair) == 2
        stats = coordinator["train"].stats()
        found = samples(scrape(server))
    assert value(found, "input_workers_rows_fetched_total", source="train") == stats.rows_fetched == 1000
    for reason, rows in stats.rows_dropped.items():
        assert value(found, "input_workers_rows_dropped_total", source="train", reason=reason) == rows
    assert stats.rows_dropped["final_partial"] == 1000 % 16
    for name, device in stats.devices.items():
        labels = {"source": "train", "device": name}
        assert value(found, "input_workers_rows_delivered_total", **labels) == device.rows_delivered == 496
        assert value(found, "input_workers_batches_total", **labels) == device.batches_delivered == 62
        assert value(found, "input_workers_consumer_wait_seconds_total", **labels) == device.wait_seconds
        assert value(found, "input_workers_enqueue_seconds_count", **labels) == device.send.count
        assert value(found, "input_workers_enqueue_seconds_sum", **labels) == device.send.seconds
        assert value(found, "input_workers_queue_depth", queue="device", **labels) == 0
    assert value(found, "input_workers_queue_depth", source="train", queue="chunks", device="") == stats.queue_depth
    assert value(found, "input_workers_queue_bytes", source="train") == stats.queue_bytes
    assert value(found, "input_workers_fetchers", source="train", state="alive") == stats.fetchers_alive
    assert value(found, "input_workers_fetcher_blocked_seconds_total", source="train") == stats.fetcher_blocked_seconds
    copying = value(found, "input_workers_fetcher_copying_seconds_total", source="train")
    assert 0 < copying == stats.fetcher_copying_seconds < stats.fetcher_busy_seconds
    share = value(found, "input_workers_stage_share", source="train", stage="copying", state="busy")
    assert share == stats.windows["10s"].copying


def test_histograms_are_cumulative_and_end_with_the_count():
    coordinator = source(iw.GlobalCoordinator())
    with coordinator, iw.serve_metrics(0, coordinator=coordinator) as server:
        list(coordinator["train"])
        stats = coordinator["train"].stats()
        families = {family.name: family for family in parse(scrape(server))}
    buckets = [sample for sample in families["input_workers_fetch_seconds"].samples if sample.name.endswith("_bucket")]
    counts = [sample.value for sample in buckets]
    assert counts == list(itertools.accumulate(stats.fetch.counts))
    assert [float(sample.labels["le"]) for sample in buckets] == [*stats.fetch.bounds, float("inf")]
    assert counts[-1] == stats.fetch.count >= 1000 // 7


def test_every_family_of_the_table_is_shown_and_no_other():
    def fetch(worker_id, batch_size):
        with iw.timed("read"):
            raise OSError("no disk")

    coordinator = iw.GlobalCoordinator()
    iw.init_data_input_workers("numpy", ["data"], fetch, 4, 1, coordinator=coordinator)
    with coordinator, iw.serve_metrics(0, coordinator=coordinator) as server:
        with pytest.raises(iw.FetchFailed):
            coordinator["train"].next_batch()
        text = scrape(server)
    shown = {sample.name for family in parse(text) for sample in family.samples}
    wanted = set()
    for each in INSTRUMENTS:
        wanted |= {f"{each.name}{end}" for end in ("_bucket", "_count", "_sum")} if each.kind == "histogram" else {each.name}
    assert shown == wanted | OF_PROCESS
    assert value(samples(text), "input_workers_fetch_errors_total", source="train", error="OSError") == 1


def test_the_memory_of_the_process_is_shown():
    with iw.serve_metrics(0, coordinator=iw.GlobalCoordinator()) as server:
        families = {family.name: family for family in parse(scrape(server))}
    (resident,) = families["process_resident_memory_bytes"].samples
    assert resident.value == pytest.approx(psutil.Process().memory_info().rss, rel=0.5)
    assert families["process_cpu_seconds"].type == "counter"


def test_the_shared_memory_of_worker_processes_is_shown_until_it_is_let_go():
    coordinator = iw.GlobalCoordinator()
    stream = iw.Stream(iw.sources.Arrays(np.zeros((40, 25_000), np.float32)), rows_per_request=4)  # 400 KB a chunk
    iw.init_data_input_workers("numpy", ["data"], stream, 4, 1, fetchers="process", coordinator=coordinator)
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        assert value(samples(scrape(server)), "input_workers_block_bytes", source="train") == 0
        with coordinator:
            batch = coordinator["train"].next_batch(60.0)
            held = value(samples(scrape(server)), "input_workers_block_bytes", source="train")
            assert 400_000 <= held <= 400_000 * 40
        after = value(samples(scrape(server)), "input_workers_block_bytes", source="train")
        assert after == -(-400_000 // mmap.PAGESIZE) * mmap.PAGESIZE  # the block that the trainer holds
        assert batch.data.nbytes == 400_000
        del batch
        assert value(samples(scrape(server)), "input_workers_block_bytes", source="train") == 0


HOSTILE = ['a"b', "a\\b", "a\nb", 'a"} 1\nother{x="', "\\n\\", "é漢🎉", "x" * 10_000, " ", "{}", "%s %d%%", "\0"]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_source_name_is_only_a_label(name):
    coordinator = source(iw.GlobalCoordinator(), name)
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        found = samples(scrape(server))
    assert {dict(labels)["source"] for _, labels in found} == {name}
    assert value(found, "input_workers_rows_fetched_total", source=name) == 0


def test_a_lone_surrogate_in_a_name_is_escaped():
    coordinator = source(iw.GlobalCoordinator(), "a\ud800")
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        assert value(samples(scrape(server)), "input_workers_rows_fetched_total", source="a\\ud800") == 0


def test_openmetrics_is_spoken_to_those_who_ask_for_it():
    coordinator = source(iw.GlobalCoordinator())
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        text = scrape(server, "application/openmetrics-text; version=1.0.0")
    wanted = {name.removesuffix("_total") for name in OF_PROCESS | {each.name for each in INSTRUMENTS}}
    assert {family.name for family in parse_openmetrics(text)} == wanted


def test_a_source_whose_stats_raise_does_not_hide_the_others(caplog):
    coordinator = source(source(iw.GlobalCoordinator(), "good"), "bad")
    coordinator["bad"]._core.stats = lambda: 1 / 0  # a defect of ours: nothing a user can do makes stats raise
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        for _ in range(3):
            assert {dict(labels)["source"] for _, labels in samples(scrape(server))} == {"good"}
    assert [record.message for record in caplog.records] == ["source 'bad': its numbers cannot be read, and are left out"]


def test_scrapes_parse_and_counters_never_fall_while_sources_start_and_stop():
    coordinator = source(iw.GlobalCoordinator(), rows=200, workers=2)
    failures, texts = [], [[], []]
    finished = threading.Event()

    def keep_scraping(server, mine):
        try:
            while not finished.is_set():
                mine.append(scrape(server))
        except Exception as error:
            failures.append(error)

    with iw.serve_metrics(0, coordinator=coordinator) as server:
        scrapers = [threading.Thread(target=keep_scraping, args=(server, mine)) for mine in texts]
        for scraper in scrapers:
            scraper.start()
        for run in range(30):
            with coordinator:
                for _ in range(run % 5):
                    coordinator["train"].next_batch()
            if run % 10 == 0:
                source(coordinator, f"more_{run}")
        finished.set()
        for scraper in scrapers:
            scraper.join()
    assert not failures
    counters = {each.name for each in INSTRUMENTS if each.kind == "counter"}
    for mine in texts:
        assert mine
        highest = {}
        for text in mine:
            for key, number in samples(text).items():
                if key[0] in counters:
                    assert number >= highest.get(key, 0)
                    highest[key] = number


def test_sources_without_a_coordinator_named_are_those_of_the_global_one():
    with iw.serve_metrics(0) as server:
        assert {family.name for family in parse(scrape(server))} >= {"input_workers_queue_depth"}


def test_a_taken_port_is_an_error_that_says_so():
    with iw.serve_metrics(0) as server, pytest.raises(iw.ConfigError, match=f"port {server.port}: .*in use"):
        iw.serve_metrics(server.port)


@pytest.mark.parametrize("port", [-1, 65536, "9108", True, None])
def test_a_wrong_port_is_an_error(port):
    with pytest.raises(iw.ConfigError, match="port: got"):
        iw.serve_metrics(port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "a" * 300, "é" * 70])
def test_a_wrong_host_is_an_error(host):
    with pytest.raises(iw.ConfigError, match="metrics on"):
        iw.serve_metrics(0, host)


def test_close_is_idempotent_frees_the_port_and_leaves_no_thread():
    before = set(threading.enumerate())
    server = iw.serve_metrics(0)
    threads = set(threading.enumerate()) - before
    assert all(thread.daemon and thread.name.startswith("metrics-") for thread in threads)
    assert f"metrics-{server.port}" in {thread.name for thread in threads}
    for _ in range(3):
        server.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((server.host, server.port))
    iw.serve_metrics(server.port).close()


def test_it_listens_on_loopback_and_says_where():
    with iw.serve_metrics(0) as server:
        assert server.url == f"http://127.0.0.1:{server.port}"
        assert scrape(server)


def test_other_methods_are_refused():
    with iw.serve_metrics(0) as server, pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(f"{server.url}/metrics", data=b"x").close()


def test_the_collector_reads_no_source_when_it_is_made():
    assert [family.samples for family in StatsCollector(source(iw.GlobalCoordinator())).describe()] == [[]] * len(INSTRUMENTS)


def test_importing_the_package_does_not_load_prometheus_client_or_waitress():
    code = "import sys, input_workers as iw; {} print(*(name in sys.modules for name in ('prometheus_client', 'waitress')))"
    for use, loaded in ("", "False False"), ("iw.serve_metrics;", "True True"):
        result = subprocess.run([sys.executable, "-c", code.format(use)], capture_output=True, text=True, timeout=60)
        assert result.stdout.strip() == loaded, result.stderr


def test_a_missing_prometheus_client_is_an_error_that_names_it():
    code = "import sys; sys.modules['prometheus_client'] = None\nimport input_workers as iw\niw.serve_metrics"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "ConfigError: metrics need prometheus_client" in result.stderr
    assert "pip install prometheus-client" in result.stderr


def test_a_missing_waitress_is_an_error_that_names_it():
    code = "import sys; sys.modules['waitress'] = None\nimport input_workers as iw\niw.serve_metrics"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "ConfigError: serving metrics needs waitress" in result.stderr
    assert "pip install waitress" in result.stderr
