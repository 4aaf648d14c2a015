"""The windows of a source: who waited for whom, and the verdict on each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

from input_workers.coordinator.auto import AutoWorkers
from input_workers.coordinator.settings import SourceSettings
from input_workers.metrics.recorder import SourceRecorder
from input_workers.metrics.snapshot import WindowStats
from input_workers.metrics.verdict import Setting, judge
from input_workers.metrics.windows import Counters, window_of
from input_workers.sources.stream import Stream

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
    keeps_chunks: bool,
    now: Counters,
) -> tuple[Mapping[str, WindowStats], WindowStats]:
    """Return the windows by name, and the one that says how the source is doing now.

    Args:
        settings: of the source.
        workers: how many fetchers there should be; 0: the trainer's own thread makes the calls.
        cores: that this process may use.
        auto: what changes the number of workers, or None.
        recorder: of the source.
        state: of its run.
        slowest_part: of the fetch function, as `timed` named it, or "".
        keeps_chunks: every feed takes a chunk that is exactly a batch as it is.
        now: the counters of this moment.
    """
    stream = settings.fetch_fun if isinstance(settings.fetch_fun, Stream) else None
    setting = Setting(
        state=state,
        fetchers=settings.fetchers.kind if workers else "inline",
        workers=workers,
        devices=len(recorder.devices),
        cores=cores,
        rebatch=settings.rebatch,
        has_turns=settings.ordered or (stream is not None and stream.epoch_end == "break"),
        is_stream=stream is not None,
        keeps_chunks=keeps_chunks,
        held_by=auto.held_by if auto is not None else None,
        slowest_part=slowest_part,
    )
    windows = Windows(recorder.marks.windows(now), len(recorder.devices), setting, auto.changed if auto is not None else None)
    return windows, windows["10s" if state == "running" else "run"]


class Windows(Mapping[str, WindowStats]):
    """Windows by name, each worked out when it is looked at: a scrape shows one of them. It never changes."""

    def __init__(
        self, ends: Mapping[str, tuple[Counters, Counters]], trainers: int, setting: Setting, changed: Counters | None
    ) -> None:
        self._ends = ends
        self._trainers = trainers
        self._setting = setting
        self._changed = changed  # when the number of workers last did
        self._known: dict[str, WindowStats] = {}

    def __getitem__(self, name: str) -> WindowStats:
        if name not in self._known:
            begin, end = self._ends[name]
            window = judged = window_of(begin, end, self._trainers)
            changed = self._changed
            if changed is not None and begin.at < changed.at < end.at - ENOUGH_SECONDS and self._setting.state == "running":
                # What was with another number of workers says nothing about what to do now.
                judged = window_of(changed, end, self._trainers)
            verdict = judge(judged, self._setting)
            self._known[name] = replace(window, verdict=verdict.word, verdict_text=verdict.text)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ends)

    def __len__(self) -> int:
        return len(self._ends)
