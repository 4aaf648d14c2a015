"""Reads a file in the Trace Event Format as strictly as it can be read: what is wrong with it fails the test that asks."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = {
    "call", "failed call", "no data", "waiting for room", "waiting for the worker", "waiting for memory", "copying",
    "waiting for rows", "send", "next_batch", "waiting for a batch", "training",
}  # fmt: skip

# A microsecond has three decimals here; what they cannot say is no overlap.
EXACT_US = 0.0015


@dataclass(frozen=True)
class Span:
    """A complete event."""

    name: str
    begin: float  # seconds since the trace began
    end: float
    args: dict[str, Any]

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    @property
    def is_open(self) -> bool:
        return "unfinished" in self.args


@dataclass
class Checked:
    """What a file shows."""

    about: dict[str, Any]
    rows: dict[tuple[str, str], list[Span]] = field(default_factory=dict)  # by names of process and thread
    counters: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    marks: list[str] = field(default_factory=list)
    pids: dict[int, str] = field(default_factory=dict)

    def row(self, thread: str, process: str = "trainer") -> list[Span]:
        """Return the spans of the only thread of this name."""
        return self.rows[process, thread]

    def spans(self, name: str, thread: str = "", process: str = "") -> list[Span]:
        """Return the spans of a name, on rows whose names begin like this."""
        return [
            span
            for (of, row), spans in self.rows.items()
            for span in spans
            if span.name == name and row.startswith(thread) and of.startswith(process)
        ]


def check_trace(path: Path, parts: set[str] = frozenset()) -> Checked:  # type: ignore[assignment]
    """Check the whole file; return what it shows. `parts` are names of `timed`."""
    whole = json.loads(path.read_text("utf-8"), parse_constant=_refuse)
    assert set(whole) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert whole["displayTimeUnit"] in ("ms", "ns")
    checked = Checked(whole["otherData"])
    threads: dict[tuple[int, int], str] = {}
    spans: dict[tuple[int, int], list[Span]] = defaultdict(list)
    seen: set[tuple[int, int]] = set()
    for event in whole["traceEvents"]:
        kind = event.pop("ph")
        for key in ("pid", "tid"):
            assert type(event[key]) is int, event
            assert event[key] >= 0, event
        assert type(event["name"]) is str, event
        at = event["pid"], event["tid"]
        {"M": _metadata, "X": _span, "C": _counter, "i": _mark}[kind](event, at, checked, threads, spans, parts)
        seen.add(at)
    assert {pid for pid, _ in seen} == set(checked.pids), "a process has no name"
    assert all(at in threads for at in seen if at[1] or at in spans), "a thread has no name"
    for at, row in spans.items():
        _check_nesting(row, threads[at])
        key = checked.pids[at[0]], threads[at]
        checked.rows.setdefault(key, []).extend(row)
    return checked


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def _time(event: dict[str, Any], key: str) -> float:
    assert type(event[key]) in (int, float), event
    assert math.isfinite(event[key]), event
    assert event[key] >= 0, event
    return float(event[key])


def _metadata(event: Any, at: Any, checked: Checked, threads: Any, spans: Any, parts: Any) -> None:
    assert set(event) == {"name", "pid", "tid", "args"}, event
    if event["name"] == "process_name":
        assert at[0] not in checked.pids, "a process has two names"
        checked.pids[at[0]] = event["args"]["name"]
    elif event["name"] == "thread_name":
        assert at not in threads, "a thread has two names"
        threads[at] = event["args"]["name"]
    else:
        assert event["name"] == "thread_sort_index"
        assert type(event["args"]["sort_index"]) is int


def _span(event: Any, at: Any, checked: Checked, threads: Any, spans: Any, parts: Any) -> None:
    assert set(event) == {"name", "pid", "tid", "ts", "dur", "args"}, event
    assert event["name"] in NAMES | parts, event
    ts, dur = _time(event, "ts"), _time(event, "dur")
    assert ts + dur <= checked.about["seconds"] * 1e6 + EXACT_US, "after the end"
    assert not spans[at] or ts >= spans[at][-1].begin * 1e6 - 1e-6, "not in the order of time"
    for key, value in event["args"].items():
        assert type(value) is {"request": int, "device": str, "unfinished": bool}[key], event
    spans[at].append(Span(event["name"], ts / 1e6, (ts + dur) / 1e6, event["args"]))


def _counter(event: Any, at: Any, checked: Checked, threads: Any, spans: Any, parts: Any) -> None:
    assert set(event) == {"name", "pid", "tid", "ts", "args"}, event
    assert list(event["args"]) == ["batches"]
    values = checked.counters.setdefault(event["name"], [])
    ts = _time(event, "ts")
    assert not values or ts >= values[-1][0]
    values.append((ts, _time(event["args"], "batches")))


def _mark(event: Any, at: Any, checked: Checked, threads: Any, spans: Any, parts: Any) -> None:
    assert set(event) == {"name", "pid", "tid", "ts", "s"}, event
    assert event["s"] in ("g", "p", "t")
    _time(event, "ts")
    checked.marks.append(event["name"])


def _check_nesting(row: list[Span], thread: str) -> None:
    """Of two spans of a thread one is inside the other, or they do not overlap."""
    around: list[Span] = []
    for span in row:
        while around and span.begin >= around[-1].end - EXACT_US / 1e6:
            around.pop()
        if around:
            assert span.end <= around[-1].end + EXACT_US / 1e6, f"{thread}: {span} reaches out of {around[-1]}"
        around.append(span)
