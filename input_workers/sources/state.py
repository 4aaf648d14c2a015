"""Where a Stream is, as plain data and back: a state is checked against the stream that it is loaded into."""

from __future__ import annotations

import itertools
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from input_workers.errors import StateMismatch
from input_workers.progress import Spans, add_span, gaps, rows_of, slice_of
from input_workers.sources.stream import Stream, cut_at, share_of

__all__ = ["FORMAT", "Position", "mismatch", "position_of", "state_of"]

log = logging.getLogger("input_workers")

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run begins, or has got to.

    Attributes:
        first: the first epoch that is not finished.
        done: spans of offsets that were delivered of it and of later ones.
        left: for epochs in which the number of shards changed, the positions of the whole epoch that are this shard's.
        rows_per_request: of the requests; None: not decided yet.
        ended: where epochs are kept apart, numbers of the devices that were given the end of `first`.
    """

    first: int = 0
    done: Mapping[int, Spans] = field(default_factory=dict)
    left: Mapping[int, Spans] = field(default_factory=dict)
    rows_per_request: int | None = None
    ended: tuple[int, ...] = ()


def state_of(source: str, inputs: Sequence[str], stream: Stream, last_batch: str, position: Position) -> dict[str, Any]:
    """Return the position as plain data that JSON can hold."""
    return {
        "format": FORMAT,
        "source": source,
        "inputs": list(inputs),
        "stream": stream.identity(last_batch),
        "shard": list(stream.shard),
        "share": list(_share(stream, last_batch)),
        "rows_per_request": position.rows_per_request,
        "numpy": np.__version__,
        "epoch": position.first,
        "ended": list(position.ended),
        "done": {str(epoch): [list(span) for span in spans] for epoch, spans in position.done.items()},
        "left": {
            str(epoch): [list(span) for span in spans] for epoch, spans in position.left.items() if epoch >= position.first
        },
    }


def position_of(state: Any, source: str, inputs: Sequence[str], stream: Stream, last_batch: str) -> Position:
    """Return the position that a state says, or that all states of a set of shards say together.

    Args:
        state: one state; or a list, with one of every shard that was saved together, in any order.
        source: the name of the source it is for.
        inputs: the names of its inputs.
        stream: what it reads.
        last_batch: how it ends.

    Raises:
        StateMismatch: with the field, got and wanted.
    """
    states = list(state) if isinstance(state, (list, tuple)) else [state]
    if not states:
        raise mismatch(source, "state", "an empty list", "a state, or one of each shard")
    parsed = [_Parsed(each, source, inputs, stream, last_batch) for each in states]
    sizes = {each.rows_per_request for each in parsed}
    if len(sizes) > 1:
        raise mismatch(source, "rows_per_request", sorted(sizes), "the same in the states of all shards")
    numpys = {each.numpy for each in parsed} - {np.__version__}
    if numpys:
        log.warning(
            "source %r: the state was saved with NumPy %s, this is %s; random numbers may differ",
            source, ", ".join(sorted(numpys)), np.__version__,
        )  # fmt: skip
    index, count = stream.shard
    counts = {each.shard[1] for each in parsed}
    if counts == {count}:
        own = [each for each in parsed if each.shard[0] == index]
        if len(own) != 1:
            raise mismatch(source, "shard", [list(each.shard) for each in parsed], f"{[index, count]}, once")
        share = _share(stream, last_batch)
        if own[0].share != share:
            raise mismatch(source, "share", list(own[0].share), f"{list(share)}, by last_batch={last_batch!r}")
        return own[0].position
    return _dealt_anew(parsed, source, stream, last_batch)


def mismatch(source: str, name: str, got: object, wanted: object) -> StateMismatch:
    """Return the error for a field of a state."""
    text = repr(got)
    if len(text) > MAX_VALUE_CHARS:
        text = f"{text[:MAX_VALUE_CHARS]}..."
    return StateMismatch(f"source {source!r}: state: {name}: got {text}; wanted {wanted}")


MAX_VALUE_CHARS = 200
# Shards that were saved together are in the same epoch, or nearly.
MOST_EPOCHS_APART = 10_000


class _Parsed:
    """A state whose every field was found to be right for the stream, but for its shard."""

    def __init__(self, state: Any, source: str, inputs: Sequence[str], stream: Stream, last_batch: str) -> None:
        if not isinstance(state, Mapping):
            raise mismatch(source, "state", state, "what state_dict() returned")

        def need(name: str, is_right: Callable[[Any], bool], wanted: object) -> Any:
            value = state.get(name)
            if not is_right(value):
                raise mismatch(source, name, value, wanted)
            return value

        need(
            "format", lambda value: _is_whole(value) and value == FORMAT, f"{FORMAT}, what this version of input_workers writes"
        )
        need("source", lambda value: value == source, repr(source))
        need("inputs", lambda value: value == list(inputs), list(inputs))
        identity = need("stream", lambda value: isinstance(value, Mapping), "what the Stream depends on")
        _compare(source, "stream", identity, json.loads(json.dumps(stream.identity(last_batch))))
        index, count = need("shard", _is_shard, "[index, count]")
        self.shard: tuple[int, int] = (index, count)
        start, stop = need("share", lambda value: _is_spans([value]), "[begin, stop]")
        self.share: tuple[int, int] = (start, stop)
        self.numpy = need("numpy", lambda value: isinstance(value, str), "NumPy's version")
        size = need("rows_per_request", lambda value: _is_whole(value) and value > 0, "a whole number of at least 1")
        if stream.rows_per_request not in (None, size):
            raise mismatch(
                source, "rows_per_request", size, f"{stream.rows_per_request}, as the Stream says, or leave it out there"
            )
        self.rows_per_request: int = size
        first = need("epoch", _is_whole, "a whole number")
        if stream.epochs is not None and first > stream.epochs:
            raise mismatch(source, "epoch", first, f"at most {stream.epochs}, the epochs of the Stream")
        done = need("done", _is_spans_by_epoch, "spans of offsets by epoch")
        left = need("left", _is_spans_by_epoch, "spans of positions by epoch")
        ended = need("ended", _is_devices, "rising numbers of devices")
        self.position = Position(first, _spans(done), _spans(left), size, tuple(ended))
        last = sys.maxsize if stream.epochs is None else stream.epochs - 1
        most = len(stream.source) if stream.can_change_shards else 0
        for epoch, spans in self.position.left.items():
            if not first <= epoch <= last or any(until > most for _, until in spans):
                raise mismatch(source, f"left.{epoch}", spans, f"positions up to {most}, of epochs from {first} to {last}")
        regular = stop - start if stream.can_change_shards else stream.plan(last_batch, ()).epoch_rows(0)
        for epoch, spans in self.position.done.items():
            rows = rows_of(self.position.left[epoch]) if epoch in self.position.left else regular
            ends = [-1, *(end for span in spans for end in span), rows + 1]
            if not first <= epoch <= last or any(end >= following for end, following in itertools.pairwise(ends)):
                wanted = f"rising offsets up to {rows}, with gaps, of epochs from {first} to {last}"
                raise mismatch(source, f"done.{epoch}", spans, wanted)


def _compare(source: str, name: str, got: Any, wanted: Any) -> None:
    """Raise StateMismatch for the first value that differs, named by its path."""
    if isinstance(got, Mapping) and isinstance(wanted, Mapping):
        for key in [*wanted, *(key for key in got if key not in wanted)]:
            _compare(source, f"{name}.{key}", got.get(key, "nothing"), wanted.get(key, "nothing"))
    elif got != wanted or type(got) is not type(wanted):
        raise mismatch(source, name, got, repr(wanted))


def _dealt_anew(parsed: Sequence[_Parsed], source: str, stream: Stream, last_batch: str) -> Position:
    """Deal what a set of shards has left of its unfinished epochs to another number of shards."""
    counts = {each.shard[1] for each in parsed}
    indices = sorted(each.shard[0] for each in parsed)
    if len(counts) > 1 or len(indices) != max(counts) or indices != list(range(max(counts))):
        got = [list(each.shard) for each in parsed]
        raise mismatch(source, "shard", got, f"{list(stream.shard)}, or the states of all shards of another number")
    if not stream.can_change_shards:
        raise mismatch(source, "shard", [list(each.shard) for each in parsed], f"{list(stream.shard)}: a Mix keeps its shards")
    rows = len(stream.source)
    wanted = [[_share_of_rows(rows, each.shard, last) for each in parsed] for last in ("drop", "pad", "keep")]
    if [each.share for each in parsed] not in wanted:
        raise mismatch(source, "share", [list(each.share) for each in parsed], f"equal parts of {rows} rows, each once")
    firsts = [each.position.first for each in parsed]
    first = min(firsts)
    if max(firsts) - first > MOST_EPOCHS_APART:
        raise mismatch(source, "epoch", firsts, f"those of shards saved together, within {MOST_EPOCHS_APART}")
    begun = {epoch for each in parsed for epoch in (*each.position.done, *each.position.left)}
    left: dict[int, Spans] = {}
    for epoch in sorted(begun.union(range(first, max(firsts)))):
        remaining: Spans = []
        for each in parsed:
            position = each.position
            if epoch < position.first:
                continue
            layout = position.left.get(epoch, [each.share])
            for at, until in gaps(position.done.get(epoch, ()), 0, rows_of(layout)):
                for begin_at, stop_at in slice_of(layout, at, until):
                    add_span(remaining, min(begin_at, rows), min(stop_at, rows))  # what pads an epoch is not dealt again
        total = rows_of(remaining)
        mine = share_of(total, *stream.shard, last_batch)
        left[epoch] = []
        for at, until in cut_at(mine.start, mine.stop, total) if mine else ():  # beyond the last, the first are repeated
            left[epoch] += slice_of(remaining, at % total, at % total + until - at)
    return Position(first, {}, left, parsed[0].rows_per_request)


def _share(stream: Stream, last_batch: str) -> tuple[int, int]:
    return _share_of_rows(len(stream.source), stream.shard, last_batch)


def _share_of_rows(rows: int, shard: tuple[int, int], last_batch: str) -> tuple[int, int]:
    share = share_of(rows, *shard, last_batch)
    return share.start, share.stop


EPOCH = re.compile("0|[1-9][0-9]{0,99}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_devices(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value)) and value == sorted(set(value))


def _is_shard(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(map(_is_whole, value)) and value[0] < value[1]


def _is_spans_by_epoch(value: Any) -> bool:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and EPOCH.fullmatch(key) for key in value):
        return False
    return all(_is_spans(spans) for spans in value.values())


def _is_spans(spans: Any) -> bool:
    if not isinstance(spans, Sequence) or isinstance(spans, str):
        return False
    if not all(isinstance(span, Sequence) and len(span) == 2 and all(map(_is_whole, span)) for span in spans):
        return False
    return all(begin < stop for begin, stop in spans)


def _spans(by_epoch: Mapping[str, Any]) -> dict[int, Spans]:
    return {int(epoch): [(int(begin), int(stop)) for begin, stop in spans] for epoch, spans in by_epoch.items()}
