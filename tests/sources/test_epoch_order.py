"""EpochOrder: each row once, in the order that the key draws, near each other where wanted, at a constant cost."""

import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from input_workers.errors import ConfigError
from input_workers.sources import epoch_order as module
from input_workers.sources.epoch_order import BLOCKS, FIRST_POSITIONS, KEPT_PIECES, PIECE_POSITIONS, WINDOW_BLOCKS, EpochOrder
from input_workers.sources.permutation import TABLE_SIZE, Permutation

# Blocks of 100 rows: windows from tables; of 300: windows from networks; of 5,000: a window larger than a piece.
kinds = pytest.mark.parametrize("block_rows", [None, 1, 100, 300, 5_000])


@pytest.fixture
def computed(monkeypatch):
    """The numbers of indices that were computed, call by call."""
    counts = []
    call, tables = Permutation.__call__, module.tables

    def counted_call(self, positions):
        counts.append(positions.size)
        return call(self, positions)

    def counted_tables(size, keys):
        counts.append(size * keys.size)
        return tables(size, keys)

    monkeypatch.setattr(Permutation, "__call__", counted_call)
    monkeypatch.setattr(module, "tables", counted_tables)
    return counts


def windows_of(rows, key, block_rows):
    """Yield the rows of each window, sorted: the plain reference of the block order."""
    blocks = -(-rows // block_rows)
    order = Permutation(blocks, (*key, BLOCKS))(np.arange(blocks))
    for first in range(0, blocks, WINDOW_BLOCKS):
        members = [
            np.arange(block * block_rows, min((block + 1) * block_rows, rows)) for block in order[first : first + WINDOW_BLOCKS]
        ]
        yield np.sort(np.concatenate(members))


def test_without_shuffle_rows_come_in_their_order():
    order = EpochOrder(10**12, (1,), False, 1000)
    assert len(order) == 10**12
    assert order.rows(0, 5).tolist() == [0, 1, 2, 3, 4]
    assert order.rows(10**12 - 2, 10**12).tolist() == [10**12 - 2, 10**12 - 1]
    assert order.rows(0, 5).dtype == np.int64


@kinds
@pytest.mark.parametrize("rows", [1, 2, 99, 4_096, 4_097, 65_537, 150_001])
def test_every_row_comes_once(rows, block_rows):
    numbers = EpochOrder(rows, (5, 2), True, block_rows).rows(0, rows)
    assert numbers.dtype == np.int64
    assert (np.bincount(numbers, minlength=rows) == 1).all()


@given(
    rows=st.integers(1, 500),
    block_rows=st.none() | st.integers(1, 40),
    key=st.integers(0, 2**40),
    table_size=st.sampled_from([0, TABLE_SIZE]),
    asked=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 100)), max_size=20),
)
def test_any_positions_in_any_order_get_the_rows_of_the_whole(rows, block_rows, key, table_size, asked):
    """With pieces so small that requests cross them, and either way to shuffle windows, wherever the short block stands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TABLE_SIZE", table_size)
        whole = EpochOrder(rows, (key,), True, block_rows).rows(0, rows)
        assert sorted(whole) == list(range(rows))
        if block_rows is not None:
            begin = 0
            for members in windows_of(rows, (key,), block_rows):
                assert sorted(whole[begin : begin + len(members)]) == members.tolist()
                begin += len(members)
        patch.setattr(module, "FIRST_POSITIONS", 4)
        patch.setattr(module, "PIECE_POSITIONS", 16)
        order = EpochOrder(rows, (key,), True, block_rows)
        for where, length in [*asked, *asked[:3], (0.0, rows)]:
            begin = int(where * rows)
            stop = min(begin + length, rows)
            assert order.rows(begin, stop).tolist() == whole[begin:stop].tolist()
            assert len(order._pieces) <= KEPT_PIECES


def test_the_rows_are_these_for_ever():
    """Saved states rely on them."""
    first = {
        (rows, block_rows): EpochOrder(rows, (7, 1), True, block_rows).rows(rows - 4, rows).tolist()
        for rows, block_rows in [(10, None), (10**10, None), (1000, 3), (10**10 + 1, 100), (10**10 + 1, 10**6)]
    }
    assert first == {
        (10, None): [8, 3, 1, 5],
        (10**10, None): [2920643962, 55620355, 2709142259, 8547003682],
        (1000, 3): [103, 184, 471, 867],
        (10**10 + 1, 100): [6330937577, 6330937512, 6330937589, 6330937539],
        (10**10 + 1, 10**6): [7668812786, 7668054905, 7668346774, 7668328272],
    }
    assert EpochOrder(10**10 + 1, (7, 1), True, 100).rows(70_000, 70_003).tolist() == [7425293034, 1214480272, 1600750348]


@pytest.mark.parametrize("block_rows", [None, 10, 1000])
def test_another_seed_or_epoch_is_another_order(block_rows):
    orders = [EpochOrder(50_000, key, True, block_rows).rows(0, 50_000) for key in [(1, 0), (1, 1), (2, 0), (0, 1)]]
    same = [np.mean(one == other) for index, one in enumerate(orders) for other in orders[:index]]
    assert max(same) < 0.001


@pytest.mark.parametrize("block_rows", [1, 3, 10, 100, 1000, 10_007])
def test_a_request_reads_few_blocks(block_rows):
    rows = 300_000 + block_rows // 2
    order = EpochOrder(rows, (3, 0), True, block_rows)
    windows = 0
    for begin in range(0, rows - 64, 64 * 7):
        blocks = len(np.unique(order.rows(begin, begin + 64) // block_rows))
        windows = max(windows, -(-blocks // WINDOW_BLOCKS))
    assert windows <= 1 + -(-64 // (WINDOW_BLOCKS * block_rows))


@pytest.mark.parametrize("block_rows", [5, 1000])
def test_rows_are_equally_often_at_each_position_of_their_window(block_rows):
    """In windows from tables and from networks: counted by block, fifth of the block and eightieth of the window."""
    window_rows = WINDOW_BLOCKS * block_rows
    counts = np.zeros((WINDOW_BLOCKS, 5, 80))
    for key in range(800 if block_rows == 5 else 20):
        window = EpochOrder(2 * window_rows, (key,), True, block_rows).rows(window_rows, 2 * window_rows)
        block = np.unique(window // block_rows, return_inverse=True)[1]
        np.add.at(counts, (block, window % block_rows * 5 // block_rows, np.arange(window_rows) * 80 // window_rows), 1)
    expected = counts.mean()
    assert expected >= 10
    assert (((counts - expected) ** 2).sum() / expected - counts.size) / np.sqrt(2 * counts.size) < 6


@kinds
def test_the_first_request_computes_little(computed, block_rows):
    order = EpochOrder(10**10, (1, 1), True, block_rows)
    order.rows(5 * 10**9, 5 * 10**9 + 64)
    assert sum(computed) <= FIRST_POSITIONS * 2 + 2 * TABLE_SIZE + 100 * WINDOW_BLOCKS
    before = sum(computed)
    order.rows(10, 74)  # a jump
    assert sum(computed) - before <= FIRST_POSITIONS * 2 + 2 * TABLE_SIZE + 100 * WINDOW_BLOCKS


@kinds
def test_reading_on_computes_each_index_about_once_in_large_pieces(computed, block_rows):
    order = EpochOrder(10**10, (1, 1), True, block_rows)
    begin = 10**9 // PIECE_POSITIONS * PIECE_POSITIONS
    for position in range(begin, begin + 5 * PIECE_POSITIONS, 64):
        order.rows(position, position + 64)
    wanted = 5 * PIECE_POSITIONS * (2 if block_rows == 1 else 1)  # a block of one row has a number of its own to compute
    assert wanted <= sum(computed) < 1.25 * wanted
    assert len(computed) < 300


def test_requests_that_come_late_and_again_compute_nothing(computed):
    order = EpochOrder(10**10, (1, 1), True)
    for position in range(0, PIECE_POSITIONS * 2, 64):
        order.rows(position, position + 64)
    before = len(computed)
    for position in (PIECE_POSITIONS * 2 - 64, PIECE_POSITIONS - 32, PIECE_POSITIONS + 64):
        order.rows(position, position + 64)
    assert len(computed) == before


@kinds
def test_its_memory_does_not_grow_with_the_rows(block_rows):
    def used(rows):
        order = EpochOrder(rows, (1, 1), True, block_rows)
        tracemalloc.start()
        try:
            for begin in range(0, min(rows, 10 * PIECE_POSITIONS), 4096):
                order.rows(begin, min(begin + 64, rows))
            return tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

    used(10**3)
    kept, peak = used(10**10)
    small, _ = used(10**3)
    assert kept < small + KEPT_PIECES * 8 * PIECE_POSITIONS + 100_000
    assert peak < (KEPT_PIECES + 12) * 8 * PIECE_POSITIONS


@pytest.mark.parametrize("block_rows", [None, 100, 1000])
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_rows_are_read_only(shuffle, block_rows):
    order = EpochOrder(10**6, (1,), shuffle, block_rows)
    for begin, stop in ((0, 64), (FIRST_POSITIONS - 2, FIRST_POSITIONS + 2), (5, 5)):
        numbers = order.rows(begin, stop)
        assert numbers.shape == (stop - begin,)
        assert not numbers.flags.writeable
    if shuffle:  # others hold views of the same piece
        with pytest.raises(ValueError, match="WRITEABLE"):
            order.rows(0, 64).flags.writeable = True


def test_many_threads_get_the_same_rows_and_no_piece_is_computed_twice(computed):
    rows = 6 * PIECE_POSITIONS
    wanted = EpochOrder(rows, (4,), True).rows(0, rows)
    computed.clear()
    order = EpochOrder(rows, (4,), True)
    begins = iter(range(0, rows, 64))
    lock, start = threading.Lock(), threading.Barrier(8)
    wrong, asked = [], []

    def read():
        start.wait()
        while True:
            with lock:
                begin = next(begins, None)
            if begin is None:
                return
            asked.append(begin)
            if (order.rows(begin, begin + 64) != wanted[begin : begin + 64]).any():
                wrong.append(begin)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(asked) == rows // 64
    assert sum(computed) == rows + FIRST_POSITIONS


def test_a_thread_waits_only_for_the_piece_that_it_needs(monkeypatch):
    order = EpochOrder(10**10, (4,), True)
    ready = order.rows(0, 64).tolist()
    elsewhere = EpochOrder(10**10, (4,), True).rows(10**8, 10**8 + 64).tolist()
    entered, go_on = threading.Event(), threading.Event()
    call = Permutation.__call__

    def held(self, positions):
        if positions[0] > 9 * 10**8:
            entered.set()
            assert go_on.wait(60)
        return call(self, positions)

    monkeypatch.setattr(Permutation, "__call__", held)
    slow = [threading.Thread(target=order.rows, args=(10**9, 10**9 + 64)) for _ in range(2)]
    answers = []
    quick = threading.Thread(
        target=lambda: answers.extend([order.rows(0, 64).tolist(), order.rows(10**8, 10**8 + 64).tolist()])
    )
    try:
        for thread in slow:
            thread.start()
        assert entered.wait(60)
        quick.start()
        quick.join(10)
        assert answers == [ready, elsewhere]
    finally:
        go_on.set()
        for thread in (*slow, quick):
            thread.join()


def test_two_threads_that_find_nothing_at_once_share_one_piece(computed):
    order = EpochOrder(10**10, (4,), True)
    both, lock = threading.Barrier(2), order._lock

    class AfterBothLooked:
        def __enter__(self):
            both.wait(60)
            lock.acquire()

        def __exit__(self, *_):
            lock.release()

    order._lock = AfterBothLooked()
    threads = [threading.Thread(target=order.rows, args=(begin, begin + 64)) for begin in (0, 64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert computed == [FIRST_POSITIONS]


def test_a_computation_that_failed_is_done_again(monkeypatch):
    order = EpochOrder(10**10, (4,), True)
    with monkeypatch.context() as patch:
        patch.setattr(Permutation, "__call__", lambda self, positions: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            order.rows(0, 64)
    assert order.rows(0, 64).tolist() == EpochOrder(10**10, (4,), True).rows(0, 64).tolist()


@pytest.mark.parametrize(("begin", "stop"), [(-1, 5), (5, 4), (90, 101)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_positions_outside_are_refused(shuffle, begin, stop):
    with pytest.raises(IndexError, match=rf"got positions {begin} to {stop}; wanted 0 <= begin <= stop <= 100"):
        EpochOrder(100, (1,), shuffle).rows(begin, stop)


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"rows": True}, {"rows": 2**62 + 1}, {"block_rows": 0}, {"block_rows": 1.5}])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ConfigError, match=rf"EpochOrder: {next(iter(wrong))}: got .*; wanted a whole number"):
        EpochOrder(**{"rows": 10, "key": (1,), "shuffle": True, **wrong})
