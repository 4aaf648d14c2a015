"""States by themselves: what one holds, and that anything but a right one is refused by name."""

from __future__ import annotations

import collections
import copy
import json
import logging
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import input_workers as iw
from input_workers.progress import Spans, add_span, gaps, rows_of, slice_of
from input_workers.sources.mix import Mix
from input_workers.sources.state import Position, position_of, state_of
from input_workers.sources.stream import share_of


class Rows:
    def __init__(self, rows: int, block_rows: int | None = None) -> None:
        self.rows = rows
        if block_rows is not None:
            self.block_rows = block_rows

    def __len__(self) -> int:
        return self.rows

    def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
        return [rows.copy()]


def stream_of(rows: int = 100, **more: Any) -> iw.Stream:
    block_rows = more.pop("block_rows", 5)
    return iw.Stream(Rows(rows, block_rows), **{"shuffle": True, "seed": 3, "epochs": 4, "shard": (1, 3), **more})


def mix_of(weight: float = 2, first: str = "a", ends: str = "first", seed: int = 1, names: str = "ab", **more: Any) -> Mix:
    streams = {names[0]: (stream_of(**more), weight), names[1]: (stream_of(50, shard=(0, 1)), 1)}
    return Mix({name: streams[name] for name in sorted(streams, reverse=first != "a")}, seed=seed, ends=ends)


POSITION = Position(1, {1: [(0, 5), (7, 20)], 2: [(0, 3)]}, {1: [(3, 20), (40, 51)]}, 7)
MIX_POSITION = Position(0, {0: [(0, 5), (7, 20)]}, {}, 7)


def saved(stream: iw.Stream | None = None, position: Position = POSITION, last_batch: str = "keep") -> dict[str, Any]:
    state = state_of("train", ["data", "label"], stream or stream_of(), last_batch, position)
    assert json.loads(json.dumps(state)) == state
    return state


def load(state: Any, stream: iw.Stream | None = None, last_batch: str = "keep", source: str = "train") -> Position:
    return position_of(state, source, ["data", "label"], stream or stream_of(), last_batch)


def test_a_state_is_a_few_hundred_bytes_and_comes_back_as_it_was() -> None:
    assert load(saved()) == POSITION
    assert load([saved()]) == POSITION
    for mix in (mix_of(), mix_of(ends="all")):
        assert load(saved(mix, MIX_POSITION), mix) == MIX_POSITION
    beginning = Position(rows_per_request=8)
    assert load(saved(position=beginning)) == beginning
    end = Position(4, {}, {}, 8)
    assert load(saved(position=end)) == end
    assert set(saved(position=end)) == set(saved()), "its shape is the same at every step"
    assert len(json.dumps(saved(position=Position(10**6, {10**6: [(0, 10**9)]}, {}, 64), stream=stream_of(10**10)))) < 420


def test_a_state_costs_24_bytes_more_for_each_unfinished_request() -> None:
    stream = stream_of(10**10)
    done = [(at, at + 64) for at in range(10**9, 10**9 + 128 * 200, 128)]
    more = len(json.dumps(saved(stream, Position(0, {0: done}, {}, 64)))) - len(
        json.dumps(saved(stream, Position(0, {}, {}, 64)))
    )
    assert more < 200 * 27


