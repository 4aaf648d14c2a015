"""Text of a trace in the Trace Event Format, which Perfetto and chrome://tracing read. Pure functions."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

from input_workers.metrics.recorder import SourceRecorder
from input_workers.metrics.trace import MOST_EVENTS, Span, Trace, Track

__all__ = ["text_of", "unfinished"]


def unfinished(trace: Trace, sources: Iterable[SourceRecorder]) -> list[tuple[Track, Span]]:
    """Return what goes on at this moment. Call it when nothing is added any more."""
    found: list[tuple[Track, str, float, Any]] = []
    for source, recorder in zip(trace.sources, sources, strict=True):
        for fetcher, track in source.fetchers:
            found.append((track, track.call, fetcher.call_started, fetcher.request))
            found.append((track, "waiting for room", fetcher.blocked[1], None))
        found.append((source.enqueuer, "waiting for rows", recorder.enqueuer_starved[1], None))
        found.append((source.enqueuer, "waiting for room", recorder.enqueuer_blocked[1], None))
        for name, device in recorder.devices.items():
            found.append((source.enqueuer, "send", device.feed[1], name))
            _, waiting = device.waits
            found += [(trace.trainer(thread), "waiting for a batch", since, name) for thread, since in waiting.items()]
    found += [(track, *track.now) for track in list(trace.trainers.values()) if track.now is not None]
    return [
        (track, (name, since, math.inf, detail))
        for track, name, since, detail in found
        # A call that has just ended says so a moment later: it was added already.
        if since != math.inf and since >= max((ended for each, _, ended, _ in track.spans if each == name), default=0.0)
    ]


def text_of(trace: Trace, ended: float, going_on: Iterable[tuple[Track, Span]]) -> Iterator[str]:
    """Return the pieces of the file.

    Args:
        trace: what was recorded.
        ended: `time.monotonic()` when it ended; what is later is left out.
        going_on: what was not finished then.
    """
    for track, span in going_on:
        track.spans.append(span)
    pid = os.getpid()
    tracks: list[Track] = [*trace.trainers.values()]
    for source in trace.sources:
        tracks += [source.enqueuer, *(track for _, track in source.fetchers)]
    is_cut = trace.room.used_up_at <= ended
    about = {
        "began_monotonic": trace.began,  # of this machine's clock: to lay other traces beside it
        "asked_seconds": trace.seconds,
        "seconds": round(ended - trace.began, 9),
        "is_cut": is_cut,
        "note": f"it ended early: more than {MOST_EVENTS} events" if is_cut else "",
    }
    yield f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(about)}, "traceEvents": [\n'
    yield _named("process_name", pid, 0, "trainer")
    yield ",\n" + _named("thread_name", pid, 0, "queues")
    workers = sorted(trace.workers, key=lambda track: track.process or (0, ""))
    for number, track in enumerate((*tracks, *workers), 1):
        spans = _clipped(track.spans, trace.began, ended)
        if not spans:
            continue
        of, tid = (pid, number) if track.process is None else (track.process[0], track.process[0])
        if track.process is not None:
            yield ",\n" + _named("process_name", of, 0, track.process[1])
        yield ",\n" + _named("thread_name", of, tid, track.name)
        yield f',\n{{"ph": "M", "name": "thread_sort_index", "pid": {of}, "tid": {tid}, "args": {{"sort_index": {number}}}}}'
        heads: dict[str, str] = {}  # by name: there are many events and few names
        for name, since, until, detail, is_open in spans:
            head = heads.get(name)
            if head is None:
                quoted = json.dumps(str(name)[:MAX_NAME_CHARS])
                head = heads[name] = f',\n{{"ph": "X", "name": {quoted}, "pid": {of}, "tid": {tid}, "ts": '
            args = "{}" if detail is None and not is_open else _args(detail, is_open)
            yield f'{head}{_us(since)}, "dur": {_us(until - since)}, "args": {args}}}'
    for now, queue, batches in trace.depths:
        if now < ended:
            yield (
                f',\n{{"ph": "C", "name": {json.dumps(queue)}, "pid": {pid}, "tid": 0, "ts": {_us(_ns(now, trace.began))}, '
                f'"args": {{"batches": {json.dumps(batches)}}}}}'
            )
    if is_cut:
        ts = _us(_ns(ended, trace.began))
        yield f',\n{{"ph": "i", "name": "no room for more events", "pid": {pid}, "tid": 0, "ts": {ts}, "s": "g"}}'
    yield "\n]}\n"


def _clipped(spans: list[Span], began: float, ended: float) -> list[tuple[str, int, int, Any, bool]]:
    """Return name, begin and end in nanoseconds since the beginning, detail, and whether it went on; outer ones first."""
    found = []
    for name, since, until, detail in spans:
        if since < ended and until >= began:
            ns = max(0, _ns(since, began)), _ns(min(until, ended), began)
            found.append((name, *ns, detail, until > ended))
    found.sort(key=lambda span: (span[1], -span[2]))
    return found


def _args(detail: Any, is_open: bool) -> str:
    args = {} if detail is None else {"request" if isinstance(detail, int) else "device": detail}
    if is_open:
        args["unfinished"] = True
    return json.dumps(args)


# Of a part of a fetch function, whose name may be anything.
MAX_NAME_CHARS = 200


def _ns(moment: float, began: float) -> int:
    return round((moment - began) * 1e9)


def _us(nanoseconds: int) -> str:
    """Return microseconds as a decimal number, exactly."""
    return f"{nanoseconds // 1000}.{nanoseconds % 1000:03d}"


def _named(what: str, pid: int, tid: int, name: str) -> str:
    return f'{{"ph": "M", "name": "{what}", "pid": {pid}, "tid": {tid}, "args": {{"name": {json.dumps(name)}}}}}'
