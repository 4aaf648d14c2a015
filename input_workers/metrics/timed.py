"""Durations of parts of a fetch function, measured by `with timed("decode"):` inside it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING

from input_workers.metrics.histogram import PART_SAMPLES_BEFORE_FOLDING

if TYPE_CHECKING:
    from input_workers.metrics.fetcher_recorder import FetcherRecorder

__all__ = ["fetcher_here", "timed"]


class _Here(threading.local):
    """Whose thread this is."""

    recorder: FetcherRecorder | None = None


_here = _Here()


@contextmanager
def fetcher_here(recorder: FetcherRecorder) -> Iterator[None]:
    """While this is entered, the calling thread fetches for this recorder. May be nested: the inner one counts."""
    before, _here.recorder = _here.recorder, recorder
    try:
        yield
    finally:
        _here.recorder = before


class _Timed:
    """Measures its body once, in the thread that runs it."""

    __slots__ = ("_part", "_started")

    def __init__(self, part: str) -> None:
        self._part = part

    def __enter__(self) -> None:
        self._started = monotonic()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        seconds = monotonic() - self._started
        recorder = _here.recorder
        if recorder is None:
            return
        histogram = recorder.parts.get(self._part)
        if histogram is None:
            histogram = recorder.part(self._part)
        samples = histogram.samples
        samples.append(seconds)
        if len(samples) >= PART_SAMPLES_BEFORE_FOLDING:
            histogram.fold()
        if (trace := recorder.trace) is not None:
            trace.add(self._part, self._started, self._started + seconds)


def timed(part: str) -> _Timed:
    """Measure a part of a fetch function: `with iw.timed("decode"): ...`.

    What is measured appears as `fetch_parts` of the source's `stats()`, as `input_workers_fetch_part_seconds`, and in the
    verdict, and in a trace. It takes well under a microsecond. It finds its source by the thread that calls it: in a thread
    that the fetch function started itself, and outside a fetch function, it does nothing. A body that raises is measured too.
    Of parts inside each other each counts in full. A worker process tells what it has measured with its next answer: should
    it die before that, it takes the parts of the calls that it had not answered with it.

    Args:
        part: its name. A source keeps 32 of them; the time of any more is that of "other".
    """
    return _Timed(part)