@pytest.mark.parametrize(
    ("change", "field", "wanted"),
    [
        ({"rows": 101}, "stream.rows: got 100", "101"),
        ({"shuffle": False}, "stream.shuffle: got True", "False"),
        ({"seed": 4}, "stream.seed: got 3", "4"),
        ({"block_rows": 6}, "stream.block_rows: got 5", "6"),
        ({"block_rows": None}, "stream.block_rows: got 5", "None"),
        ({"shard": (2, 3)}, r"shard: got \[\[1, 3\]\]", r"\[2, 3\], once"),
        ({"shard": (0, 2)}, r"shard: got \[\[1, 3\]\]", r"\[0, 2\], or the states of all shards"),
        ({"shard": (0, 1)}, r"shard: got \[\[1, 3\]\]", r"\[0, 1\], or"),
        ({"rows_per_request": 8}, "rows_per_request: got 7", "8, as the Stream says, or leave it out"),
        ({"epochs": 2}, "done.2: got", "of epochs from 1 to 1"),
        ({"epochs": 1}, "left.1: got", "of epochs from 1 to 0"),
    ],
)
def test_a_stream_that_has_changed_is_refused_by_name(change: dict[str, Any], field: str, wanted: str) -> None:
    with pytest.raises(iw.StateMismatch, match=f"^source 'train': state: {field}.*; wanted .*{wanted}"):
        load(saved(), stream_of(**change))
    assert load(saved(stream_of(**change), Position(0, {}, {}, 8)), stream_of(**change)) == Position(0, {}, {}, 8)


@pytest.mark.parametrize("change", [{"epochs": 5}, {"epochs": None}, {"epoch_end": "break"}, {"rows_per_request": 7}])
def test_what_may_change_may_change(change: dict[str, Any]) -> None:
    assert load(saved(), stream_of(**change)) == POSITION


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"weight": 3}, "stream.mix.a.weight: got 2.0; wanted 3.0"),
        ({"names": "ac"}, "stream.mix.c: got 'nothing'"),
        ({"first": "b"}, r"stream.order: got \['a', 'b'\]; wanted \['b', 'a'\]"),
        ({"seed": 2}, "stream.seed: got 1; wanted 2"),
        ({"ends": "all"}, "stream.ends: got 'first'; wanted 'all'"),
        ({"rows": 99}, "stream.mix.a.rows: got 100; wanted 99"),
        ({"shuffle": False}, "stream.mix.a.shuffle: got True; wanted False"),
        ({"epochs": 3}, "stream.mix.a.epochs: got 4; wanted 3"),
        ({"epochs": None}, "stream.mix.a.epochs: got 4; wanted None"),
        ({"shard": (0, 3)}, r"stream.mix.a.shard: got \[1, 3\]; wanted \[0, 3\]"),
        ({"shard": (0, 1)}, r"stream.mix.a.shard: got \[1, 3\]; wanted \[0, 1\]"),
        ({"block_rows": 4}, "stream.mix.a.block_rows: got 5; wanted 4"),
    ],
)
def test_a_mix_that_has_changed_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    with pytest.raises(iw.StateMismatch, match=f"^source 'train': state: {field}"):
        load(saved(mix_of(), MIX_POSITION), mix_of(**change))


def test_another_share_of_rows_is_refused() -> None:
    with pytest.raises(iw.StateMismatch, match=r"share: got \[33, 66\]; wanted \[34, 68\], by last_batch='pad'"):
        load(saved(), last_batch="pad")
    with pytest.raises(iw.StateMismatch, match=r"stream.mix.a.share: got \[33, 66\]; wanted \[34, 68\]"):
        load(saved(mix_of(), MIX_POSITION), mix_of(), last_batch="pad")
    mix = mix_of()
    rows = mix.plan("keep", ()).most_rows
    with pytest.raises(iw.StateMismatch, match=rf"done.0: got \[\(0, {rows + 1}\)\]; wanted rising offsets up to {rows}"):
        load(saved(mix, Position(0, {0: [(0, rows + 1)]}, {}, 7)), mix)
    with pytest.raises(iw.StateMismatch, match=r"left.0: got .*; wanted positions up to 0"):
        load(saved(mix, Position(0, {}, {0: [(0, 5)]}, 7)), mix)


