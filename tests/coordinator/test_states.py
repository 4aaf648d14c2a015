"""Taking and loading states of running, stopped, new and loaded sources: when it may be done, and what it changes."""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gates import await_true, register
from hypothesis import given, settings
from hypothesis import strategies as st

import input_workers as iw
from input_workers.sources.mix import Mix


def stream_of(rows: int = 60, **more: Any) -> iw.Stream:
    numbers = np.arange(rows)
    return iw.Stream(
        iw.sources.Arrays(numbers, numbers * 2), **{"shuffle": True, "seed": 3, "epochs": 3, "rows_per_request": 5, **more}
    )


def open_source(stream: iw.Stream | None = None, batch_size: int = 4, **more: Any) -> tuple[iw.GlobalCoordinator, Any]:
    coordinator = iw.GlobalCoordinator()
    return coordinator, register(coordinator, stream or stream_of(), batch_size, **{"last_batch": "keep", **more})


def rows_of(batches: list[Any]) -> list[tuple[int, int]]:
    """Return (epoch of the batch, row)."""
    return [(batch.epoch, row) for batch in batches for row in batch.data[: batch.valid_rows].tolist()]


def plain(rows: list[tuple[int, int]]) -> list[int]:
    return sorted(row for _, row in rows)


def a_function(worker_id: int, batch_size: int) -> Any:
    return [np.zeros(batch_size), np.zeros(batch_size)]


def test_a_state_is_there_at_every_moment_and_always_of_one_shape() -> None:
    coordinator, source = open_source(ordered=True, num_workers=3)
    states = [source.state_dict()]
    with coordinator:
        states.append(source.state_dict())
        states += [source.state_dict() for _ in source]
    states.append(source.state_dict())
    assert states[0] == states[1]
    assert states[-1] == states[-2]
    assert states[-1]["epoch"] == 3
    source.load_state_dict(states[7])
    assert source.state_dict() == states[7]
    states += [json.loads(json.dumps(state)) for state in states]
    assert len({tuple(state) for state in states}) == 1
    assert len({json.dumps({**state, "epoch": 0, "done": {}}) for state in states}) == 1, "nothing else changes"
    assert max(len(json.dumps(state)) for state in states) < 400
    with coordinator:
        assert source.state_dict() == states[7]
        source.next_batch()
        assert source.state_dict() == states[8]
    mixed, its = open_source(Mix({"a": (stream_of(rows_per_request=None), 1)}))
    with mixed:
        assert set(its.state_dict()) == set(states[0])


def test_a_state_is_taken_by_several_threads_while_another_reads() -> None:
    coordinator, source = open_source(stream_of(3000, epochs=2), num_workers=3)
    seen: list[list[Any]] = [[], [], []]
    done = threading.Event()

    def look(mine: list[Any]) -> None:
        while not done.is_set() or len(mine) < 20:
            mine.append((source.stats().batches_delivered, source.state_dict(), source.stats().batches_delivered))

    with coordinator:
        threads = [threading.Thread(target=look, args=(mine,)) for mine in seen]
        for thread in threads:
            thread.start()
        batches = list(source)
        done.set()
        for thread in threads:
            thread.join()
    assert plain(rows_of(batches)) == sorted([*range(3000)] * 2)
    for before, state, after in itertools.chain.from_iterable(seen):
        rows = state["epoch"] * 3000 + sum(stop - begin for spans in state["done"].values() for begin, stop in spans)
        assert min(4 * before, 6000) <= rows <= 4 * after + 4


