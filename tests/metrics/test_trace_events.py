"""The file of a trace: what was recorded by hand comes out exactly, cut to its window; a checker reads it, and finds faults."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from metrics.trace_checker import check_trace

from input_workers.metrics import trace as trace_module
from input_workers.metrics.device_recorder import DeviceRecorder
from input_workers.metrics.recorder import SourceRecorder
from input_workers.metrics.trace import SourceTrace, Trace
from input_workers.metrics.trace_events import text_of, unfinished

BEGAN = 1000.0


class Bench:
    """A trace of one source with one fetcher and one device, whose times are made up."""

    def __init__(self, in_processes: bool = False) -> None:
        self.source = SourceRecorder({"train": DeviceRecorder()})
        self.fetcher = self.source.fetcher(7)
        self.trace = Trace("t.json", 5.0)
        self.trace.began, self.trace.until = BEGAN, BEGAN + 5.0
        mine = SourceTrace(self.trace, "train", in_processes)
        self.source.begin_trace(mine)
        self.trace.sources.append(mine)
        track = self.fetcher.trace
        assert track is not None
        self.track = track

    def write(self, path: Path, ended: float = BEGAN + 5.0) -> Any:
        self.source.end_trace()
        going_on = unfinished(self.trace, [self.source])
        path.write_text("".join(text_of(self.trace, ended, going_on)))
        return check_trace(path, {"read", "x" * 200, 'a "name"\n\ud800'})


def spans(checked: Any, thread: str = "fetcher-train-7") -> list[tuple[str, float, float]]:
    return [(span.name, pytest.approx(span.begin, abs=1e-9), pytest.approx(span.end, abs=1e-9)) for span in checked.row(thread)]


def test_spans_come_out_with_the_outer_ones_first(tmp_path: Path) -> None:
    bench = Bench()
    bench.track.add("read", BEGAN + 1.25, BEGAN + 1.5)
    bench.track.add("call", BEGAN + 1.0, BEGAN + 2.0, 3)
    bench.track.add("waiting for room", BEGAN + 2.0, BEGAN + 2.0000005)
    checked = bench.write(tmp_path / "t")
    assert spans(checked) == [("call", 1.0, 2.0), ("read", 1.25, 1.5), ("waiting for room", 2.0, 2.0000005)]
    assert checked.row("fetcher-train-7")[0].args == {"request": 3}
    assert checked.about["seconds"] == checked.about["asked_seconds"] == 5.0
    assert not checked.about["is_cut"]


def test_what_lies_across_the_edges_is_cut_and_what_lies_outside_left_out(tmp_path: Path) -> None:
    bench = Bench()
    for begin, end in ((-2, -1), (-1, 1), (3, 6), (7, 8)):
        bench.track.add("call", BEGAN + begin, BEGAN + end)
    bench.trace.add_depth(BEGAN + 1, "queue", 2.5)
    bench.trace.add_depth(BEGAN + 6, "queue", 3)
    checked = bench.write(tmp_path / "t")
    assert spans(checked) == [("call", 0.0, 1.0), ("call", 3.0, 5.0)]
    assert [span.is_open for span in checked.row("fetcher-train-7")] == [False, True]
    assert checked.counters == {"queue": [(1e6, 2.5)]}


def test_what_goes_on_at_the_end_is_shown_as_unfinished(tmp_path: Path) -> None:
    bench = Bench()
    bench.fetcher.call_started = BEGAN + 4
    bench.source.enqueuer_starved = (0.0, BEGAN + 3)
    bench.source.devices["train"].waits = (0.0, {1234: BEGAN + 2})
    checked = bench.write(tmp_path / "t")
    assert {thread: spans(checked, thread) for _, thread in checked.rows} == {
        "fetcher-train-7": [("call", 4.0, 5.0)],
        "enqueuer-train": [("waiting for rows", 3.0, 5.0)],
        "trainer 1234": [("waiting for a batch", 2.0, 5.0)],
    }
    assert all(span.is_open for row in checked.rows.values() for span in row)


def test_a_call_that_has_just_ended_is_not_shown_twice(tmp_path: Path) -> None:
    bench = Bench()
    bench.track.add("call", BEGAN + 4, BEGAN + 4.5)
    bench.fetcher.call_started = BEGAN + 4  # as it stands until the next begins
    assert spans(bench.write(tmp_path / "t")) == [("call", 4.0, 4.5)]


def test_a_call_that_follows_at_once_is_shown_too(tmp_path: Path) -> None:
    bench = Bench()
    bench.track.add("call", BEGAN + 4, BEGAN + 4.5)
    bench.fetcher.call_started = BEGAN + 4.5
    assert spans(bench.write(tmp_path / "t")) == [("call", 4.0, 4.5), ("call", 4.5, 5.0)]


def test_worker_processes_have_their_own_rows(tmp_path: Path) -> None:
    bench = Bench(in_processes=True)
    told = (0.5, BEGAN + 1, BEGAN + 1.5, 0.0, (), [("read", BEGAN + 1.1, BEGAN + 1.2, None)])
    bench.fetcher.add_told(told, 4001, "call", 0)
    bench.track.add(bench.track.call, BEGAN + 1, BEGAN + 1.6)
    bench.fetcher.add_told((0.5, BEGAN + 3, BEGAN + 4, 0.0, (), ()), 4002, "call", 1)
    checked = bench.write(tmp_path / "t")
    assert set(checked.pids.values()) == {"trainer", "worker 7 of train"}
    assert [name for name, _, _ in spans(checked)] == ["waiting for the worker"]
    rows = checked.row("fetch function", "worker 7 of train")
    assert [(span.name, round(span.seconds, 3)) for span in rows] == [("call", 0.5), ("read", 0.1), ("call", 1.0)]


def test_any_name_of_a_part_can_be_read(tmp_path: Path) -> None:
    bench = Bench()
    for name in ('a "name"\n\ud800', "x" * 5000):
        bench.track.add(name, BEGAN + 1, BEGAN + 2)
    assert {name for name, _, _ in spans(bench.write(tmp_path / "t"))} == {'a "name"\n\ud800', "x" * 200}


def test_no_more_than_the_bound_is_recorded_and_the_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "MOST_EVENTS", 10)
    bench = Bench()
    for number in range(20):
        bench.track.add("call", BEGAN + number / 10, BEGAN + number / 10 + 0.05)
        bench.trace.add_depth(BEGAN + number / 10, "queue", number)
    assert bench.trace.room.used_up_at < math.inf
    bench.trace.room.used_up_at = BEGAN + 2.0
    checked = bench.write(tmp_path / "t", BEGAN + 2.0)
    assert len(spans(checked)) + len(checked.counters["queue"]) == 10
    assert checked.about["is_cut"]
    assert checked.marks == ["no room for more events"]


def test_an_empty_trace_is_a_file_too(tmp_path: Path) -> None:
    assert Bench().write(tmp_path / "t").rows == {}


X = {"ph": "X", "name": "call", "pid": 1, "tid": 1, "ts": 10.0, "dur": 5.0, "args": {}}
NAMED = [
    {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "p"}},
    {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "t"}},
]
FAULTS: dict[str, list[dict[str, Any]]] = {
    "no name of the thread": [NAMED[0], X],
    "no name of the process": [NAMED[1], X],
    "two names": [*NAMED, NAMED[1], X],
    "no duration": [*NAMED, {key: value for key, value in X.items() if key != "dur"}],
    "a text for a number": [*NAMED, {**X, "ts": "10"}],
    "before the beginning": [*NAMED, {**X, "ts": -1.0}],
    "after the end": [*NAMED, {**X, "dur": 2e6}],
    "an unknown name": [*NAMED, {**X, "name": "nobody knows"}],
    "an unknown kind": [*NAMED, {**X, "ph": "Q"}],
    "out of order": [*NAMED, X, {**X, "ts": 1.0, "dur": 1.0}],
    "half inside": [*NAMED, X, {**X, "ts": 12.0}],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checker_finds(tmp_path: Path, fault: str) -> None:
    def write(events: list[dict[str, Any]]) -> Path:
        path = tmp_path / "t"
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"seconds": 1.0}}))
        return path

    check_trace(write([*NAMED, X, {**X, "ts": 12.0, "dur": 3.0}]))
    with pytest.raises((AssertionError, KeyError)):
        check_trace(write(FAULTS[fault]))