@pytest.mark.parametrize("stream", [stream_of(), mix_of()], ids=["stream", "mix"])
def test_every_field_is_needed_and_of_its_kind(stream: iw.Stream) -> None:
    whole = saved(stream, POSITION if stream.can_change_shards else MIX_POSITION)
    for name in whole:
        state = copy.deepcopy(whole)
        del state[name]
        with pytest.raises(iw.StateMismatch, match=f"state: {name}: got None; wanted"):
            load(state, stream)
        for wrong in ([], {}, "x", 1.5, -1, True, None, [[1]], {"x": 1}):
            if (name, wrong) in (("numpy", "x"), ("done", {}), ("left", {}), ("ended", [])):
                continue
            with pytest.raises(iw.StateMismatch, match=f"state: {name}.*: got .*; wanted"):
                load({**whole, name: wrong}, stream)
    for newer in (2, "1", True, 1.0):
        with pytest.raises(iw.StateMismatch, match=f"state: format: got {newer!r}; wanted 1, what this version"):
            load({**whole, "format": newer}, stream)
    with pytest.raises(iw.StateMismatch, match="state: source: got 'train'; wanted 'test'"):
        load(whole, stream, source="test")


@pytest.mark.parametrize(
    "done",
    [
        {"1": [[5, 5]]}, {"1": [[5, 3]]}, {"1": [[0, 5], [5, 7]]}, {"1": [[0, 5], [3, 7]]}, {"1": [[8, 9], [0, 5]]},
        {"1": [[0, 29]]}, {"0": [[0, 1]]}, {"4": [[0, 1]]}, {"01": [[0, 1]]}, {"\u0661": [[0, 1]]}, {"9" * 5000: [[0, 1]]},
        {"-1": []},
        {"1": [[0, 1, 2]]}, {"1": [[0.0, 1]]}, {"1": [[False, True]]}, {"1": ["ab"]}, {"1": "ab"}, {"1": {"0": 1}},
        {"1": [{"0": 1, "1": 2}]},
    ],
)  # fmt: skip
def test_spans_that_no_run_can_have_left_are_refused(done: Any) -> None:
    with pytest.raises(iw.StateMismatch, match=r"state: done.*: got .*; wanted"):
        load({**saved(), "done": done})