@settings(max_examples=25)
@given(
    count=st.integers(0, 44), size=st.integers(1, 9), workers=st.sampled_from([0, 1, 4]), ordered=st.booleans(),
    epochs=st.sampled_from([3, 4, None]), epoch_end=st.sampled_from(["run_on", "break"]),
    was=st.sampled_from(["run_on", "break"]),
)  # fmt: skip
def test_batch_size_workers_order_epochs_and_epoch_end_may_change(
    count: int, size: int, workers: int, ordered: bool, epochs: int | None, epoch_end: str, was: str
) -> None:
    coordinator, source = open_source(stream_of(epoch_end=was))
    came = []
    with coordinator:
        while len(came) < count:
            came += (
                list(source) if was == "break" and len(came) + 15 <= count else [source.next_batch()] if was == "run_on" else []
            )
            if was == "break" and len(came) + 15 > count:
                came += [source.next_batch() for _ in range(count - len(came))]
        state = source.state_dict()
    rows_per_request = None if size % 2 else 5  # left out, it is the state's
    coordinator, source = open_source(
        stream_of(epochs=epochs, epoch_end=epoch_end, rows_per_request=rows_per_request),
        size,
        num_workers=workers,
        ordered=ordered,
    )
    source.load_state_dict(json.loads(json.dumps(state)))
    more = []
    wanted = 60 * (epochs or 5) - 4 * count
    with coordinator:
        while sum(batch.valid_rows for batch in more) < wanted:
            try:
                more.append(source.next_batch())
            except iw.EndOfData:
                assert epoch_end == "break"
        assert source.state_dict()["rows_per_request"] == 5
    rows = plain(rows_of(came)) + plain(rows_of(more))
    if epochs is not None:
        assert sorted(rows) == sorted([*range(60)] * epochs)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("epoch_end", ["run_on", "break"])
def test_a_state_of_batches_ago_is_that_of_the_moment_across_epochs_and_devices(epoch_end: str, devices: int) -> None:
    def open_here() -> iw.GlobalCoordinator:
        coordinator = iw.GlobalCoordinator()
        stream = stream_of(40, epochs=4, epoch_end=epoch_end)
        for scope in "ab"[:devices]:
            register(coordinator, stream, 4, name_scope=scope, last_batch="keep", device_queue_depth=32, num_workers=2)
        return coordinator

    coordinator = open_here()
    source = coordinator["train"]
    states, came = [source.state_dict()], []
    with coordinator:
        for _ in range(4 if epoch_end == "break" else 1):
            ended: set[str] = set()
            while len(ended) < devices:
                for scope in "ab"[:devices]:
                    try:
                        came.append(coordinator[f"{scope}/train"].next_batch())
                    except iw.EndOfData:
                        ended.add(scope)
                        now = source.state_dict(delivered=len(came))
                        assert now == states[-1], "an end mark is no batch: the `for` may not have asked for it"
                    else:
                        states.append(source.state_dict())
                    for back in (0, 1, 9, 38):
                        if back <= len(came):
                            assert source.state_dict(delivered=len(came) - back) == states[len(came) - back]
        assert len(came) == 40
        assert source.state_dict()["epoch"] == 4
    for count in (0, 9, 10, 11, 30, 40):
        coordinator = open_here()
        coordinator["train"].load_state_dict(states[count])
        rest = []
        with coordinator:
            for _ in range(5):
                for scope in "ab"[:devices]:
                    rest += list(coordinator[f"{scope}/train"])
        assert plain(rows_of(came[:count] + rest)) == sorted([*range(40)] * 4)


