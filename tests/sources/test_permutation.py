"""Permutation: every number once, back again, the same for ever, and no pattern that chi-squared sees."""

import itertools
import math
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from input_workers.errors import ConfigError
from input_workers.sources import permutation as module
from input_workers.sources.permutation import MAX_SIZE, TABLE_SIZE, Permutation, tables

# Chance exceeds this many standard deviations about once in 10**9; the keys are fixed, so a test that passed once passes.
DEVIATIONS = 6.0
# Tables and networks; just above a power of 4 or 2 half of the numbers fall outside, at a power of 2 none.
SIZES = [1, 2, 3, 4, 5, 50, 1000, TABLE_SIZE, TABLE_SIZE + 1, 8191, 8192, 8193, 10_007, 16_385, 65_537]
keys = st.lists(st.integers(0, 2**70), min_size=1, max_size=4).map(tuple)


def deviation(counts):
    """How far a table of counts is from equal ones: chi-squared in its standard deviations."""
    counts = np.asarray(counts, float).ravel()
    expected = counts.mean()
    assert expected >= 5
    freedom = counts.size - 1
    return (((counts - expected) ** 2).sum() / expected - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("size", SIZES)
def test_every_number_comes_once_and_its_inverse_is_where_it_stood(size):
    positions = np.arange(size)
    numbers = Permutation(size, (3, size))(positions)
    assert numbers.dtype == np.int64
    assert (np.sort(numbers) == positions).all()
    assert (Permutation(size, (3, size)).inverse(numbers) == positions).all()


@given(size=st.integers(1, 3 * TABLE_SIZE), key=keys)
def test_every_number_comes_once_for_any_size_and_key(size, key):
    numbers = Permutation(size, key)(np.arange(size))
    assert (np.bincount(numbers, minlength=size) == 1).all()


@given(
    size=st.integers(0, 62).flatmap(lambda bits: st.integers(max(1, 2**bits - 2), min(2**bits + 2, MAX_SIZE))),
    key=keys,
    fractions=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=50),
)
def test_the_inverse_leads_back_for_any_size_and_key(size, key, fractions):
    permutation = Permutation(size, key)
    positions = np.array([min(int(fraction * size), size - 1) for fraction in fractions])
    numbers = permutation(positions)
    assert 0 <= numbers.min() <= numbers.max() < size
    assert (permutation.inverse(numbers) == positions).all()
    assert (permutation(permutation.inverse(positions)) == positions).all()
    assert len(np.unique(numbers)) == len(np.unique(positions))


def test_the_numbers_are_these_for_ever():
    """Saved positions rely on them."""
    first = {
        size: Permutation(size, (7, 1))(np.arange(min(size, 6))).tolist() for size in (6, 4096, 4097, 10**7, 10**10, 2**62)
    }
    assert first == {
        6: [4, 2, 0, 3, 1, 5],
        4096: [3685, 3328, 3029, 4, 60, 1868],
        4097: [1037, 3887, 1456, 1615, 2916, 1163],
        10**7: [4065721, 7430885, 6267231, 2584120, 4670507, 1509819],
        10**10: [8057443884, 1618509231, 6141454012, 3115517545, 9210387872, 8631455601],
        2**62: [
            2495050887059586314,
            1317535583361518518,
            2372337892802105460,
            590930943944932666,
            3159188307345664223,
            1090675227785680632,
        ],
    }
    assert Permutation(10**10, (2**80, 0, 5))(np.array([10**10 - 1])).tolist() == [9529635544]


def test_asked_for_some_positions_it_answers_as_for_all():
    permutation = Permutation(100_003, (1,))
    whole = permutation(np.arange(100_003))
    some = np.array([[99_999, 5, 5], [0, 100_002, 16_384]])
    assert (permutation(some) == whole[some]).all()
    assert permutation(some[:, :0]).shape == (2, 0)
    assert (permutation(np.arange(0, 100_003, 7)) == whole[::7]).all()
    assert permutation(np.array(5)).tolist() == whole[5]


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_of_few_numbers_are_equally_frequent(size):
    orders = dict.fromkeys(itertools.permutations(range(size)), 0)
    for seed in range(20 * len(orders) + 400):
        orders[tuple(Permutation(size, (11, seed))(np.arange(size)).tolist())] += 1
    assert deviation(list(orders.values())) < DEVIATIONS


@pytest.mark.parametrize("size", range(2, 51))
def test_each_number_is_equally_often_at_each_position(size):
    counts = np.zeros((size, size))
    for seed in range(10 * size):
        counts[np.arange(size), Permutation(size, (13, seed))(np.arange(size))] += 1
    assert deviation(counts) < DEVIATIONS


def test_tables_of_neighbouring_keys_are_unrelated():
    drawn = tables(8, np.arange(20_000, dtype=np.uint64))
    counts = np.zeros((8, 8))
    np.add.at(counts, (drawn[1:], drawn[:-1]), 1)
    assert deviation(counts) < DEVIATIONS