@pytest.mark.parametrize("wrong", [None, 5, "state", [], [None], [[]], {}, ["a"], (), [{}], b"x"])
def test_what_is_no_state_is_refused(wrong: Any) -> None:
    with pytest.raises(iw.StateMismatch, match=r"^source 'train': state: .*: got .*; wanted "):
        load(wrong)


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-3, 120), st.integers(-(10**40), 10**40), st.floats(), st.text(max_size=4),
        st.sampled_from(["", "1", "keep", "train"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["0", "1", "2", "a"]), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def changed(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    state = copy.deepcopy(state)
    at = state
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return state


def is_plausible(position: Position, stream: iw.Stream, last_batch: str = "keep") -> None:
    """A run can begin there, and a state of it loads again."""
    state = saved(stream, position)
    assert load(json.loads(json.dumps(state)), stream) == position
    plan = stream.plan(last_batch, (0,), position.left)
    for epoch in (position.first, *position.done, *position.left):
        rows = plan.epoch_rows(epoch)
        left = gaps(position.done.get(epoch, ()), 0, rows)
        assert 0 <= rows_of(left) <= rows
        for begin, stop in left[:2]:
            numbers = plan.rows(epoch, begin, min(stop, begin + 4))
            assert len(numbers) == min(stop - begin, 4)
            assert all(0 <= number < len(stream.source) for number in numbers.tolist())


WHOLE = {
    "stream": (stream_of(), saved()),
    "endless": (stream_of(epochs=None), saved(stream_of(epochs=None))),
    "mix": (mix_of(), saved(mix_of(), MIX_POSITION)),
}
SHARDS = [
    saved(stream_of(shard=(index, 2), epochs=4), Position(index, {1: [(2, 9)]}, {1: [(0, 60)]} if index else {}, 7))
    for index in (0, 1)
]


@settings(max_examples=1500)
@given(kind=st.sampled_from(sorted(WHOLE)), data=st.data())
def test_any_value_anywhere_is_refused_or_a_right_position(kind: str, data: st.DataObject) -> None:
    stream, state = WHOLE[kind]
    state = changed(state, data.draw(st.sampled_from(places(state)), "path"), data.draw(JSON, "value"))
    try:
        position = load(state, stream)
    except iw.StateMismatch as error:
        message = str(error)
        assert "; wanted " in message
        assert len(message) < 700
    else:
        is_plausible(position, stream)


@settings(max_examples=700)
@given(data=st.data(), last_batch=st.sampled_from(["keep", "drop", "pad"]))
def test_any_value_anywhere_in_a_set_of_shards_is_refused_or_a_right_position(data: st.DataObject, last_batch: str) -> None:
    states = changed(SHARDS, data.draw(st.sampled_from(places(SHARDS)), "path"), data.draw(JSON, "value"))
    stream = stream_of(shard=(1, 3), epochs=4)
    try:
        position = load(states, stream, last_batch)
    except iw.StateMismatch as error:
        message = str(error)
        assert "; wanted " in message
    else:
        plan = stream.plan(last_batch, (0,), position.left)
        for epoch in position.left:
            rows = plan.epoch_rows(epoch)
            assert not rows or all(0 <= number < 100 for number in plan.rows(epoch, 0, rows).tolist())


def test_another_numpy_is_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "input_workers"):
        load(saved())
        assert not caplog.records
        assert load({**saved(), "numpy": "0.9"}) == POSITION
    assert "source 'train': the state was saved with NumPy 0.9, this is" in caplog.text


def shard_states(rows: int, count: int, last_batch: str, chance: random.Random, epochs: int = 3) -> tuple[list[Any], Any]:
    """Return (states of all shards, each somewhere in its epochs; how often each (epoch, position) was delivered)."""
    states = []
    delivered: collections.Counter[tuple[int, int]] = collections.Counter()
    for index in range(count):
        stream = stream_of(rows, shard=(index, count), epochs=epochs, block_rows=None)
        share = share_of(rows, index, count, last_batch)
        first = chance.randrange(epochs + 1)
        done: dict[int, Spans] = {}
        for epoch in range(first, min(first + 2, epochs)):
            spans: Spans = []
            for _ in range(chance.randrange(4)):
                begin = chance.randrange(len(share))
                add_span(spans, begin, min(begin + chance.randrange(1, 4), len(share)))
            if spans:
                done[epoch] = spans
        for epoch in range(epochs):
            for begin, stop in [(0, len(share))] if epoch < first else done.get(epoch, []):
                delivered.update((epoch, share[at] % rows) for at in range(begin, stop))
        states.append(saved(stream, Position(first, done, {}, 7), last_batch))
    return states, delivered


@settings(max_examples=300)
@given(
    rows=st.integers(1, 40), count=st.integers(1, 6), then=st.integers(1, 8), last=st.sampled_from(["drop", "keep", "pad"]),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_what_all_shards_left_is_dealt_to_another_number_of_them(
    rows: int, count: int, then: int, last: str, seed: int
) -> None:
    if (last != "pad" and rows < max(count, then)) or count == then:
        return
    epochs = 3
    states, before = shard_states(rows, count, last, random.Random(seed), epochs)
    after: list[collections.Counter[tuple[int, int]]] = []
    random.Random(seed).shuffle(states)
    for index in range(then):
        stream = stream_of(rows, shard=(index, then), epochs=epochs, block_rows=None)
        position = load(states, stream, last)
        assert load(saved(stream, position, last), stream, last) == position, "and is a position like any other"
        mine: collections.Counter[tuple[int, int]] = collections.Counter()
        for epoch in range(position.first, epochs):
            layout = position.left.get(epoch)
            if layout is None:
                layout = [(share.start, share.stop)] if len(share := share_of(rows, index, then, last)) else []
            mine.update((epoch, at % rows) for begin, stop in slice_of(layout, 0, 10**6) for at in range(begin, stop))
        after.append(mine)
    whole = sum(after, before)
    if last == "keep":
        assert whole == collections.Counter((epoch, at) for epoch in range(epochs) for at in range(rows))
    for epoch in range(epochs):
        dealt = [sum(number for (each, _), number in mine.items() if each == epoch) for mine in after]
        if last == "drop":
            assert len(set(dealt)) == 1
            assert all(number == 1 for (each, _), number in whole.items() if each == epoch)
            left_out = rows - sum(each == epoch for each, _ in whole)
            assert left_out < count + then
        if last == "pad":
            assert len(set(dealt)) == 1, "equally many for every shard, or one would wait for the others"
            assert {at for each, at in whole if each == epoch} == set(range(rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda states: states[:2], r"shard: got \[\[0, 3\], \[1, 3\]\]; wanted \[0, 2\], or the states of all shards"),
        (lambda states: states[1:], r"shard: got \[\[1, 3\], \[2, 3\]\]"),
        (lambda states: [*states, states[0]], r"shard: got \[\[0, 3\], \[1, 3\], \[2, 3\], \[0, 3\]\]"),
        (lambda states: [states[0], states[1], states[1]], r"shard: got \[\[0, 3\], \[1, 3\], \[1, 3\]\]"),
        (lambda states: [*states[:2], saved(stream_of(shard=(2, 4)))], "shard: got .*[2, 4]"),
        (lambda states: [*states[:2], saved(stream_of(shard=(2, 3), seed=9))], "stream.seed: got 9; wanted 3"),
        (
            lambda states: [*states[:2], {**states[2], "rows_per_request": 9}],
            r"rows_per_request: got \[7, 9\]; wanted the same",
        ),
        (lambda states: [*states[:2], {**states[2], "share": [66, 98]}], r"share: got .*; wanted equal parts of 100 rows"),
        (lambda states: [*states[:2], {**states[2], "share": [0, 10**30]}], r"share: got .*; wanted equal parts of 100 rows"),
        (lambda states: [*states[:2], {**states[2], "shard": [2, 10**30]}], r"shard: got .*; wanted"),
        (lambda states: [{**each, "shard": [each["shard"][0], 10**30]} for each in states], r"shard: got .*; wanted"),
        (
            lambda states: [*states[:2], {**states[2], "epoch": 10**12, "done": {}, "left": {}}],
            r"epoch: got .*; wanted those of",
        ),
        (lambda states: [*states[:2], None], "state: got None; wanted what state_dict"),
    ],
)
def test_a_set_of_states_that_were_not_saved_together_is_refused(change: Any, message: str) -> None:
    states = [saved(stream_of(shard=(index, 3), epochs=None), Position(1, {}, {}, 7)) for index in range(3)]
    stream = stream_of(shard=(0, 2), epochs=None)
    assert load(states, stream).left == {}
    with pytest.raises(iw.StateMismatch, match=f"^source 'train': state: {message}"):
        load(change(states), stream)


def test_of_a_set_of_as_many_shards_each_takes_its_own() -> None:
    states = [saved(stream_of(shard=(index, 3)), Position(1, {1: [(index, 9)]}, {}, 7)) for index in range(3)]
    for index in range(3):
        assert load(states[::-1], stream_of(shard=(index, 3))).done == {1: [(index, 9)]}
    with pytest.raises(iw.StateMismatch, match=r"shard: got .*; wanted \[1, 3\], once"):
        load([states[0], states[2]], stream_of(shard=(1, 3)))
    with pytest.raises(iw.StateMismatch, match=r"shard: got .*; wanted \[1, 3\], once"):
        load([states[0], states[1], states[1]], stream_of(shard=(1, 3)))


def test_a_mix_keeps_its_shards() -> None:
    mix = mix_of()
    states = [{**saved(mix, MIX_POSITION), "shard": [index, 2]} for index in (0, 1)]
    with pytest.raises(iw.StateMismatch, match=r"shard: got .*: a Mix keeps its shards"):
        load(states, mix)
