"""What was delivered, to the row: spans against sets, logs against a list of everything that was ever delivered."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest
from gates import register
from hypothesis import given
from hypothesis import strategies as st

import input_workers as iw
from input_workers.contracts import Part
from input_workers.flow.device_queue import DeviceQueue
from input_workers.progress import KEPT, MARKS, DeliveryLog, Progress, Spans, add_span, gaps, rows_of, slice_of

Span = st.tuples(st.integers(0, 40), st.integers(0, 40))


def members(spans: Any) -> set[int]:
    return {offset for begin, stop in spans for offset in range(begin, stop)}


def are_normal(spans: Spans) -> bool:
    ends = [end for span in spans for end in span]
    return ends == sorted(set(ends))


@given(st.lists(Span, max_size=20))
def test_added_spans_are_the_union_sorted_and_never_touching(added: list[tuple[int, int]]) -> None:
    spans: Spans = []
    wanted: set[int] = set()
    for begin, stop in added:
        add_span(spans, begin, stop)
        wanted |= set(range(begin, stop))
        assert members(spans) == wanted
        assert are_normal(spans)
        assert rows_of(spans) == len(wanted)


@given(st.lists(Span, max_size=12), Span)
def test_gaps_are_what_is_missing_in_order(added: list[tuple[int, int]], where: tuple[int, int]) -> None:
    spans: Spans = []
    for begin, stop in added:
        add_span(spans, begin, stop)
    found = gaps(spans, *where)
    assert members(found) == set(range(*where)) - members(spans)
    assert are_normal(found)


@given(st.lists(Span.filter(lambda span: span[0] < span[1]), max_size=6), Span)
def test_a_slice_of_spans_is_the_slice_of_their_members_one_after_the_other(layout: Spans, where: tuple[int, int]) -> None:
    positions = [offset for begin, stop in layout for offset in range(begin, stop)]
    begin, stop = where
    assert [offset for span in slice_of(layout, begin, stop) for offset in range(*span)] == positions[begin : max(begin, stop)]


class Delivered:
    """Delivers as `DeviceQueue.commit` does, and remembers everything in one list: the oracle."""

    def __init__(self, rows: int, devices: int, has_marks: bool, done: dict[int, Spans] | None = None) -> None:
        self.rows, self.has_marks = rows, has_marks
        self.logs = [DeliveryLog() for _ in range(devices)]
        self.progress = Progress(0, done or {}, lambda epoch: rows, self.logs, has_marks)
        self.all: list[tuple[list[Part], bool]] = [([(epoch, *span) for epoch in done or {} for span in done[epoch]], False)]
        self.wanted_marks = set(range(devices))

    def deliver(self, device: int, parts: list[Part], is_batch: bool = True) -> None:
        log = self.logs[device]
        self.progress.add(log.oldest())
        log.entries[log.count % len(log.entries)] = (float(len(self.all)), parts, is_batch)
        log.count += 1
        log.batches += is_batch
        self.all.append((parts, is_batch))

    def mark(self, device: int, epoch: int) -> None:
        self.deliver(device, [(epoch, MARKS + device, MARKS + device + 1)], is_batch=False)

    def at(self, delivered: int | None = None) -> tuple[int, dict[int, set[int]]]:
        """Return what `Progress.at` should, by going through everything from the beginning."""
        entries = self.all
        if delivered is not None:
            batches = 0
            for stop, (_, is_batch) in enumerate([*entries, ([], True)]):
                batches += is_batch
                if batches > delivered:  # end marks before the next batch do not count, they may not have been asked for
                    last = max([index for index in range(stop) if entries[index][1]], default=0)
                    entries = entries[: last + 1]
                    break
        done: dict[int, set[int]] = {}
        for parts, _ in entries:
            for epoch, begin, stop in parts:
                done.setdefault(epoch, set()).update(range(begin, stop) if begin < MARKS else [begin])
        first = 0
        while self._is_finished(done.get(first, set())):
            done.pop(first)
            first += 1
        real = {epoch: {offset for offset in offsets if offset < MARKS} for epoch, offsets in done.items() if epoch >= first}
        return first, {epoch: offsets for epoch, offsets in real.items() if offsets}

    def _is_finished(self, offsets: set[int]) -> bool:
        if self.has_marks:
            marks = {offset - MARKS for offset in offsets if offset >= MARKS}
            return bool(marks) and marks >= self.wanted_marks
        return len(offsets) == self.rows


def as_sets(at: tuple[int, dict[int, Spans], tuple[int, ...]] | None) -> tuple[int, dict[int, set[int]]]:
    assert at is not None
    first, done, _ = at
    assert all(spans and are_normal(spans) for spans in done.values())
    assert list(done) == sorted(done)
    return first, {epoch: members(spans) for epoch, spans in done.items()}


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("has_marks", [False, True])
def test_positions_now_and_64_batches_back_are_those_of_everything_that_was_delivered(devices: int, has_marks: bool) -> None:
    chance = random.Random(devices * 2 + has_marks)
    rows = 60
    delivered = Delivered(rows, devices, has_marks, {0: [(10, 14), (20, 25)]})
    todo = [
        (epoch, at)
        for epoch in range(12)
        for at in range(0, rows, 2)
        if (epoch, at) not in {(0, 10), (0, 12), (0, 20), (0, 22)}
    ]
    count = 0
    for epoch in range(12):
        turn = [at for each, at in todo if each == epoch]
        for index in range(0, len(turn), 5):  # a little out of order, as unordered delivery is
            turn[index : index + 9] = chance.sample(turn[index : index + 9], len(turn[index : index + 9]))
        for at in turn:
            delivered.deliver(chance.randrange(devices), [(epoch, at, at + 1), (epoch, at + 1, at + 2)])
            count += 1
            assert as_sets(delivered.progress.at()) == delivered.at()
            for back in {0, 1, chance.randrange(KEPT), KEPT}:
                if back <= count:
                    assert as_sets(delivered.progress.at(count - back)) == delivered.at(count - back), back
            for wrong in (-1, count + 1, count - KEPT - 1):
                assert delivered.progress.at(wrong) is None
        if has_marks:
            for device in chance.sample(range(devices), devices):
                delivered.mark(device, epoch)
                assert as_sets(delivered.progress.at()) == delivered.at()
                assert as_sets(delivered.progress.at(count)) == delivered.at(count), "before the `for` has ended"
    assert delivered.progress.batches == count
    assert as_sets(delivered.progress.at()) == (12, {})


def test_a_stopped_device_is_not_waited_for() -> None:
    delivered = Delivered(10, 3, True)
    delivered.deliver(0, [(0, 0, 10)])
    delivered.mark(0, 0)
    delivered.mark(2, 0)
    assert delivered.progress.at() == (0, {0: [(0, 10)]}, (0, 2))
    delivered.progress.drop_device(1)
    assert delivered.progress.at() == (1, {}, ())
    delivered.deliver(2, [(1, 0, 4)])
    delivered.mark(2, 1)
    assert delivered.progress.at() == (1, {1: [(0, 4)]}, (2,))
    delivered.progress.drop_device(0)
    assert delivered.progress.at() == (2, {}, ())


class Racing(DeliveryLog):
    """A log in which something is delivered while it is looked at."""

    __slots__ = ("meanwhile",)

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: Any = None

    def latest(self) -> Any:
        found = super().latest()
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        return found


def test_a_position_of_batches_ago_holds_still_while_others_read() -> None:
    delivered = Delivered(1000, 2, False)
    racing = Racing()
    delivered.logs[0] = racing
    for count in range(200):
        delivered.deliver(count % 2, [(0, count, count + 1)])
    racing.meanwhile = lambda: [delivered.deliver(device, [(0, 200 + device, 201 + device)]) for device in (1, 0)]
    assert delivered.progress.at(150) == (0, {0: [(0, 150)]}, ())
    assert racing.meanwhile is None


def test_whatever_threads_read_a_position_is_that_of_so_many_batches(coordinator: iw.GlobalCoordinator) -> None:
    numbers = np.arange(4000)
    stream = iw.Stream(iw.sources.Arrays(numbers, numbers), rows_per_request=2)
    source = register(coordinator, stream, 2, ordered=True)
    coordinator.start()
    wrong: list[Any] = []

    def read() -> None:
        for _ in source:
            pass

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    looked = 0
    while any(reader.is_alive() for reader in readers) or looked < 50:
        looked += 1
        count = source.stats().batches_delivered
        for back in (0, 30):
            try:
                state = source.state_dict(delivered=max(count - back, 0))
            except iw.ConfigError:  # more than 64 batches were delivered since it was counted
                continue
            rows = sum(stop - begin for begin, stop in state["done"].get("0", [])) + state["epoch"] * 4000
            if rows != 2 * max(count - back, 0):
                wrong.append((count, back, state))
    for reader in readers:
        reader.join()
    assert not wrong, wrong[:3]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_batch_that_ctrl_c_took_from_the_trainer_is_not_delivered(
    coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    numbers = np.arange(40)
    source = register(coordinator, iw.Stream(iw.sources.Arrays(numbers, numbers), rows_per_request=3), 4)
    coordinator.start()
    came = [source.next_batch().data.tolist() for _ in range(3)]
    before = source.state_dict()
    commit = DeviceQueue.commit

    def interrupted(queue: DeviceQueue, batch: Any, *more: Any) -> None:
        if when == "after":
            commit(queue, batch, *more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(DeviceQueue, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            source.next_batch()
    assert source.state_dict() == source.state_dict(delivered=3) == before
    with pytest.raises(iw.ConfigError):
        source.state_dict(delivered=4)
    came.append(source.next_batch().data.tolist())
    assert source.state_dict() == source.state_dict(delivered=4)
    assert source.state_dict(delivered=3) == before
    came += [batch.data.tolist() for batch in source]
    assert [row for rows in came for row in rows] == numbers.tolist()
