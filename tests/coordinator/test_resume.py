"""Stop anywhere, go on anywhere: what was received is not repeated, everything else comes, to the row and the bit."""

from __future__ import annotations

import collections
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import input_workers as iw

INPUTS = ["row", "turn", "noise"]


class Numbered:
    """Rows that say which they are, in which epoch, with random numbers of their request."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
        return [rows.copy(), np.full(len(rows), request.epoch), request.rng.integers(0, 1 << 60, len(rows))]


def open_source(stream: iw.Stream, batch_size: int = 4, workers: int = 2, **more: Any) -> iw.GlobalCoordinator:
    more = {"last_batch": "keep", **more}
    return iw.init_data_input_workers("numpy", INPUTS, stream, batch_size, workers, coordinator=iw.GlobalCoordinator(), **more)


def rows_in(batches: list[Any]) -> list[tuple[int, int, int]]:
    return [
        row
        for batch in batches
        for row in zip(*(array[: batch.valid_rows].tolist() for array in batch), strict=True)
    ]  # fmt: skip


def read(coordinator: iw.GlobalCoordinator, count: int | None = None) -> tuple[list[Any], Any]:
    """Return (that many batches, or all; the state then)."""
    source = coordinator["train"]
    with coordinator:
        batches = list(source) if count is None else [source.next_batch() for _ in range(count)]
        state = json.loads(json.dumps(source.state_dict()))
    assert coordinator.last_stop.failures == {}
    assert source.state_dict() == state, "after a stop: the last position"
    return batches, state


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_stream_cut_anywhere_any_number_of_times_is_the_stream_uncut(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 60), "rows")
    epochs = data.draw(st.integers(1, 3), "epochs")
    per_request = data.draw(st.integers(1, 13), "rows_per_request")
    shuffle = data.draw(st.booleans(), "shuffle")
    ordered = data.draw(st.booleans(), "ordered")

    def stream() -> iw.Stream:
        return iw.Stream(Numbered(rows), shuffle, 11, epochs, rows_per_request=per_request)

    uncut, _ = read(open_source(stream(), workers=1))
    came: list[Any] = []
    state = None
    for _ in range(data.draw(st.integers(1, 4), "cuts")):
        batch_size = data.draw(st.integers(1, 9), "batch_size")
        coordinator = open_source(stream(), batch_size, data.draw(st.sampled_from([0, 1, 2, 7]), "workers"), ordered=ordered)
        if state is not None:
            coordinator["train"].load_state_dict(state)
            assert coordinator["train"].state_dict() == state, "loading and saving gives the same"
        left = rows * epochs - sum(batch.valid_rows for batch in came)
        batches, state = read(coordinator, data.draw(st.integers(0, left // batch_size), "batches"))
        came += batches
    coordinator = open_source(stream(), workers=3, ordered=ordered)
    coordinator["train"].load_state_dict(state)
    came += read(coordinator)[0]
    if ordered:
        assert rows_in(came) == rows_in(uncut)
    assert sorted(rows_in(came)) == sorted(rows_in(uncut))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("epoch_end", ["run_on", "break"])
@pytest.mark.parametrize("last_batch", ["drop", "keep", "pad"])
def test_the_state_at_every_batch_goes_on_as_if_nothing_had_been(epoch_end: str, last_batch: str, ordered: bool) -> None:
    def open_here(workers: int) -> iw.GlobalCoordinator:
        stream = iw.Stream(Numbered(22), True, 3, 3, rows_per_request=3, epoch_end=epoch_end)
        return open_source(stream, 4, workers, ordered=ordered, last_batch=last_batch)

    def read_on(coordinator: iw.GlobalCoordinator) -> list[list[list[tuple[int, int, int]]]]:
        """Return for each `for` its batches' rows."""
        loops = []
        with coordinator:
            loops += [[rows_in([batch]) for batch in coordinator["train"]] for _ in range(5)]
        return loops

    states: list[Any] = []
    seen: list[Any] = []
    coordinator = open_here(3)
    source = coordinator["train"]
    with coordinator:
        for loop in range(3 if epoch_end == "break" else 1):
            states.append((loop, source.state_dict(), list(seen)))
            for batch in source:
                seen += rows_in([batch])
                states.append((loop, source.state_dict(), list(seen)))
    whole = sorted(rows_in(read(open_here(1))[0])) if epoch_end == "run_on" else None
    for loop, state, before in states:
        coordinator = open_here(2)
        coordinator["train"].load_state_dict(json.loads(json.dumps(state)))
        loops = read_on(coordinator)
        after = [row for each in loops for batch in each for row in batch]
        assert not set(before) & set(after), "nothing is repeated"
        if ordered:
            assert before + after == seen
        if epoch_end == "break":
            assert [{turn for batch in each for _, turn, _ in batch} for each in loops[: 3 - loop]][1:] == [
                {turn} for turn in range(loop + 1, 3)
            ], "each `for` is an epoch, the first what is left of one"
            if last_batch != "drop":
                assert sorted(before + after) == sorted(seen)
        elif last_batch != "drop":
            assert sorted(before + after) == whole


