"""ProducerPool: every filled buffer comes out once and whole; an error is an error, an end is an end; nothing is left."""

from __future__ import annotations

import contextlib
import gc
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import psutil
import pytest
from fetchers.shared_between import Door, FileCounter
from gates import HANG_SECONDS, await_true
from self_certifying import FIELDS, Witness, check_batch, make_chunk

import input_workers as iw
from input_workers.adapters import ProducerPool, buffer_tokens

SMALL, LARGE = 3, 200  # rows of a buffer: of 0.3 KB, which is sent, and of 22 KB, which lies in shared memory
STARTS = ["forkserver", "spawn", "fork"]


def pool_of(method: Callable[..., object], *args: Any, rows: int = LARGE, **more: Any) -> ProducerPool:
    """Return a pool with buffers of self-certifying rows."""
    more = {"timeout_s": HANG_SECONDS, "dtype": "int64", **more}
    return ProducerPool(method, [(rows, FIELDS), (rows, FIELDS)], args=args, **more)


def fill(arrays: Any, producer: int, call: int) -> None:
    """Fill a buffer with rows that say who made them."""
    for array, rows in zip(arrays, make_chunk(producer, call, len(arrays[0])), strict=True):
        array[...] = rows


def produce(leases: Any, counter: FileCounter, lengths: Any) -> None:
    """A method: the producer that comes first fills as many buffers as the first length says, and so on."""
    producer = counter.add()
    for call in range(lengths[producer]):
        with next(leases) as arrays:
            fill(arrays, producer, call)


def seen_in(result: Any) -> tuple[int, int]:
    """Check a result; return who made it, and as which."""
    with result as arrays:
        _, producer, call, _, _ = check_batch(arrays)[0].tolist()
    return producer, call


@pytest.fixture
def counter(tmp_path: pathlib.Path) -> FileCounter:
    return FileCounter(tmp_path / "counter")


@pytest.mark.usefixtures("no_other_threads")
@pytest.mark.parametrize("rows", [SMALL, LARGE])
@pytest.mark.parametrize("start", STARTS)
def test_every_buffer_comes_once_whole_and_in_its_producer_s_order(counter: FileCounter, start: Any, rows: int) -> None:
    lengths = [40, 3, 17]
    witness, results = Witness(), 0
    with pool_of(produce, counter, lengths, rows=rows, workers=3, start=start) as pool:
        for result in pool:
            with result as arrays:
                witness.see(arrays, rows)
            assert not arrays
            results += 1
        witness.assert_complete()
        assert results == sum(lengths) == pool.stats().rows_delivered
        with pytest.raises(iw.EndOfData):
            pool.next_result()
    assert pool.last_stop is not None
    assert pool.last_stop.ended


@pytest.mark.parametrize("buffers", [1, 2, 5])
def test_what_the_trainer_keeps_stays_as_it_was_while_buffers_are_used_again(counter: FileCounter, buffers: int) -> None:
    kept = []
    with pool_of(produce, counter, [15, 15], workers=2, buffers=buffers) as pool:
        for result in pool:
            with result as (data, label):
                kept.append([data[...], label])  # beyond its `with`
    witness = Witness()
    for arrays in kept:
        witness.see(arrays)
    assert len(kept) == 30
    assert len({array.ctypes.data for arrays in kept for array in arrays}) == 60


def test_memory_that_nobody_keeps_is_used_again(counter: FileCounter) -> None:
    places = set()
    with pool_of(produce, counter, [60], buffers=2) as pool:
        for result in pool:
            with result as arrays:
                places.add(arrays[0].ctypes.data)
    assert len(places) <= 5, "fresh memory for each buffer"


def test_nothing_is_copied_and_the_method_s_arrays_are_read_only_afterwards(door: Door) -> None:
    def method(leases: Any) -> None:
        with next(leases) as arrays:
            arrays[0][...] = 1
            view = arrays[0][:]
        with pytest.raises(ValueError, match="read-only"):
            arrays[0][0] = 2
        door.knock()  # type: ignore[attr-defined]
        view[...] = 3  # what it must not do
        door.knock()  # type: ignore[attr-defined]

    with ProducerPool(method, [(100, 100)], "int32") as pool, pool.next_result() as (array,):
        door.await_knock()
        assert (array == 1).all()
        door.open()
        door.await_knock()
        assert (array == 3).all()
        door.open()


