"""The counters of a source go in; who waited for whom in each of its windows comes out, with the verdict."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from input_workers.coordinator.auto import AutoWorkers
from input_workers.coordinator.settings import SourceSettings
from input_workers.fetchers import Processes
from input_workers.metrics.recorder import SourceRecorder
from input_workers.metrics.snapshot import WindowStats
from input_workers.metrics.verdict import Setting, judge
from input_workers.metrics.windows import Counters, window_of

__all__ = ["attribute"]

# A shorter window says little.
ENOUGH_SECONDS = 1.0


def attribute(
    settings: SourceSettings,
    workers: int,
    cores: float,
    auto: AutoWorkers | None,
    recorder: SourceRecorder,
    state: Literal["starting", "running", "stopped"],
    slowest_part: str,
    now: Counters,
) -> tuple[dict[str, WindowStats], WindowStats]:
    """Return the windows by name, and the one that says how the source is doing now."""
    setting = Setting(
        state=state,
        fetchers="inline" if not workers else "process" if isinstance(settings.fetchers, Processes) else "thread",
        workers=workers,
        devices=len(recorder.devices),
        cores=cores,
        held_by=auto.held_by if auto is not None else None,
        slowest_part=slowest_part,
    )
    windows = {}
    for name, (begin, end) in recorder.marks.windows(now).items():
        window = window_of(begin, end, len(recorder.devices))
        judged = window
        if auto is not None and auto.changed is not None and begin.at < auto.changed.at < end.at - ENOUGH_SECONDS:
            # What was with another number of workers says nothing about what to do now.
            judged = window_of(auto.changed, end, len(recorder.devices)) if state == "running" else window
        verdict = judge(judged, setting)
        windows[name] = replace(window, verdict=verdict.word, verdict_text=verdict.text)
    return windows, windows["10s" if state == "running" else "run"]
