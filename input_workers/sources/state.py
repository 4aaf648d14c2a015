"""Where a Stream is, as plain data and back: a state is checked against the stream that it is loaded into."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from input_workers.errors import StateMismatch
from input_workers.progress import Spans, add_span, gaps, rows_of, slice_of
from input_workers.sources.stream import Stream, share_of

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
    """

    first: int = 0
    done: Mapping[int, Spans] = field(default_factory=dict)
    left: Mapping[int, Spans] = field(default_factory=dict)
    rows_per_request: int | None = None


def state_of(source: str, inputs: Sequence[str], stream: Stream, last_batch: str, position: Position) -> dict[str, Any]:
    """Return the position as plain data that JSON can hold."""
    state: dict[str, Any] = {
        "format": FORMAT,
        "source": source,
        "inputs": list(inputs),
        "stream": stream.identity(),
        "shard": list(stream.shard),
        "share": list(_share(stream, last_batch)),
        "rows_per_request": position.rows_per_request,
        "numpy": np.__version__,
        "epoch": position.first,
        "done": {str(epoch): [list(span) for span in spans] for epoch, spans in position.done.items()},
    }
    left = {str(epoch): [list(span) for span in spans] for epoch, spans in position.left.items() if epoch >= position.first}
    if left:
        state["left"] = left
    return state


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
    parsed = [_Parsed(each, source, inputs, stream) for each in states]
    sizes = {each.rows_per_request for each in parsed}
    if len(sizes) > 1:
        raise mismatch(source, "rows_per_request", sorted(sizes, key=str), "the same in the states of all shards")
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


class _Parsed:
    """A state whose every field was found to be right for the stream, but for its shard."""

    def __init__(self, state: Any, source: str, inputs: Sequence[str], stream: Stream) -> None:
        if not isinstance(state, Mapping):
            raise mismatch(source, "state", state, "what state_dict() returned")

        def need(name: str, is_right: Callable[[Any], bool], wanted: object) -> Any:
            value = state.get(name)
            if not is_right(value):
                raise mismatch(source, name, value, wanted)
            return value

        need("format", lambda value: value == FORMAT, f"{FORMAT}, what this version of input_workers writes")
        need("source", lambda value: value == source, repr(source))
        need("inputs", lambda value: value == list(inputs), list(inputs))
        identity = need("stream", lambda value: isinstance(value, Mapping), "what the Stream depends on")
        _compare(source, "stream", identity, json.loads(json.dumps(stream.identity())))
        index, count = need("shard", _is_shard, "[index, count]")
        self.shard: tuple[int, int] = (index, count)
        start, stop = need("share", lambda value: _is_spans([value]), "[begin, stop]")
        self.share: tuple[int, int] = (start, stop)
        self.numpy = need("numpy", lambda value: isinstance(value, str), "NumPy's version")
        size = need("rows_per_request", lambda value: value is None or (_is_whole(value) and value > 0), "a whole number")
        if None not in (stream.rows_per_request, size) and stream.rows_per_request != size:
            raise mismatch(
                source, "rows_per_request", size, f"{stream.rows_per_request}, as the Stream says, or leave it out there"
            )
        self.rows_per_request: int | None = size
        first = need("epoch", _is_whole, "a whole number")
        if stream.epochs is not None and first > stream.epochs:
            raise mismatch(source, "epoch", first, f"at most {stream.epochs}, the epochs of the Stream")
        done = need("done", _is_spans_by_epoch, "spans of offsets by epoch")
        left = state.get("left", {})
        if not _is_spans_by_epoch(left):
            raise mismatch(source, "left", left, "spans of positions by epoch")
        self.position = Position(first, _spans(done), _spans(left), size)
        for epoch, spans in self.position.done.items():
            rows = rows_of(self.position.left[epoch]) if epoch in self.position.left else stop - start
            if epoch < first or (spans and spans[-1][1] > rows):
                raise mismatch(source, f"done of epoch {epoch}", spans, f"offsets below {rows}, of epochs from {first}")


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
    if len(counts) > 1 or indices != list(range(counts.copy().pop())):
        got = [list(each.shard) for each in parsed]
        raise mismatch(source, "shard", got, f"{list(stream.shard)}, or the states of all shards of another number")
    if not stream.can_change_shards:
        raise mismatch(source, "shard", [list(each.shard) for each in parsed], f"{list(stream.shard)}: a Mix keeps its shards")
    rows = len(stream.source)
    first = min(each.position.first for each in parsed)
    last = max(max([each.position.first - 1, *each.position.done, *each.position.left]) for each in parsed)
    left: dict[int, Spans] = {}
    for epoch in range(first, last + 1):
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
        spans = slice_of(remaining, mine.start, min(mine.stop, total))
        if mine.stop > total > 0:  # repeat some
            begin = max(mine.start - total, 0)
            spans += slice_of(remaining, begin, mine.stop - total)
        left[epoch] = spans
    return Position(first, {}, left, parsed[0].rows_per_request)


def _share(stream: Stream, last_batch: str) -> tuple[int, int]:
    share = share_of(len(stream.source), *stream.shard, last_batch)
    return share.start, share.stop


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_shard(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(map(_is_whole, value)) and value[0] < value[1]


def _is_spans_by_epoch(value: Any) -> bool:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and key.isdecimal() for key in value):
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
