"""Every panel and every rule on a real Prometheus: that each shows something, and that it is what the trainer does."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
from dashboards.prometheus_run import DASHBOARDS, Prometheus, running
from dashboards.promql import names_in
from dashboards.test_files import known_labels, panels_with_rows
from programs import needed

SOURCES = ("failing", "healthy", "slow")

# A panel of a board that shows an hour: a point each five seconds. Grafana makes the other from it and from the second
# between two scrapes: max(interval + scrape, 4 * scrape).
INTERVAL, RATE_INTERVAL = "5s", "6s"

Series: TypeAlias = "dict[str, list[float]]"  # values by legend; in a row for each source, by SOURCE/LEGEND


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with running(needed("prometheus"), tmp_path_factory.mktemp("prometheus")) as run:
        yield run


def filled(text: str, source: str) -> str:
    """Return an expression or legend as Grafana sends it, "All" being chosen but for the source."""
    values = {"__rate_interval": RATE_INTERVAL, "__interval": INTERVAL, "job": ".*", "instance": ".*", "source": source}
    return re.sub(r"\$(\w+)", lambda found: values[found[1]], text)


def legend(text: str, labels: dict[str, str]) -> str:
    """Return the name of a series. KeyError: the legend names a label that it has not."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels[found[1]], text)


def shown(prometheus: Prometheus, panel: dict[str, Any], row: dict[str, Any]) -> Series:
    """Return all series of a panel; each query of it has some."""
    series: Series = {}
    for source in SOURCES if row.get("repeat") == "source" else (".*",):
        for target in panel["targets"]:
            ask = prometheus.now if target.get("instant") else prometheus.over
            found = ask(filled(target["expr"], source))
            assert found, f"{panel['title']}: nothing is shown for {target['expr']}"
            for labels, values in found:
                name = legend(target["legendFormat"], labels)
                name = name if source == ".*" else f"{source}/{name}"
                assert name not in series, f"{panel['title']}: two series are called {name}"
                series[name] = [value for value in values if not math.isnan(value)]
    return series