@pytest.mark.parametrize("rows", [SMALL, LARGE])
def test_producers_wait_while_all_buffers_are_in_use_also_by_the_trainer(counter: FileCounter, door: Door, rows: int) -> None:
    def method(leases: Any) -> None:
        for call, lease in enumerate(leases):
            with lease as arrays:
                counter.add()
                fill(arrays, 0, call)

    with pool_of(method, rows=rows, workers=2, buffers=3) as pool:
        with contextlib.ExitStack() as held:
            for _ in range(3):
                held.enter_context(pool.next_result())
            with pytest.raises(iw.WaitTimeout):
                pool.next_result(0.3)
            assert counter.value == 3
        await_true(lambda: counter.value == 6, "three more are filled")
        first = pool.next_result()
        more = [held.enter_context(pool.next_result()) for _ in range(2)]
        with pytest.raises(iw.WaitTimeout):
            pool.next_result(0.3)
        assert len(more) == 2
        assert counter.value == 6
        with first:
            pass
        await_true(lambda: counter.value == 7, "one more is filled")


def test_results_that_are_dropped_unused_give_their_buffers_back(counter: FileCounter) -> None:
    with pool_of(produce, counter, [20], buffers=2) as pool:
        for _ in range(20):
            pool.next_result()
        assert list(pool) == []


def test_one_worker_s_end_does_not_end_the_others(counter: FileCounter) -> None:
    with pool_of(produce, counter, [0, 30, 1], workers=3) as pool:
        seen = sorted(map(seen_in, pool))
    assert seen == [*((1, call) for call in range(30)), (2, 0)]


@pytest.mark.parametrize("way", ["unused", "open", "void", "no loop"])
def test_a_producer_that_leaves_early_gives_its_buffer_to_the_others(counter: FileCounter, door: Door, way: str) -> None:
    def method(leases: Any) -> None:
        if counter.add():
            door.knock()  # type: ignore[attr-defined]
            for call in range(5):
                with next(leases) as arrays:
                    fill(arrays, 1, call)
        elif way != "no loop":
            for lease in leases:
                if way == "open":
                    lease.__enter__()
                elif way == "void":
                    with contextlib.suppress(KeyError), lease:
                        raise KeyError
                door.knock("it has the buffer")  # type: ignore[attr-defined]
                break

    with pool_of(method, workers=2, buffers=1) as pool, ThreadPoolExecutor(1) as threads:
        seen = threads.submit(lambda: [*map(seen_in, pool)])
        if way != "no loop":  # it has the only buffer; the other one waits for it
            knocks = {door.await_knock()[1], door.await_knock()[1]}
            assert knocks == {"", "it has the buffer"}
        else:
            door.await_knock()
        door.open()
        assert seen.result(HANG_SECONDS) == [(1, call) for call in range(5)]


def test_a_pool_whose_methods_take_no_lease_has_no_results() -> None:
    def method(leases: Any) -> None:
        raise iw.EndOfData

    for each in (lambda leases: 7, method):
        with pool_of(each, workers=2) as pool:
            assert list(pool) == []


def test_returning_inside_the_with_hands_over_what_is_there() -> None:
    def method(leases: Any) -> None:
        for lease in leases:
            with lease as arrays:
                fill(arrays, 4, 2)
                return

    with pool_of(method) as pool:
        assert [*map(seen_in, pool)] == [(4, 2)]


@pytest.mark.parametrize("rows", [SMALL, LARGE])
def test_an_exception_in_the_with_hands_nothing_over_and_loses_no_buffer(rows: int) -> None:
    def method(leases: Any) -> None:
        for call in range(9):
            with contextlib.suppress(AssertionError), next(leases) as arrays:
                arrays[0][...] = -1
                assert call % 3
                fill(arrays, 0, call)

    with pool_of(method, rows=rows, buffers=1) as pool:
        assert [call for _, call in map(seen_in, pool)] == [1, 2, 4, 5, 7, 8]


