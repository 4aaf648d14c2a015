"""The files of `dashboards/`: that Prometheus takes them, and that a board holds together and names what there is."""

from __future__ import annotations

import itertools
import json
import pathlib
import re
import subprocess
from typing import Any

import pytest
from dashboards.prometheus_run import DASHBOARDS
from dashboards.promql import names_in
from programs import needed
from prometheus_client.process_collector import ProcessCollector

from input_workers.metrics.instruments import INSTRUMENTS

HERE = pathlib.Path(__file__).parent
OF_TARGET = {"job", "instance", "rank"}
OF_GRAFANA = {"__rate_interval", "__interval", "__all"}
GRID_COLUMNS = 24


def known_labels() -> dict[str, set[str]]:
    """Return the labels of every series that there may be."""
    known = {sample.name: set(OF_TARGET) for family in ProcessCollector(registry=None).collect() for sample in family.samples}
    for each in INSTRUMENTS:
        labels = {*each.labels, *OF_TARGET}
        if each.kind == "histogram":
            known |= {f"{each.name}_bucket": labels | {"le"}, f"{each.name}_count": labels, f"{each.name}_sum": labels}
        else:
            known[each.name] = labels
    return known


def panels_with_rows(board: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the panels, each with its row, from above to below."""
    found = []
    row: dict[str, Any] = {}
    for panel in board["panels"]:
        if panel["type"] == "row":
            assert panel["panels"] == []  # they follow it
            row = panel
        else:
            found.append((panel, row))
    return found


def strings(value: Any) -> list[str]:
    """Return every text in a board."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return list(itertools.chain.from_iterable(map(strings, inner)))


@pytest.fixture
def board() -> Any:
    return json.loads((DASHBOARDS / "grafana.json").read_text())


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "--lint=all", "--lint-fatal", "rules.yml", "alerts.yml"),
        ("test", "rules", str(HERE / "alerts_test.yml")),
    ],
    ids=" ".join,
)
def test_promtool_is_content(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([needed("promtool"), *arguments], cwd=DASHBOARDS, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test() -> None:
    alerts = re.findall(r"- alert: (\w+)", (DASHBOARDS / "alerts.yml").read_text())
    tested = re.findall(r"- alertname: (\w+)\n *eval_time: \w+\n *exp_alerts:", (HERE / "alerts_test.yml").read_text())
    assert alerts
    assert set(alerts) == set(tested)


def test_ids_are_unique_and_panels_lie_side_by_side(board: Any) -> None:
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        at = panel["gridPos"]
        assert 0 <= at["x"] < at["x"] + at["w"] <= GRID_COLUMNS
        for cell in itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])):
            assert cell not in taken, f"{panel['title']} lies over {taken.get(cell)}"
            taken[cell] = panel["title"]
    assert len(taken) == GRID_COLUMNS * (1 + max(y for _, y in taken))  # no holes
    tops = [panel["gridPos"]["y"] for panel in board["panels"]]
    assert tops == sorted(tops)  # a row has those that follow it


def test_every_variable_that_is_used_is_declared_and_the_other_way_round(board: Any) -> None:
    declared = [each["name"] for each in board["templating"]["list"]]
    used = set(re.findall(r"\$\{?(\w+)", " ".join(strings(board))))
    assert used - OF_GRAFANA == set(declared) == {"datasource", "job", "instance", "source"}
    for panel, _ in panels_with_rows(board):
        for target in panel["targets"]:
            chosen = names_in(re.sub(r"\$__\w+", "1m", target["expr"])).matched
            for label in ("job", "instance", *(() if "process_" in target["expr"] else ("source",))):
                assert [each for each in chosen if each[1:] == (label, "=~", f"${label}")], target


def test_every_panel_says_what_it_shows_in_which_unit_and_what_is_bad(board: Any) -> None:
    for panel, row in panels_with_rows(board):
        defaults = panel["fieldConfig"]["defaults"]
        assert row["title"]
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert defaults["unit"]
        steps = defaults["thresholds"]["steps"]
        bounds = [step["value"] for step in steps[1:]]
        assert steps[0]["value"] is None
        assert bounds == sorted(bounds)
        assert all(step["color"] for step in steps)
        assert panel["datasource"] == {"type": "prometheus", "uid": "$datasource"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        assert all(target["datasource"] == panel["datasource"] and target["legendFormat"] for target in panel["targets"])


def test_the_board_names_only_metrics_and_labels_of_the_table(board: Any) -> None:
    known = known_labels()
    expressions = [target["expr"] for panel, _ in panels_with_rows(board) for target in panel["targets"]]
    queries = [each["query"]["query"] for each in board["templating"]["list"] if each["type"] == "query"]
    expressions += [query.removeprefix("label_values(").rpartition(",")[0] for query in queries]
    for expression in expressions:
        names = names_in(re.sub(r"\$__\w+", "1m", expression))
        assert names.metrics, expression
        for metric, labels in names.metrics.items():
            assert labels <= known[metric], expression
            assert names.grouped <= known[metric], expression


def test_the_board_shows_every_metric_of_the_table(board: Any) -> None:
    text = " ".join(strings(board))
    assert [each.name for each in INSTRUMENTS if each.name not in text] == []


@pytest.mark.parametrize(
    ("expression", "metrics", "grouped"),
    [
        ('sum by (a, b) (rate(m_total{x="1, {y}", z=~"a|\\"b"}[5m])) > 0.2', {"m_total": {"x", "z"}}, {"a", "b"}),
        ("l:m:rate5m / on (j) group_left (k) n unless 1e3 < 2", {"l:m:rate5m": set(), "n": set()}, {"j", "k"}),
        ("avg without (d) (m) == 1", {"m": set()}, {"d"}),
    ],
)
def test_names_are_read_from_promql(expression: str, metrics: dict[str, set[str]], grouped: set[str]) -> None:
    names = names_in(expression)
    assert (names.metrics, names.grouped) == (metrics, grouped)


@pytest.mark.parametrize("expression", ["smu(m)", "m ? n", '{a="b"}', "m{a=b}", "rate m"])
def test_what_is_not_understood_is_not_passed_over(expression: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        names_in(expression)