def test_a_plain_function_has_no_state_and_the_whole_leaves_it_out(
    coordinator: iw.GlobalCoordinator, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    source = register(coordinator, a_function, name="random")
    register(coordinator, stream_of())
    for call in (source.state_dict, lambda: source.load_state_dict({})):
        with pytest.raises(iw.StateMismatch, match="source 'random': a plain function has no position; wanted a Stream"):
            call()
    with caplog.at_level(logging.INFO, "input_workers"):
        state = coordinator.state_dict()
        assert list(state["sources"]) == ["train"]
        assert "plain functions have no position, so it says nothing of 'random'" in caplog.text
    coordinator.load_state_dict(state)
    coordinator.save_state(tmp_path / "state")
    coordinator.load_state(tmp_path / "state")
    with pytest.raises(iw.StateMismatch, match=r"sources: got \['random', 'train'\]; wanted \['train'\]"):
        coordinator.load_state_dict({**state, "sources": {**state["sources"], "random": {}}})


def test_only_a_source_that_stands_still_is_loaded(coordinator: iw.GlobalCoordinator, tmp_path: Path) -> None:
    source = register(coordinator, stream_of())
    other = register(coordinator, stream_of(), name="other")
    begin, path = coordinator.state_dict(), tmp_path / "state"
    coordinator.save_state(path)
    coordinator.start()
    calls = [
        lambda: source.load_state_dict(source.state_dict()), lambda: coordinator.load_state_dict(begin),
        lambda: coordinator.load_state(path),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(iw.LifecycleError, match=r"is running; load a state before start\(\), or after stop\(\)"):
            call()
    source.next_batch()
    source.stop()
    with pytest.raises(iw.LifecycleError, match="source 'other' is running"):
        coordinator.load_state_dict(begin)
    assert source.state_dict() != begin["sources"]["train"], "none was loaded, because one cannot be"
    source.load_state_dict(begin["sources"]["train"])
    assert source.state_dict() == begin["sources"]["train"]
    other.stop()
    coordinator.load_state_dict(begin)


@pytest.mark.parametrize("bad", ["one", "two", "three"])
def test_all_sources_are_loaded_or_none(coordinator: iw.GlobalCoordinator, bad: str) -> None:
    for name in ("one", "two", "three"):
        register(coordinator, stream_of(), name=name)
    coordinator.start()
    for source in coordinator:
        source.next_batch()
    coordinator.stop()
    first = coordinator.state_dict()
    coordinator.load_state_dict(first)
    coordinator.start()
    for source in coordinator:
        source.next_batch()
    coordinator.stop()
    second = coordinator.state_dict()
    coordinator.load_state_dict(first)
    wrong = json.loads(json.dumps(second))
    wrong["sources"][bad]["stream"]["seed"] = 4
    with pytest.raises(iw.StateMismatch, match=f"source '{bad}': state: stream.seed: got 4; wanted 3"):
        coordinator.load_state_dict(wrong)
    assert coordinator.state_dict() == first
    for more in ({}, {**second["sources"], "four": second["sources"]["one"]}):
        with pytest.raises(iw.StateMismatch, match=r"sources: got .*; wanted \['one', 'three', 'two'\]"):
            coordinator.load_state_dict({**second, "sources": more})
    assert coordinator.state_dict() == first
    coordinator.load_state_dict(second)
    assert coordinator.state_dict() == second != first


@pytest.mark.parametrize(
    "wrong", [None, 5, {}, {"format": 1}, {"format": 2, "sources": {}}, {"format": 1, "sources": []}, [None]]
)
def test_what_is_no_state_of_a_coordinator_is_refused(coordinator: iw.GlobalCoordinator, wrong: Any) -> None:
    register(coordinator, stream_of())
    with pytest.raises(iw.StateMismatch, match=r"state: .*got .*; wanted"):
        coordinator.load_state_dict(wrong)


def test_files_of_all_shards_are_loaded_into_another_number_of_them(tmp_path: Path) -> None:
    came = []
    for index in range(3):
        coordinator, source = open_source(stream_of(shard=(index, 3)))
        with coordinator:
            came += [source.next_batch() for _ in range(2 + index)]
            coordinator.save_state(tmp_path / str(index))
    paths = [tmp_path / str(index) for index in range(3)]
    for index in range(2):
        coordinator, source = open_source(stream_of(shard=(index, 2)))
        before = source.state_dict()
        for some in (paths[:2], [*paths, paths[0]]):
            with pytest.raises(iw.StateMismatch, match=r"shard: got .*; wanted \[\d, 2\], or the states of all shards"):
                coordinator.load_state(some)
        assert source.state_dict() == before
        coordinator.load_state(paths)
        with coordinator:
            came += list(source)
    assert plain(rows_of(came)) == sorted([*range(60)] * 3)


def test_taking_a_state_is_little_work_however_much_was_delivered() -> None:
    coordinator, source = open_source(stream_of(10**5, epochs=None, rows_per_request=1), 1, num_workers=3)
    seconds = []
    with coordinator:
        for number in range(3000):
            source.next_batch()
            if number % 30 == 0:
                started = time.perf_counter()
                state = source.state_dict()
                seconds.append(time.perf_counter() - started)
                assert len(state["done"].get("0", [])) <= 64
    assert sorted(seconds)[50] < 0.02  # 0.1 ms on one quiet core, 128 deliveries being looked at


def test_a_state_is_kept_while_what_it_says_is_not_done() -> None:
    coordinator, source = open_source(ordered=True)
    with coordinator:
        came = [source.next_batch() for _ in range(3)]
    state = source.state_dict()
    for _ in range(2):
        source.load_state_dict(state)
        coordinator.start()
        coordinator.stop()
        assert source.state_dict() == state, "nothing was delivered"
    source.load_state_dict(state)
    with coordinator:
        came += list(source)
    assert plain(rows_of(came)) == sorted([*range(60)] * 3)
    with coordinator:
        assert len(list(source)) == 45, "a start without a state is at the beginning"


def test_a_device_that_is_stopped_in_an_epoch_does_not_hold_it_up() -> None:
    coordinator = iw.GlobalCoordinator()
    stream = stream_of(32, epochs=2, epoch_end="break")
    for scope in "ab":
        register(coordinator, stream, 4, name_scope=scope, last_batch="keep", num_workers=1)
    source, first, second = coordinator["train"], coordinator["a/train"], coordinator["b/train"]
    with coordinator:
        second.next_batch()
        await_true(lambda: second.stats().queue_depth > 0)
        second.stop()
        rows = len(rows_of(list(first)))
        assert rows < 32
        assert source.state_dict()["epoch"] == 1
        assert source.state_dict()["done"] == {}
        assert len(list(first)) == 8
        assert list(first) == []
        assert source.state_dict()["epoch"] == 2


def test_a_global_state_that_is_none_names_what_is_wrong() -> None:
    coordinator = iw.GlobalCoordinator()
    for state, text in (
        ([], "an empty list"),
        ({"format": True, "sources": {}}, "format: got True"),
        ({}, "wanted what state_dict"),
        ({"format": 2, "sources": {}}, "format: got 2; wanted 1"),
    ):
        with pytest.raises(iw.StateMismatch, match=text):
            coordinator.load_state_dict(state)


@pytest.mark.parametrize("delivered", ["3", True, 1.5])
def test_a_number_of_batches_that_is_none_is_refused(delivered: Any) -> None:
    coordinator = iw.init_data_input_workers(
        "numpy", ["row"], iw.Stream(iw.sources.Arrays(np.arange(8))), 2, coordinator=iw.GlobalCoordinator()
    )
    with coordinator, pytest.raises(iw.ConfigError, match="delivered: got"):
        coordinator["train"].state_dict(delivered=delivered)


def test_a_start_that_fails_keeps_what_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = iw.GlobalCoordinator()
    for name in ("a", "b"):
        iw.init_data_input_workers(
            "numpy", ["row"], iw.Stream(iw.sources.Arrays(np.arange(40))), 2, 1, name, coordinator=coordinator
        )
    with coordinator:
        for _ in range(10):
            coordinator["a"].next_batch()
    state = coordinator["a"].state_dict()
    coordinator["a"].load_state_dict(state)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("fetcher-b"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            coordinator.start()
    assert coordinator["a"].state_dict() == state
    with coordinator:
        assert coordinator["a"].next_batch().row.tolist() == [20, 21]