@pytest.mark.parametrize("error", [ValueError("bad"), StopIteration(), KeyboardInterrupt(), GeneratorExit(), TimeoutError()])
@pytest.mark.parametrize("inside", [True, False])
def test_what_a_method_raises_reaches_the_trainer_after_what_was_complete(error: BaseException, inside: bool) -> None:
    def method(leases: Any) -> None:
        with next(leases) as arrays:
            fill(arrays, 0, 0)
        if not inside:
            raise error
        with next(leases) as arrays:
            raise error

    with pool_of(method, workers=1) as pool:
        assert seen_in(pool.next_result()) == (0, 0)
        for _ in range(2):
            with pytest.raises(iw.FetchFailed) as caught:
                next(pool)
            assert type(caught.value.__cause__) is type(error)
            assert "in method" in "".join(caught.value.__cause__.__notes__)


def test_an_error_of_one_ends_the_pool_while_others_work(door: Door, counter: FileCounter) -> None:
    def method(leases: Any) -> None:
        if counter.add():
            door.knock()  # type: ignore[attr-defined]
            raise ValueError("bad")
        for call, lease in enumerate(leases):
            with lease as arrays:
                fill(arrays, 0, call)

    with pool_of(method, workers=2) as pool:
        seen_in(pool.next_result())
        door.await_knock()
        door.open()
        with pytest.raises(iw.FetchFailed, match="bad"):
            [*map(seen_in, pool)]


@pytest.mark.parametrize("when", ["before", "inside", "between", "after"])
@pytest.mark.parametrize("buffers", [1, 4])
def test_a_worker_that_is_killed_is_an_error_whatever_it_was_at(door: Door, when: str, buffers: int) -> None:
    def method(leases: Any) -> None:
        if when == "before":
            door.knock()  # type: ignore[attr-defined]
        for call in range(3):
            with next(leases) as arrays:
                if when == "inside" and call == 1:
                    door.knock()  # type: ignore[attr-defined]
                fill(arrays, 0, call)
            if when == "between" and call == 0:
                door.knock()  # type: ignore[attr-defined]
        door.knock()  # type: ignore[attr-defined]

    with pool_of(method, buffers=buffers) as pool, ThreadPoolExecutor(1) as threads:

        def read() -> tuple[list[tuple[int, int]], BaseException | None]:
            seen = []
            try:
                for each in map(seen_in, pool):
                    seen.append(each)  # noqa: PERF402  kept whatever follows
            except iw.WorkerDied as error:
                return seen, error
            return seen, None

        reading = threads.submit(read)
        pid, _ = door.await_knock()
        os.kill(pid, signal.SIGKILL)
        seen, error = reading.result(HANG_SECONDS)
        complete = {"before": 0, "inside": 1, "between": 1, "after": 3}[when]
        assert error is not None, "a death was taken for an end"
        assert "SIGKILL" in str(error)
        assert seen in ([(0, call) for call in range(count)] for count in {complete, max(complete - 1, 0)})
        with pytest.raises(iw.WorkerDied):
            pool.next_result()


@pytest.mark.parametrize("code", [0, 3])
def test_a_method_that_exits_the_process_is_an_error(code: int) -> None:
    with pool_of(lambda leases: sys.exit(code)) as pool, pytest.raises(iw.WorkerDied, match=f"exited with code {code}"):
        pool.next_result()


def test_results_outlive_the_death_of_their_worker(door: Door) -> None:
    def method(leases: Any) -> None:
        for call in range(2):
            with next(leases) as arrays:
                fill(arrays, 0, call)
        door.knock()  # type: ignore[attr-defined]

    with pool_of(method) as pool:
        first, second = pool.next_result(), pool.next_result()
        with first as arrays:
            os.kill(door.await_knock()[0], signal.SIGKILL)
            with pytest.raises(iw.WorkerDied):
                pool.next_result()
            check_batch(arrays)
        assert seen_in(second) == (0, 1)