def mid(values: list[float]) -> float:
    """Return the median of the later half: rates begin low."""
    return statistics.median(values[len(values) // 2 :])


def adds_up(series: Series, stage: str) -> bool:
    """Whether the shares of a stage's time never are more than the whole."""
    shares = [
        values for name, values in series.items() if name.split("/")[1] not in ("feed", "copying") and name.startswith(stage)
    ]
    return all(sum(each) <= 1.01 for each in zip(*shares, strict=True))


def shares_of(*wanted: tuple[str, float]) -> Callable[[Series], bool]:
    """Return a check of stacked shares: these are at least so large on the average."""
    return lambda series: (
        all(mid(series[name]) > least for name, least in wanted) and all(adds_up(series, source) for source in SOURCES)
    )


# Bounds are far from what is expected: the machine may be busy with other things.
CHECKS: dict[str, Callable[[Series], bool]] = {
    "Trainer waits now": lambda s: s["slow"][0] > 0.8 and s["healthy"][0] < 0.2,
    "State": lambda s: s == {"slow: running": [1], "healthy: running": [1], "failing: failed": [1]},
    "Rows a second now": lambda s: 1 < s["slow"][0] < 30 and 5 < s["healthy"][0] < 150,
    "Who is the bottleneck": lambda s: (
        set(s["slow: fetch"]) == set(s["healthy: trainer"]) == {1.0} and s["failing: stopped"][-1] == 1
    ),
    "Trainer waits": lambda s: mid(s["slow"]) > 0.8 and mid(s["healthy"]) < 0.2 and max(s["failing"]) > 0.5,
    "Rows": lambda s: (
        1 < mid(s["slow: delivered"]) < 30
        and 5 < mid(s["healthy: delivered"]) < 150
        and all(0.5 < mid(s[f"{each}: delivered"]) / mid(s[f"{each}: fetched"]) < 2 for each in ("slow", "healthy"))
        and max(s["failing: fetched"]) > max(s["failing: delivered"]) > 0
    ),
    "Batches by device": lambda s: 0.1 < mid(s["slow: slow"]) < 4 and 0.5 < mid(s["healthy: healthy"]) < 20,
    "Rows not sent yet": lambda s: mid(s["slow"]) < 1 and mid(s["healthy"]) > 4,
    "Device queues": lambda s: mid(s["slow: slow"]) < 1 and mid(s["healthy: healthy"]) > 1,
    "Fetchers": lambda s: s["slow: alive"][-1] == 1 and s["healthy: alive"][-1] == 2 and s["failing: alive"][-1] == 0,
    "Fetchers' time": shares_of(("slow/busy", 0.8), ("healthy/blocked", 0.5)),
    "Enqueuer's time": shares_of(("slow/starved", 0.8), ("healthy/blocked", 0.5)),
    "Trainer's time": shares_of(("slow/starved", 0.8), ("healthy/busy", 0.8)),
    "Duration of fetch calls": lambda s: max(s["+Inf"]) > max(s["0.1"]) > 0,
    "Fetch quantiles": lambda s: 0.2 < mid(s["slow: median"]) <= mid(s["slow: 99 %"]) < 3 and mid(s["healthy: median"]) < 0.1,
    "Parts of a fetch": lambda s: list(s) == ["slow: read"] and 0.35 < mid(s["slow: read"]) < 2,
    "Sending a batch": lambda s: 0 < mid(s["healthy: healthy"]) < 0.5,
    "Fetchers that wait or copy": lambda s: (
        mid(s["healthy: without room"]) > 0.5
        and max(s["slow: without room"]) < 0.2
        and all(0 < max(s[f"{each}: copying"]) < 0.5 for each in ("slow", "healthy"))
    ),
    "Errors": lambda s: list(s) == ["failing: BadRows"] and 0.5 < max(s["failing: BadRows"]) < 15,
    "Restarts of fetchers": lambda s: 0.5 < max(s["healthy"]) < 2 and max(s["slow"]) == max(s["failing"]) == 0,
    "Rows dropped": lambda s: (
        0.5 < max(s["failing: skipped_error"]) < 15
        and not any(max(values) for name, values in s.items() if not name.startswith("failing"))
    ),
    "Bytes that wait": lambda s: mid(s["healthy"]) > 4 * 2**18 and mid(s["slow"]) < 2**10,
    "Shared memory of worker processes": lambda s: s["healthy"][-1] >= 4 * 2**18 and max(s["slow"] + s["failing"]) == 0,
    "Memory of the trainers": lambda s: len(s) == 1 and all(10e6 < each < 10e9 for values in s.values() for each in values),
    "Cores of the trainers": lambda s: all(0 <= each < os.cpu_count() + 1 for values in s.values() for each in values),
}  # fmt: skip

PANELS = panels_with_rows(json.loads((DASHBOARDS / "grafana.json").read_text()))


def test_every_panel_is_looked_at() -> None:
    assert [panel["title"] for panel, _ in PANELS] == list(CHECKS)


@pytest.mark.parametrize(("panel", "row"), PANELS, ids=[panel["title"] for panel, _ in PANELS])
def test_a_panel_shows_what_the_trainer_does(prometheus: Prometheus, panel: dict[str, Any], row: dict[str, Any]) -> None:
    series = shown(prometheus, panel, row)
    assert CHECKS[panel["title"]](series), {name: values[-30:] for name, values in series.items()}


def test_the_verdicts_are_there_for_everybody_to_ask(prometheus: Prometheus) -> None:
    for source, verdict in (("slow", "fetch"), ("healthy", "trainer"), ("failing", "stopped")):
        selector = f'input_workers_verdict{{source="{source}", verdict="{verdict}"}}'
        ((labels, _),) = prometheus.now(f"max_over_time({selector}[5m]) == 1")
        assert labels["job"] == "input_workers"


@pytest.mark.parametrize("variable", ["job", "instance", "source"])
def test_a_variable_offers_what_there_is(prometheus: Prometheus, variable: str) -> None:
    board = json.loads((DASHBOARDS / "grafana.json").read_text())
    (query,) = [each["query"]["query"] for each in board["templating"]["list"] if each["name"] == variable]
    found = re.fullmatch(r"label_values\((.*), (\w+)\)", query)
    assert found
    offered = {labels[found[2]] for labels, _ in prometheus.now(filled(found[1], ".*"))}
    assert offered == set(SOURCES) if variable == "source" else len(offered) == 1


def test_every_rule_is_evaluated_and_asks_for_what_there_is(prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    recorded = {rule["name"] for rule in rules if rule["type"] == "recording"}
    labels = known_labels()
    assert recorded
    assert all(len(name.split(":")) == 3 for name in recorded)  # level:metric:operation
    for rule in rules:
        assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), rule
        names = names_in(rule["query"])
        assert names.metrics
        for metric, matched in names.metrics.items():
            assert metric in recorded or matched | names.grouped <= labels[metric], rule
        for metric, label, operator, text in names.matched:
            assert prometheus.now(f'{metric}{{{label}{operator}"{text}"}}'), rule
        told = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule.get("annotations", {}))))
        assert told <= {"source"}, rule
        assert rule["type"] == "recording" or {"severity"} == set(rule["labels"])
    for name in recorded:
        assert {labels["source"] for labels, _ in prometheus.now(name)} & set(SOURCES), name


def test_the_alerts_are_those_that_the_trainer_gives_cause_for(prometheus: Prometheus) -> None:
    found = {
        (labels["alertname"].removeprefix("InputWorkers"), labels["source"], labels["alertstate"])
        for labels, _ in prometheus.now("ALERTS")
    }
    assert found >= {
        ("SourceFailed", "failing", "firing"),
        ("FetchErrors", "failing", "pending"),  # for five minutes, before it fires
        ("WorkersRestarted", "healthy", "firing"),
        ("RowsDropped", "failing", "firing"),
    }
    assert not [each for each in found if each[1] == "healthy" and each[0] != "WorkersRestarted"]
    assert not [each for each in found if each[0] == "SourceStalled"]
