"""Mixes: against drawing one row after the other, with cut, failing, short and endless streams."""

from __future__ import annotations

import itertools
import json
import re
import time
from typing import Any

import numpy as np
import pytest
from gates import register
from hypothesis import given, settings
from hypothesis import strategies as st

import input_workers as iw
from input_workers.sources import mix as mix_module
from input_workers.sources.mix import ENDLESS, Mix, MixPlan
from input_workers.sources.mix_shares import BLOCK_DRAWS, shares_of_block

# A row is BASE times the number of its stream, a million times its epoch, and its own number.
BASE = 10**15


class Rows:
    """Rows that say whose and which they are, with a random number of their request."""

    def __init__(self, rows: int, number: int = 0, bad: tuple[int, ...] = (), names_bad: bool = True) -> None:
        self.rows, self.number, self.bad, self.names_bad = rows, number, bad, names_bad

    def __len__(self) -> int:
        return self.rows

    def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
        wrong = [row for row in rows.tolist() if row in self.bad]
        if wrong:
            raise iw.BadRows(wrong) if self.names_bad else OSError(f"cannot read {wrong}")
        epochs = np.full(len(rows), request.epoch)
        return [self.number * BASE + epochs * 10**6 + rows, request.rng.integers(0, 1 << 60, len(rows))]

    def file_of(self, row: int) -> str:
        return f"file-{self.number}-{row}"


def mix_of(*streams: tuple[Any, ...], **more: Any) -> Mix:
    """Return a Mix of (rows, weight) or (rows, weight, arguments of the Stream)."""
    named = {}
    for number, (rows, weight, *arguments) in enumerate(streams):
        stream = iw.Stream(Rows(rows, number), **(arguments[0] if arguments else {}))
        named[f"s{number}"] = stream, weight
    return Mix(named, **more)


def plan_of(mix: Mix, last_batch: str = "keep") -> MixPlan:
    return mix.plan(last_batch, (0, 0))


class Reuses(Rows):
    """Uses its memory again for each call."""

    memory = np.zeros((2, 1000), np.int64)

    def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
        self.memory[:, : len(rows)] = super().fetch(rows, request)
        return list(self.memory[:, : len(rows)])


@pytest.mark.parametrize("shared", [False, True])
def test_a_source_that_uses_its_memory_again_may_be_called_twice_for_a_request(shared: bool) -> None:
    own, other = Reuses(7), Rows(7)
    first = iw.Stream(own, epochs=3)
    mix = Mix({"a": (first, 1.0), "b": (iw.Stream(own if shared else other, epochs=3), 1.0)})
    good = Mix({"a": (iw.Stream(other, epochs=3), 1.0), "b": (iw.Stream(other, epochs=3), 1.0)})
    for begin in range(0, 40, 20):
        assert fetch(plan_of(mix), begin, begin + 20) == fetch(plan_of(good), begin, begin + 20)