@pytest.mark.parametrize("way", ["hangs", "is stopped"])
def test_stop_ends_a_producer_that_hangs_and_wakes_who_waits(door: Door, way: str) -> None:
    def method(leases: Any) -> None:
        with next(leases) as arrays:
            arrays[0][...] = 0
            door.knock()  # type: ignore[attr-defined]

    pool = pool_of(method)
    pool.start()
    pid, _ = door.await_knock()
    if way == "is stopped":
        os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pool.next_result)
        assert pool.stop(5.0)
        with pytest.raises(iw.QueueClosed):
            waiting.result(HANG_SECONDS)
    assert not psutil.pid_exists(pid)
    with pytest.raises(iw.QueueClosed):
        next(iter(pool))
    assert pool.stop()


def test_a_stop_while_producers_wait_for_a_buffer_is_no_end_of_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def method(leases: Any) -> None:
        for call, lease in enumerate(leases):
            with lease as arrays:
                fill(arrays, 0, call)

    for _ in range(5):
        pool = pool_of(method, workers=2, buffers=2)
        with contextlib.ExitStack() as held:
            results = [held.enter_context(pool.next_result()) for _ in range(2)]
            with ThreadPoolExecutor(2) as threads:
                waiting = [threads.submit(pool.next_result) for _ in range(2)]
                close = pool._tokens.close
                # The workers end by it; whoever reads has an answer before anything else happens.
                monkeypatch.setattr(pool._tokens, "close", lambda: (close(), wait(waiting, HANG_SECONDS)))  # noqa: B023
                assert pool.stop()
                assert all(type(each.exception(HANG_SECONDS)) is iw.QueueClosed for each in waiting)
            for arrays in results:  # what the trainer has stays valid
                check_batch(arrays)


def test_a_trainer_may_leave_the_loop_early_and_an_unstarted_pool_be_stopped(counter: FileCounter) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pool_of(produce, counter, [50]) as left:
        for result in left:
            if seen_in(result)[1] == 3:
                break
    del result
    pool = pool_of(produce, counter, [50])
    assert pool.stop()
    await_true(lambda: len(os.listdir("/proc/self/fd")) <= before + 3, "descriptors are closed")  # the fork server's
    with pytest.raises(iw.QueueClosed), pool:
        pass


def test_a_pool_that_is_dropped_ends() -> None:
    def method(leases: Any) -> None:
        for call, lease in enumerate(leases):
            with lease as arrays:
                fill(arrays, os.getpid(), call)

    pool = pool_of(method, workers=2)
    worker, result = seen_in(pool.next_result())[0], pool.next_result()
    process = psutil.Process(worker)
    del pool
    gc.collect()
    await_true(lambda: not process.is_running(), "the workers end")
    seen_in(result)


def test_results_go_to_one_of_many_threads_each(counter: FileCounter) -> None:
    pool = pool_of(produce, counter, [60, 60], workers=2)
    with pool, ThreadPoolExecutor(3) as threads:
        parts = [threads.submit(lambda: [*map(seen_in, pool)]) for _ in range(3)]
        seen = sorted(each for part in parts for each in part.result(HANG_SECONDS))
    assert seen == [(producer, call) for producer in range(2) for call in range(60)]


def test_each_shape_has_its_dtype_and_arguments_come_as_given() -> None:
    def method(leases: Any, first: int, *, second: str) -> None:
        with next(leases) as (image, label, when):
            image[...] = first
            label[...] = second.encode()
            when[...] = np.datetime64("2026-01-02")

    shapes, dtypes = [(20, 30, 3), (), (5,)], [">f8", "S5", np.dtype("M8[D]")]
    with ProducerPool(method, shapes, dtypes, 2, 3, (7,), {"second": "hello"}) as pool:
        for result in pool:
            with result as (image, label, when):
                assert [image.shape, label.shape, when.shape] == shapes
                assert [each.dtype.str for each in (image, label, when)] == [">f8", "|S5", "<M8[D]"]
                assert (image == 7).all()
                assert label == b"hello"
                assert (when == np.datetime64("2026-01-02")).all()
                image += 1  # they are writeable
    with ProducerPool(lambda leases: next(leases).__enter__(), [(1,)]) as pool:
        assert pool._source.specs()[0].dtype == np.float32


