"""Streams by themselves: what is refused and how, which rows a shard reads, and what a large source costs."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from gates import register
from hypothesis import example, given, settings
from hypothesis import strategies as st

import input_workers as iw


class Rows:
    """So many rows, each of which is its number."""

    def __init__(self, rows: int, block_rows: Any = None) -> None:
        self.rows = rows
        if block_rows is not None:
            self.block_rows = block_rows

    def __len__(self) -> int:
        return self.rows

    def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
        return [rows.copy(), rows * 2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"source": 5}, "got 5; wanted an object with __len__ and fetch"),
        ({"source": Rows}, "got <class .*; wanted an object with __len__ and fetch"),
        ({"source": [1, 2]}, r"got \[1, 2\]; wanted an object"),
        ({"source": Rows(0)}, "the Rows has 0 rows; wanted 1 to"),
        ({"source": Rows(2**62 + 1)}, r"the Rows has 46.* rows; wanted 1 to 2\*\*62"),
        ({"source": Rows(4, 0), "shuffle": True}, "block_rows of the Rows: got 0; wanted a whole number of at least 1"),
        ({"source": Rows(4, 2.5), "shuffle": True}, "block_rows of the Rows: got 2.5"),
        ({"shuffle": "no"}, "shuffle: got 'no'; wanted True or False"),
        ({"shuffle": 1}, "shuffle: got 1; wanted True or False"),
        ({"seed": -1}, "seed: got -1; wanted a whole number of at least 0"),
        ({"seed": 0.5}, "seed: got 0.5; wanted a whole number"),
        ({"seed": None}, "seed: got None"),
        ({"epochs": 0}, "epochs: got 0; wanted a whole number of at least 1"),
        ({"epochs": float("inf")}, "epochs: got inf; wanted a whole number"),
        ({"epochs": True}, "epochs: got True"),
        ({"rows_per_request": 0}, "rows_per_request: got 0; wanted a whole number of at least 1"),
        ({"rows_per_request": "8"}, "rows_per_request: got '8'"),
        ({"epoch_end": "stop"}, "epoch_end: got 'stop'; wanted 'run_on' or 'break'"),
        ({"epoch_end": np.zeros(2)}, "epoch_end: got array"),
        ({"shard": (2, 2)}, "shard: got index 2 of 2 shards; wanted 0 to 1"),
        ({"shard": (-1, 2)}, "shard index: got -1; wanted a whole number of at least 0"),
        ({"shard": (0, 0)}, "shard count: got 0; wanted a whole number of at least 1"),
        ({"shard": (0.0, 2)}, "shard index: got 0.0"),
        ({"shard": (0, 1, 2)}, r"shard: got \(0, 1, 2\); wanted \(index, count\) or 'auto'"),
        ({"shard": 0}, r"shard: got 0; wanted \(index, count\) or 'auto'"),
        ({"shard": None}, "shard: got None; wanted"),
        ({"shard": "first"}, "shard: got 'first'; wanted"),
        ({"shard": b"\x00\x01"}, "shard: got b.*; wanted"),
        ({"shard": np.array([0, 2])}, "shard: got array.*; wanted"),
    ],
)
def test_a_wrong_parameter_is_named_with_what_was_wanted(more: dict[str, Any], message: str) -> None:
    with pytest.raises(iw.ConfigError, match=f"^Stream: {message}"):
        iw.Stream(**{"source": Rows(4), **more})


@pytest.mark.parametrize("rank", [None, "", "-1", "one", "1.0", " 1", "2", "9" * 5000])
@pytest.mark.parametrize("world", [None, "", "0", "2", "2 ", "9" * 5000])
def test_ranks_that_the_environment_does_not_say_are_refused(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, world: str | None
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(iw.ConfigError, match=r"shard.*got .*; wanted"):
        iw.Stream(Rows(100), shard="auto")


def test_a_shard_is_that_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert iw.Stream(Rows(100), shard="auto").shard == (1, 3)


def test_numbers_of_numpy_are_numbers_and_a_state_of_them_is_plain() -> None:
    stream = iw.Stream(
        Rows(100, np.int64(5)), np.True_, np.int64(3), np.int32(2), (np.int8(0), np.uint8(2)), rows_per_request=np.int64(7)
    )
    numbers = [stream.seed, stream.epochs, *stream.shard, stream.rows_per_request, stream.block_rows]
    assert [type(number) for number in numbers] == [int] * 6
    assert type(stream.shuffle) is bool
    assert {type(value) for value in stream.identity("drop").values()} == {int, bool}


@pytest.mark.parametrize("last_batch", ["drop", "keep"])
def test_a_shard_without_rows_is_refused_where_it_is_registered(coordinator: iw.GlobalCoordinator, last_batch: str) -> None:
    for index in (0, 3, 4):
        with pytest.raises(
            iw.ConfigError, match=f"shard=.{index}, 5.*4 rows among 5 shards.*last_batch='{last_batch}'.*at most 4"
        ):
            register(coordinator, iw.Stream(Rows(4), shard=(index, 5)), 2, last_batch=last_batch)
    assert len(coordinator) == 0
    for number, last in enumerate(("pad", last_batch)):
        register(coordinator, iw.Stream(Rows(4 + number), shard=(4, 5)), 2, name=f"fits-{last}", last_batch=last)


@pytest.mark.parametrize(
    ("rows", "batch", "more", "refused"),
    [
        (8, 4, {}, False),  # 4 and 4
        (9, 4, {}, True),  # 4 and 5 rows: 1 and 2 batches
        (11, 4, {}, False),  # 5 and 6 rows: 2 batches each
        (11, 4, {"epochs": 2}, False),  # 10 and 12: 3 batches each
        (11, 4, {"epochs": 3}, True),  # 15 and 18: 4 and 5 batches
        (11, 4, {"epochs": 3, "epoch_end": "break"}, False),  # 2 batches in each epoch
        (9, 4, {"epochs": None}, False),  # no rank ever ends
        (9, 4, {"epochs": None, "epoch_end": "break"}, True),
    ],
)
def test_ranks_that_would_wait_for_each_other_are_refused(
    coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch, rows: int, batch: int, more: Any, refused: bool
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        stream = iw.Stream(Rows(rows), shard="auto", **more)
        for last_batch in ("drop", "pad"):
            register(coordinator, stream, batch, name=f"{last_batch}{rank}", last_batch=last_batch)
        if refused:
            with pytest.raises(
                iw.ConfigError, match=f"shard='auto' with last_batch='keep': {rows} rows among 2 ranks .* 'pad'"
            ):
                register(coordinator, stream, batch, name=f"keep{rank}", last_batch="keep")
        else:
            register(coordinator, stream, batch, name=f"keep{rank}", last_batch="keep")
        same = iw.Stream(Rows(rows), shard=(int(rank), 2), **more)  # who says which shard is trusted to know
        register(coordinator, same, batch, name=f"same{rank}", last_batch="keep")


@settings(max_examples=200)
@given(rows=st.integers(1, 60), count=st.integers(1, 70), last=st.sampled_from(["drop", "keep", "pad"]), shuffle=st.booleans())
@example(rows=3, count=10, last="pad", shuffle=False)
@example(rows=7, count=4, last="pad", shuffle=True)
def test_shards_are_disjoint_and_complete(rows: int, count: int, last: str, shuffle: bool) -> None:
    for epoch in (0, 3):
        shards = []
        for index in range(count):
            plan = iw.Stream(Rows(rows), shuffle, 5, None, (index, count)).plan(last, (0,))
            size = plan.epoch_rows(epoch)
            cut = size // 2  # however it is read
            numbers = [*plan.rows(epoch, 0, cut).tolist(), *plan.rows(epoch, cut, size).tolist()] if size > 1 else []
            assert not numbers or plan.rows(epoch, 0, size).tolist() == numbers
            shards.append(plan.rows(epoch, 0, size).tolist() if size else [])
            assert plan.most_rows >= len(shards[-1]) == size
        every = [row for shard in shards for row in shard]
        sizes = {len(shard) for shard in shards}
        if last == "drop":
            assert sizes == {rows // count}
            assert len(every) == len(set(every)) == rows // count * count
        elif last == "pad":
            assert sizes == {-(-rows // count)}
            assert set(every) == set(range(rows))
        else:
            assert sizes <= {rows // count, -(-rows // count)}
            assert sorted(every) == list(range(rows))
        whole = iw.Stream(Rows(rows), shuffle, 5, None).plan(last, (0,)).rows(epoch, 0, rows).tolist()
        assert every == (whole * (len(every) // rows + 1))[: len(every)], "shards one after the other are the whole order"


@pytest.mark.parametrize("epoch_end", ["run_on", "break"])
@pytest.mark.parametrize("last_batch", ["drop", "pad"])
@pytest.mark.parametrize(("rows", "count"), [(50, 3), (10, 4), (7, 7)])
def test_every_shard_has_equally_many_batches(last_batch: str, epoch_end: str, rows: int, count: int) -> None:
    seen = []
    for index in range(count):
        coordinator = iw.GlobalCoordinator()
        stream = iw.Stream(Rows(rows), True, 7, 3, (index, count), rows_per_request=4, epoch_end=epoch_end)
        source = register(coordinator, stream, 3, last_batch=last_batch, num_workers=index % 3)
        with coordinator:
            seen.append([[batch.valid_rows for batch in source] for _ in range(4)])
    assert len({str(each) for each in seen}) == 1
    share = rows // count if last_batch == "drop" else -(-rows // count)
    batches = [sum(map(bool, loop)) for loop in seen[0]]
    per = share if epoch_end == "break" else share * 3
    whole = per // 3 if last_batch == "drop" else -(-per // 3)
    assert batches == ([whole] * 3 + [0] if epoch_end == "break" else [whole, 0, 0, 0])


def test_ten_thousand_million_rows_cost_what_a_thousand_do() -> None:
    def cost(rows: int) -> int:
        tracemalloc.start()
        try:
            plan = iw.Stream(Rows(rows), True, 3, None, (1, 3)).plan("drop", (0,))
            for at in (0, 100, 200):
                assert len(plan.rows(2, at, at + 100)) == 100
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    cost(1000)
    assert cost(10**10) < cost(1000) + 400_000  # a piece of the order, 4,096 numbers, and what it takes to compute it


def test_the_first_request_computes_a_small_piece_of_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from input_workers.sources import permutation

    computed: list[int] = []
    network = permutation.Permutation._network
    monkeypatch.setattr(
        permutation.Permutation, "_network",
        lambda self, numbers, backwards: computed.append(numbers.size) or network(self, numbers, backwards),
    )  # fmt: skip
    plan = iw.Stream(Rows(10**10), True, 3, None, (2, 5)).plan("pad", (0,))
    assert len(plan.rows(0, 0, 64)) == 64
    assert 64 <= sum(computed) < 4 * 4096


def test_rows_are_read_only_whole_numbers() -> None:
    for stream, where in ((iw.Stream(Rows(10)), (0, 10)), (iw.Stream(Rows(10), True, shard=(2, 3)), (0, 4))):
        rows = stream.plan("pad", (0,)).rows(0, *where)
        assert rows.dtype == np.int64
        assert not rows.flags.writeable