def statistics_of(size, seeds=300):
    """Return how far from chance the numbers of many keys are, each statistic in standard deviations."""
    positions, half = np.arange(4096), 2048
    place, neighbours, far = np.zeros((64, 32)), np.zeros((32, 32)), np.zeros((32, 32))
    differences, low_bits, keys = np.zeros(32), np.zeros((16, 16)), np.zeros((32, 32))
    before = None
    for seed in range(seeds):
        numbers = Permutation(size, (17, seed))(positions)
        buckets = numbers // (size // 32)
        place[positions[:64], buckets[:64]] += 1
        np.add.at(neighbours, (buckets[:half:2], buckets[1:half:2]), 1)
        np.add.at(far, (buckets[:half], buckets[half:]), 1)
        np.add.at(low_bits, (numbers[:half:2] % 16, numbers[1:half:2] % 16), 1)
        np.add.at(differences, (numbers[1::2] - numbers[::2]) % size // (size // 32), 1)
        if before is not None:
            np.add.at(keys, (before, buckets), 1)
        before = buckets
    counted = {
        "place": place,
        "neighbours": neighbours,
        "far": far,
        "differences": differences,
        "low bits": low_bits,
        "keys": keys,
    }
    return {name: round(deviation(counts), 1) for name, counts in counted.items()}


@pytest.mark.parametrize("size", [8192, 16_384, 10**7 // 32 * 32, 2**34, 10**10])
def test_places_neighbours_differences_and_other_keys_show_no_pattern(size):
    """Sizes that 32 divides: then the buckets are equal."""
    found = statistics_of(size)
    assert max(found.values()) < DEVIATIONS, found


def test_fewer_rounds_show_a_pattern(monkeypatch):
    """So these statistics see what they are for."""
    monkeypatch.setattr(module, "ROUNDS", 4)
    assert statistics_of(8192)["far"] > 2 * DEVIATIONS


def test_the_numbers_of_a_network_have_as_many_fixed_points_and_rises_as_chance():
    size, seeds = 5_003, 1_000
    positions = np.arange(size)
    fixed = rises = 0
    for seed in range(seeds):
        numbers = Permutation(size, (19, seed))(positions)
        fixed += int((numbers == positions).sum())
        rises += int((numbers[1:] > numbers[:-1]).sum())
    assert abs(fixed - seeds) < DEVIATIONS * math.sqrt(seeds)
    assert abs(rises - seeds * (size - 1) / 2) < DEVIATIONS * math.sqrt(seeds * (size + 1) / 12)


def test_less_than_twice_the_numbers_go_through_the_network(monkeypatch):
    passed = []
    network = Permutation._network
    monkeypatch.setattr(
        Permutation, "_network", lambda self, numbers, back: passed.append(numbers.size) or network(self, numbers, back)
    )
    Permutation(2**16 + 1, (1,))(np.arange(2**16 + 1))
    assert 1.9 * 2**16 < sum(passed) < 2 * 2**16 + 2


@pytest.mark.parametrize("size", [TABLE_SIZE, 10**10, 2**62])
def test_its_memory_is_the_same_for_any_size(size):
    Permutation(size, (1,))(np.arange(10))
    tracemalloc.start()
    try:
        permutation = Permutation(size, (2,))
        permutation(np.arange(10))
        permutation.inverse(np.arange(10))
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 8 * TABLE_SIZE + 10_000
    assert peak < 6 * 8 * TABLE_SIZE


def test_many_threads_use_one_permutation():
    permutation = Permutation(10**10, (1,))
    wanted = [permutation(np.arange(begin, begin + 20_000)) for begin in range(8)]
    right = []

    def use(begin):
        right.extend((permutation(np.arange(begin, begin + 20_000)) == wanted[begin]).all() for _ in range(20))

    threads = [threading.Thread(target=use, args=(begin,)) for begin in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 160
    assert all(right)


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1, 2.0, True, "5", None])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ConfigError, match=r"size: got .*; wanted a whole number from 1 to 2\*\*62"):
        Permutation(size, (1,))


@pytest.mark.parametrize("key", [(-1,), ("a",), (1.5,)])
def test_a_key_that_is_none_is_refused(key):
    with pytest.raises(ConfigError, match=r"key: got .*; wanted whole numbers of at least 0"):
        Permutation(10, key)


@pytest.mark.parametrize("size", [10, 10_000])
@pytest.mark.parametrize("wrong", [-1, 1])
def test_positions_outside_are_refused(size, wrong):
    permutation = Permutation(size, (1,))
    outside = np.array([3, -1 if wrong < 0 else size])
    for ask in (permutation, permutation.inverse):
        with pytest.raises(IndexError, match=rf"wanted them in range\({size}\)"):
            ask(outside)
        with pytest.raises(TypeError, match="got numbers of dtype float64; wanted int64"):
            ask(np.array([1.0]))