def joined(lists: list[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


def fetch(plan: MixPlan, begin: int, stop: int, index: int = 0) -> list[int]:
    rows = plan.rows(0, begin, stop)
    return plan.fetch(rows, iw.FetchRequest(index, 0, rows))[0].tolist()


def one_by_one(mix: Mix, plan: MixPlan, last_batch: str, most: int) -> list[int]:
    """Return what a mix gives, by drawing one row after the other. The draws of a block are the plan's own."""
    children = []
    for number, (stream, _) in enumerate(mix.streams.values()):
        own = stream.plan(last_batch, (0, 0))
        children.append(
            (number, own, iter(range(10**9)) if stream.epochs is None else iter(range(stream.epochs * own.regular_rows)))
        )
    alive = list(range(len(children)))
    came: list[int] = []
    phase = 0
    while alive and len(came) < most:
        ended = None
        for draw in range(10**9):
            state = plan._phases[phase]
            assert state.streams == tuple(alive)
            position = int(plan._block(state, draw // BLOCK_DRAWS)[0][draw % BLOCK_DRAWS])
            number, own, rows = children[alive[position]]
            at = next(rows, None)
            if at is None:
                ended = alive[position]
                break
            epoch, offset = divmod(at, own.regular_rows)
            came.append(number * BASE + epoch * 10**6 + int(own.rows(epoch, offset, offset + 1)[0]))
            if len(came) == most:
                return came
        if mix.ends == "first":
            return came
        alive = [each for each in alive if each != ended and remains(children[each])]
        phase += 1
    return came


def remains(child: Any) -> bool:
    """Whether the stream has a row left. Looks ahead without taking it."""
    at = child[2].__reduce__()[1][0], child[2].__reduce__()[2] if len(child[2].__reduce__()) > 2 else 0
    return len(at[0]) > at[1]


@settings(max_examples=60)
@given(
    streams=st.lists(
        st.tuples(st.integers(1, 30), st.sampled_from([0.1, 1, 2.5, 7]), st.integers(1, 3), st.booleans(), st.integers(1, 3)),
        min_size=1, max_size=4,
    ),
    seed=st.integers(0, 5),
    ends=st.sampled_from(["first", "all"]),
    last=st.sampled_from(["drop", "keep", "pad"]),
    endless=st.booleans(),
)  # fmt: skip
def test_positions_are_those_of_drawing_one_row_after_the_other(
    streams: Any, seed: int, ends: str, last: str, endless: bool
) -> None:
    described = [
        (rows + 2, weight, {"epochs": epochs, "shuffle": shuffle, "seed": 3, "shard": (count - 1, count)})
        for rows, weight, epochs, shuffle, count in streams
    ]
    if endless:
        described[0][2]["epochs"] = None
    mix = mix_of(*described, seed=seed, ends=ends)
    plan = plan_of(mix, last)
    finite = not endless or (ends == "first" and len(streams) > 1)
    assert (plan.most_rows < ENDLESS) == finite
    most = min(plan.most_rows, 400)
    wanted = one_by_one(mix, plan, last, 10**6 if finite else 400)
    assert len(wanted) == (plan.most_rows if finite else 400)
    assert fetch(plan, 0, most) == wanted[:most]
    for begin in range(0, most, 7):
        assert fetch(plan, begin, min(begin + 7, most)) == wanted[begin : begin + 7]
    if finite and ends == "all":
        for number, (stream, _) in enumerate(mix.streams.values()):
            own = stream.plan(last, (0, 0))
            mine = [row % BASE for row in wanted if row // BASE == number]
            order = [
                epoch * 10**6 + row
                for epoch in range(stream.epochs or 0)
                for row in own.rows(epoch, 0, own.regular_rows).tolist()
            ]
            assert mine == order, "a stream's own rows keep their order, and all come"


def test_far_positions_are_those_of_counting_from_the_beginning() -> None:
    mix = mix_of(
        (1000, 3, {"epochs": None, "shuffle": True}), (70, 1, {"epochs": None}), (20_000, 5, {"epochs": 2}), ends="all"
    )
    plan = plan_of(mix)
    wanted = one_by_one(mix, plan, "keep", 90_000)
    assert len(plan._phases) == 2
    for begin in (
        0,
        BLOCK_DRAWS - 5,
        3 * BLOCK_DRAWS - 100,
        plan._phases[1].begin - 3,
        plan._phases[1].begin + BLOCK_DRAWS - 9,
    ):
        assert fetch(plan, begin, begin + 200) == wanted[begin : begin + 200]
    far = fetch(plan, 10**15, 10**15 + 5)
    assert len(far) == len(set(far)) == 5


@pytest.mark.parametrize("weights", [[1], [1, 1], [5, 3, 1], [0.3, 0.1, 0.6], [1e300, 1e300], [1, 16_000], [1e-300, 3e-300]])
def test_of_every_block_each_stream_has_its_exact_share(weights: list[float]) -> None:
    mix = mix_of(*[(10, weight, {"epochs": None}) for weight in weights], seed=2)
    plan = plan_of(mix)
    largest = max(weights)
    whole = sum(weight / largest for weight in weights)
    for block in (0, 7):
        drawn = np.array(fetch(plan, block * BLOCK_DRAWS, (block + 1) * BLOCK_DRAWS)) // BASE
        counts = np.bincount(drawn, minlength=len(weights))
        assert counts.sum() == BLOCK_DRAWS
        assert all(abs(got - weight / largest / whole * BLOCK_DRAWS) < 1 for got, weight in zip(counts, weights, strict=True))


@settings(max_examples=100)
@given(st.lists(st.floats(0.6, 2.0), max_size=60), st.lists(st.floats(20, 1e4), min_size=1, max_size=20))
def test_shares_add_up_however_many_weights_are_below_a_row(small: list[float], large: list[float]) -> None:
    scale = BLOCK_DRAWS / (sum(large) + 60)  # so that the small ones are about a row of a block
    weights = [
        *small,
        *(each * scale for each in large),
    ]
    shares = shares_of_block(weights, [str(number) for number in range(len(weights))])
    assert sum(shares) == BLOCK_DRAWS
    assert min(shares) >= 1


def test_what_is_left_of_a_block_goes_to_the_largest_remainders() -> None:
    assert shares_of_block([5, 3, 1], list("abc")) == [9102, 5461, 1821]  # exactly 9,102.2, 5,461.3 and 1,820.4
    assert shares_of_block([1, 1, 1], list("abc")) == [5462, 5461, 5461]
    assert shares_of_block([16_383.4, 0.6], list("ab")) == [16_383, 1]
    assert shares_of_block([16_382.2, 0.6, 0.6, 0.6], list("abcd")) == [16_381, 1, 1, 1]


def test_ten_thousand_streams_below_a_row_are_refused_or_add_up() -> None:
    shares = shares_of_block([1.0] * 16_000, ["x"] * 16_000)
    assert sum(shares) == BLOCK_DRAWS
    with pytest.raises(iw.ConfigError, match="got 20000 streams; wanted at most 16384"):
        shares_of_block([1.0] * 20_000, ["x"] * 20_000)


def test_an_order_is_well_mixed_and_the_seed_s_alone() -> None:
    def draws(seed: int) -> list[int]:
        plan = plan_of(mix_of((10, 1, {"epochs": None}), (10, 1, {"epochs": None}), seed=seed))
        return [row // BASE for row in fetch(plan, 0, 40_000)]

    one = draws(1)
    assert one == draws(1) != draws(2)
    assert one[:BLOCK_DRAWS] != one[BLOCK_DRAWS : 2 * BLOCK_DRAWS]
    runs = 1 + sum(left != right for left, right in itertools.pairwise(one))
    assert abs(runs - 20_000) < 5 * 100  # five standard deviations of fair coins
    pairs = np.bincount([4 * a + 2 * b + c for a, b, c in zip(one, one[1:], one[2:], strict=False)])
    assert abs(pairs - 5000).max() < 500
    assert one[:40] == SEED_1, "the same with every version of NumPy: saved positions rely on it"


SEED_1 = [int(digit) for digit in "0010010001111001100001011111110011111100"]


@pytest.mark.parametrize(
    ("streams", "more", "message"),
    [
        ({}, {}, r"got \{\}; wanted \{name: \(stream, weight\), ...\}"),
        ([], {}, r"got \[\]; wanted"),
        (5, {}, "got 5; wanted"),
        ({"a": None}, {}, r"'a': got None; wanted \(stream, weight\)"),
        ({"a": "stream"}, {}, r"'a': got <.*Stream.*>; wanted \(stream, weight\)"),
        ({"a": ("stream",)}, {}, r"'a': got \(.*; wanted \(stream, weight\)"),
        ({"a": ("rows", 1)}, {}, r"'a': got \(.*Rows.*, 1\); wanted \(stream, weight\)"),
        ({"a": ("mix", 1)}, {}, "'a': got .*the stream no Mix itself"),
        ({1: ("stream", 1)}, {}, "got a stream named 1; wanted a text"),
        ({"": ("stream", 1)}, {}, "got a stream named ''; wanted a text"),
        *[
            ({"a": ("stream", weight)}, {}, "'a': weight: got .*; wanted a positive number")
            for weight in (0, -1, float("inf"), float("nan"), True, "1", None, 10**400, 1j)
        ],
        ({"a": ("stream", 1), "b": ("stream", 1e-5)}, {}, "'b': its weight is less than 1 in 32768 of all; wanted a larger"),
        ({"a": ("sized", 1)}, {}, "'a': rows_per_request and epoch_end are the Mix's; leave them out"),
        ({"a": ("breaking", 1)}, {}, "'a': rows_per_request and epoch_end are the Mix's"),
        ({"a": ("stream", 1)}, {"ends": "last"}, "ends: got 'last'; wanted 'first' or 'all'"),
        ({"a": ("stream", 1)}, {"seed": -1}, "seed: got -1; wanted a whole number"),
        ({"a": ("stream", 1)}, {"rows_per_request": 0}, "rows_per_request: got 0; wanted a whole number"),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_named_with_what_was_wanted(streams: Any, more: Any, message: str) -> None:
    stream = iw.Stream(Rows(4))
    known = {
        "stream": stream, "rows": Rows(4), "mix": Mix({"x": (stream, 1)}), "sized": iw.Stream(Rows(4), rows_per_request=2),
        "breaking": iw.Stream(Rows(4), epoch_end="break"),
    }  # fmt: skip
    if isinstance(streams, dict):
        streams = {
            name: (known[pair[0]], *pair[1:]) if isinstance(pair, tuple) else known.get(pair, pair)
            for name, pair in streams.items()
        }
    with pytest.raises(iw.ConfigError, match=f"^(Mix|Stream): {message}"):
        Mix(streams, **more)


def test_weights_of_numpy_are_numbers() -> None:
    mix = Mix({"a": (iw.Stream(Rows(4)), np.float32(0.5)), "b": (iw.Stream(Rows(4)), np.int64(2))})
    assert [weight for _, weight in mix.streams.values()] == [0.5, 2.0]
    assert json.loads(json.dumps(mix.identity("drop"))) == mix.identity("drop")


def test_what_cannot_work_with_the_settings_is_refused_where_it_is_registered(
    coordinator: iw.GlobalCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(iw.ConfigError, match=r"Mix: 'b': Stream: shard=.0, 5.*3 rows among 5 shards"):
        register(coordinator, Mix({"a": (iw.Stream(Rows(9)), 1), "b": (iw.Stream(Rows(3), shard=(0, 5)), 1)}), 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        uneven = {"a": (iw.Stream(Rows(9), shard="auto"), 1), "b": (iw.Stream(Rows(9), epochs=None), 1)}
        with pytest.raises(
            iw.ConfigError, match=r"Mix: 'a': shard='auto' with last_batch='keep': 9 rows among 2 ranks .* 'pad'"
        ):
            register(coordinator, Mix(uneven), 8, last_batch="keep")
        endless = {"a": (iw.Stream(Rows(9), shard="auto", epochs=None), 1), "b": (iw.Stream(Rows(9)), 1)}
        register(coordinator, Mix(endless), 8, name=f"endless{rank}", last_batch="keep")
        register(coordinator, Mix(uneven), 8, name=f"pad{rank}", last_batch="pad")


@pytest.mark.parametrize("ends", ["first", "all"])
def test_ordered_delivery_is_the_same_whatever_the_workers(ends: str) -> None:
    seen = []
    for workers in (0, 1, 7):
        mix = mix_of(
            (40, 2, {"epochs": 2, "shuffle": True}), (25, 1, {"seed": 4}), (9, 1), seed=3, ends=ends, rows_per_request=5
        )
        coordinator = iw.GlobalCoordinator()
        source = register(coordinator, mix, 8, num_workers=workers, ordered=True, last_batch="keep")
        with coordinator:
            seen.append([(batch.data.tolist(), batch.label.tolist()) for batch in source])
    assert seen[0] == seen[1] == seen[2]
    delivered = [row for data, _ in seen[0] for row in data]
    assert delivered == fetch(plan_of(mix), 0, len(delivered))
    assert len({number for _, label in seen[0] for number in label}) == len(delivered), (
        "every stream's random numbers are its own"
    )


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_mix_goes_on_at_every_batch(ordered: bool, shards: int) -> None:
    def open_here(workers: int) -> tuple[iw.GlobalCoordinator, Any]:
        part = {"shard": (shards - 1, shards)}
        mix = mix_of((20, 2, {"epochs": 2, "shuffle": True, **part}), (11, 1, part), (9, 1, {"epochs": 3}), seed=3, ends="all",
                     rows_per_request=5)  # fmt: skip
        coordinator = iw.GlobalCoordinator()
        return coordinator, register(coordinator, mix, 4, num_workers=workers, ordered=ordered, last_batch="keep")

    def rows_of(batch: Any) -> list[tuple[int, int]]:
        return list(zip(batch.data.tolist(), batch.label.tolist(), strict=True))

    coordinator, source = open_here(3)
    with coordinator:
        states = [source.state_dict()]
        seen = []
        for batch in source:
            seen.append(rows_of(batch))
            states.append(source.state_dict())
    uncut = joined(seen)
    for count, state in enumerate(states):
        coordinator, source = open_here(count % 4)
        source.load_state_dict(json.loads(json.dumps(state)))
        with coordinator:
            rest = joined([rows_of(batch) for batch in source])
            end = source.state_dict()
        assert sorted(joined(seen[:count]) + rest) == sorted(uncut)
        if ordered:
            assert joined(seen[:count]) + rest == uncut
        assert (end["epoch"], end["done"]) == (1, {})


@pytest.mark.parametrize("names_bad", [True, False])
@pytest.mark.parametrize("workers", [0, 3])
def test_bad_rows_of_a_stream_are_skipped_alone_and_named(
    coordinator: iw.GlobalCoordinator, names_bad: bool, workers: int
) -> None:
    bad = (3, 4, 17)
    mix = Mix(
        {
            "good": (iw.Stream(Rows(40, 0)), 2),
            "bad": (iw.Stream(Rows(20, 1, bad, names_bad), shuffle=True, seed=2, epochs=2), 2),
        },
        seed=3, ends="all",
    )  # fmt: skip
    source = register(coordinator, mix, 8, num_workers=workers, last_batch="keep", on_error=iw.ErrorPolicy(skip=True))
    coordinator.start()
    came = [row for batch in source for row in batch.data.tolist()]
    wanted = [*range(40), *(BASE + epoch * 10**6 + row for epoch in (0, 1) for row in range(20) if row not in bad)]
    assert sorted(came) == sorted(wanted)
    skipped = [(name, row) for entry in source.stats().quarantine for name, row in zip(entry.files, entry.rows, strict=True)]
    assert sorted(name for name, _ in skipped) == sorted(f"bad: file-1-{row}" for row in bad * 2)
    positions = fetch(plan_of(mix_of((40, 2), (20, 2, {"shuffle": True, "seed": 2, "epochs": 2}), seed=3, ends="all")), 0, 80)
    assert all(positions[row] % 1000 == int(name.rpartition("-")[2]) for name, row in skipped), "rows are positions in the mix"
    assert source.stats().rows_dropped["skipped_error"] == 6


class Odd:
    """Rows of another kind than the others'."""

    def __init__(self, fetched: Any) -> None:
        self.fetched = fetched

    def __len__(self) -> int:
        return 50

    def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
        return self.fetched(len(rows))


@pytest.mark.parametrize(
    ("fetched", "message"),
    [
        (
            lambda n: [np.zeros(n, np.float32), np.zeros(n, np.int64)],
            r"input 0: got rows of dtype\('float32'\) with shape \(\)",
        ),
        (lambda n: [np.zeros(n, np.int64), np.zeros((n, 2), np.int64)], r"input 1: got rows of .* with shape \(2,\)"),
        (lambda n: [np.zeros(n, np.int64)], r"got arrays of shapes .*; wanted 2 with \d+ rows in each"),
        (lambda n: [np.zeros(n, np.int64)] * 3, r"got arrays of shapes .*; wanted 2 with"),
        (lambda n: [np.zeros(n, np.int64), np.zeros(n + 1, np.int64)], r"got arrays of shapes .*; wanted 2 with"),
        (lambda n: [np.zeros(n, np.int64), np.int64(3)], "got list .*; wanted one NumPy array for each input"),
        (lambda n: [np.zeros(n, np.int64), [0] * n], "got list .*; wanted one NumPy array for each input"),
        (lambda n: None, "got NoneType None; wanted one NumPy array for each input"),
        (lambda n: np.zeros((2, n)), "got ndarray .*; wanted one NumPy array"),
    ],
)
@pytest.mark.parametrize("size", [1, 16])
def test_a_stream_of_other_specs_is_named(coordinator: iw.GlobalCoordinator, fetched: Any, message: str, size: int) -> None:
    mix = Mix({"usual": (iw.Stream(Rows(50)), 50), "odd": (iw.Stream(Odd(fetched)), 1)}, rows_per_request=size)
    source = register(coordinator, mix, 16, num_workers=1)
    coordinator.start()
    with pytest.raises(iw.FetchFailed) as caught:
        list(source)
    cause = caught.value.__cause__
    assert isinstance(cause, iw.SpecMismatch)
    other = r"; wanted dtype.*, as stream 'usual' gives$" if message.startswith("input") else ""
    assert re.search(f"^Mix: stream 'odd': {message}{other}", str(cause), re.DOTALL), cause


def test_rows_may_lie_along_any_axis(coordinator: iw.GlobalCoordinator) -> None:
    class Across(Rows):
        def fetch(self, rows: Any, request: iw.FetchRequest) -> Any:
            numbers = rows + 1000 * self.number
            return [np.stack([numbers, numbers + 1]), np.broadcast_to(numbers, (3, 2, len(rows))).copy()]

    mix = Mix({f"s{number}": (iw.Stream(Across(30, number)), 1 + number) for number in range(3)}, seed=1, ends="all")
    source = register(coordinator, mix, 8, batch_axes=[1, 2], last_batch="keep")
    coordinator.start()
    came: list[int] = []
    for batch in source:
        rows = batch.valid_rows
        assert batch.data.shape == (2, rows)
        assert batch.label.shape == (3, 2, rows)
        assert (batch.data[1] == batch.data[0] + 1).all()
        assert (batch.label == batch.data[0]).all()
        came += batch.data[0].tolist()
    assert sorted(came) == sorted(row + 1000 * number for number in range(3) for row in range(30))


def test_fetching_looks_at_no_more_than_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(mix_of(*[(5000, weight, {"epochs": None}) for weight in (5, 3, 1)], seed=3))
    fetch(plan, 0, 128)
    computed: list[int] = []
    permutation = mix_module.Permutation
    monkeypatch.setattr(mix_module, "Permutation", lambda *key: computed.append(1) or permutation(*key))
    started = time.perf_counter()
    for number in range(100):
        fetch(plan, number * 128, number * 128 + 128)
    seconds = time.perf_counter() - started
    assert not computed, "a block is drawn once"
    assert seconds / 100 < 5e-3  # 0.1 ms on one quiet core; drawing the block anew, or counting it, takes 0.4 and more
    fetch(plan, BLOCK_DRAWS - 3, BLOCK_DRAWS + 3)
    assert len(computed) == 1


@pytest.mark.parametrize("fetchers", ["thread", "process"])
def test_every_row_of_a_mix_comes_once_from_any_kind_of_fetchers(coordinator: iw.GlobalCoordinator, fetchers: str) -> None:
    first, second = iw.sources.Arrays(np.arange(100)), iw.sources.Arrays(np.arange(100, 150))
    mix = Mix({"first": (iw.Stream(first), 2.0), "second": (iw.Stream(second, shuffle=True), 1.0)}, ends="all")
    iw.init_data_input_workers(
        "numpy", ["x"], mix, 10, 2, fetchers=fetchers, last_batch="keep", ordered=True, coordinator=coordinator
    )
    coordinator.start()
    rows = [int(row) for batch in coordinator["train"] for row in batch.x]
    assert sorted(rows) == [*range(150)]
    plan = mix.plan("keep", [0])
    assert rows == [int(row) for row in plan.fetch(plan.rows(0, 0, 150), iw.FetchRequest(0, 0, plan.rows(0, 0, 150)))[0]]