@pytest.mark.parametrize("last_batch", ["drop", "keep", "pad"])
@pytest.mark.parametrize(("shards", "then"), [(4, 3), (1, 5), (3, 1), (2, 2), (3, 7)])
def test_a_set_of_shards_goes_on_with_another_number_of_them(shards: int, then: int, last_batch: str) -> None:
    rows, epochs = 101, 3

    def open_shard(index: int, count: int) -> iw.GlobalCoordinator:
        stream = iw.Stream(Numbered(rows), True, 3, epochs, shard=(index, count), rows_per_request=5)
        return open_source(stream, 4, 3, last_batch=last_batch, name_scope="")

    before, states = [], []
    for index in range(shards):
        batches, state = read(open_shard(index, shards), 2 * index + 1)
        before += rows_in(batches)
        states.append(state)
    after: list[list[Any]] = []
    for index in range(then):
        coordinator = open_shard(index, then)
        coordinator["train"].load_state_dict(states[::-1])
        first, state = read(coordinator, 1)
        coordinator = open_shard(index, then)
        coordinator["train"].load_state_dict(state)  # and on again, from there
        after.append(rows_in(first) + rows_in(read(coordinator)[0]))
    counts = collections.Counter((row, turn) for row, turn, _ in before + [row for each in after for row in each])
    if last_batch == "keep":
        assert counts == collections.Counter((row, turn) for row in range(rows) for turn in range(epochs))
    if last_batch == "drop":
        assert max(counts.values()) == 1
        assert then == shards or len({len(each) for each in after}) == 1, "equally many for each shard"
        assert len(counts) >= rows * epochs - epochs * (then + shards) - 4 * then
    if last_batch == "pad":
        assert len(counts) == rows * epochs
        assert sum(counts.values()) - len(counts) <= epochs * then + shards
        assert then == shards or len({len(each) for each in after}) == 1


def test_a_state_of_batches_ago_is_that_of_the_moment() -> None:
    stream = iw.Stream(Numbered(1000), True, 3, 2, rows_per_request=3)
    coordinator = open_source(stream, 4, 4)
    source = coordinator["train"]
    with coordinator:
        states = [source.state_dict()]
        for count in range(1, 200):
            source.next_batch()
            states.append(source.state_dict())
            for back in (0, 1, 17, 64):
                if count >= back:
                    assert source.state_dict(delivered=count - back) == states[count - back]
            for wrong in (count + 1, count - 65):
                if wrong >= 0:
                    with pytest.raises(iw.ConfigError, match="one of the last 64 of the"):
                        source.state_dict(delivered=wrong)


def test_taking_a_state_changes_nothing_and_a_start_without_one_is_at_the_beginning() -> None:
    coordinator = open_source(iw.Stream(Numbered(40), True, 3, rows_per_request=3), 4, 1)
    uncut, end = read(coordinator)
    with coordinator:
        source = coordinator["train"]
        first = []
        for _ in range(10):
            assert source.state_dict() == source.state_dict()
            first.append(source.next_batch())
        with pytest.raises(iw.LifecycleError, match="is running"):
            source.load_state_dict(end)
    assert rows_in(first) == rows_in(uncut)
    source.load_state_dict(end)
    assert read(coordinator)[0] == []
    assert len(read(coordinator)[0]) == 10


def test_several_devices_resume_to_the_row() -> None:
    def open_devices() -> iw.GlobalCoordinator:
        coordinator = iw.GlobalCoordinator()
        stream = iw.Stream(Numbered(96), True, 3, 2, rows_per_request=5, epoch_end="break")
        for scope, size in (("a", 4), ("b", 8)):
            iw.init_data_input_workers(
                "numpy",
                INPUTS,
                stream,
                size,
                2,
                name_scope=scope,
                coordinator=coordinator,
                last_batch="keep",
                device_queue_depth=64,
            )
        return coordinator

    came = []
    state: Any = None
    for _ in range(6):
        coordinator = open_devices()
        if state is not None:
            coordinator["train"].load_state_dict(state)
        with coordinator:
            for scope, count in (("a", 2), ("b", 1), ("a", 1)):
                for _ in range(count):
                    try:
                        came.append(coordinator[f"{scope}/train"].next_batch())
                    except iw.EndOfData:
                        pass
            state = json.loads(json.dumps(coordinator["train"].state_dict()))
    coordinator = open_devices()
    coordinator["train"].load_state_dict(state)
    with coordinator:
        for _ in range(3):
            for scope in "ab":
                came += list(coordinator[f"{scope}/train"])
    assert sorted((row, turn) for row, turn, _ in rows_in(came)) == sorted(
        (row, turn) for row in range(96) for turn in range(2)
    )