MISUSES: dict[str, tuple[Callable[[Any], object], str]] = {
    "no with": (lambda leases: [lease for lease in leases], "was not used"),  # noqa: C416
    "two at once": (lambda leases: (next(leases).__enter__(), next(leases)), "still in use"),
    "twice": (lambda leases: [lease.__enter__() for lease in [next(leases)] * 2], "a lease that is open"),
    "a generator": (lambda leases: (lease for lease in leases), "got generator, of which nothing has run"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_a_method_that_misuses_its_leases_is_told(misuse: str) -> None:
    method, message = MISUSES[misuse]
    with pool_of(method) as pool, pytest.raises(iw.FetchFailed, match=message) as caught:
        pool.next_result()
    assert isinstance(caught.value.__cause__, iw.LifecycleError | iw.ConfigError)


def test_a_result_is_used_once_and_an_array_cannot_be_put_in_another_s_place(counter: FileCounter) -> None:
    def method(leases: Any) -> None:
        with next(leases) as arrays:
            fill(arrays, 0, 0)
        with next(leases) as arrays:
            arrays[0] = np.zeros(3)

    with pool_of(method) as pool:
        result = pool.next_result()
        seen_in(result)
        with pytest.raises(iw.LifecycleError, match="used already"):
            seen_in(result)
        with pytest.raises(iw.FetchFailed, match="does not support item assignment"):
            pool.next_result()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": 3}, "method"),
        ({"shapes": []}, "shapes"),
        ({"shapes": 5}, "shapes"),
        ({"shapes": [(3, 0)]}, "holds nothing"),
        ({"shapes": [(-3,)]}, "negative"),
        ({"shapes": ["abc"]}, "'abc'"),
        ({"dtype": ["f4", "f8"]}, "got 2 for 1 shapes"),
        ({"dtype": "O"}, "object"),
        ({"dtype": "S"}, "holds nothing"),
        ({"dtype": "none"}, "'none'"),
        ({"workers": 0}, "workers"),
        ({"buffers": 0}, "buffers"),
        ({"buffers": 5000}, "buffers"),
        ({"start": "boot"}, "start"),
        ({"timeout_s": -1}, "timeout_s"),
    ],
)
def test_wrong_arguments_are_config_errors_that_name_them(wrong: dict[str, Any], message: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(iw.ConfigError, match=message):
        ProducerPool(**{"method": print, "shapes": [(3,)], **wrong})
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_method_that_cannot_be_sent_is_a_config_error() -> None:
    lock = threading.Lock()
    with pytest.raises(iw.ConfigError, match="lock"), pool_of(lambda leases: lock.acquire()):
        pass


def test_where_there_is_no_proc_the_tokens_have_a_name(
    counter: FileCounter, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(buffer_tokens.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(buffer_tokens.os.path, "isdir", lambda path: False)
    with pool_of(produce, counter, [5, 9], workers=2, buffers=2) as pool:
        assert [path for path in tmp_path.glob("*/tokens") if path.is_fifo()]
        assert len([*map(seen_in, pool)]) == 14
    assert not list(tmp_path.glob("input_workers-*"))


def test_a_fork_of_the_trainer_gives_no_buffer_back(counter: FileCounter) -> None:
    with pool_of(produce, counter, [9], buffers=1) as pool:
        result = pool.next_result()
        pid = os.fork()
        if not pid:
            with result:
                pass
            os._exit(0)
        os.waitpid(pid, 0)
        with pytest.raises(iw.WaitTimeout):
            pool.next_result(0.3)
        seen_in(result)
        assert len([*map(seen_in, pool)]) == 8
