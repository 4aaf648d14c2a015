"""GroupCache: a group is read once by one thread, kept while there is room, and a failed reading is nobody else's."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from gates import HANG_SECONDS, await_true

from input_workers.sources.group_cache import GroupCache


class Reader:
    """Reads group 7 as "group 7", of so many bytes, and notes it."""

    def __init__(self, cache: GroupCache, nbytes: int = 10) -> None:
        self.cache, self.nbytes = cache, nbytes
        self.read: list[int] = []

    def __call__(self, group: int, nbytes: int | None = None) -> Any:
        def read() -> tuple[str, int]:
            self.read.append(group)
            return f"group {group}", nbytes or self.nbytes

        return self.cache.get(group, read)


def test_the_groups_used_last_are_kept_up_to_the_bytes() -> None:
    cache = GroupCache(30)
    get = Reader(cache)
    for group in (0, 1, 2, 0, 3):
        assert get(group) == f"group {group}"
        assert cache.nbytes <= 30
    assert get.read == [0, 1, 2, 3]
    for group in (0, 2, 3):
        get(group)
    assert get.read == [0, 1, 2, 3]
    get(1)
    assert get.read == [0, 1, 2, 3, 1]
    assert cache.nbytes == 30


def test_a_group_that_is_too_large_is_kept_alone() -> None:
    cache = GroupCache(30)
    get = Reader(cache)
    get(0), get(1), get(2, 100), get(2)
    assert (get.read, cache.nbytes) == ([0, 1, 2], 100)
    get(0)
    assert (get.read, cache.nbytes) == ([0, 1, 2, 0], 10)


def test_one_thread_reads_and_the_others_wait_for_it_but_not_for_other_groups() -> None:
    cache = GroupCache(100)
    inside, go_on, reads = threading.Event(), threading.Event(), []

    def read() -> tuple[str, int]:
        reads.append(1)
        inside.set()
        assert go_on.wait(HANG_SECONDS)
        return "group 0", 10

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(cache.get, 0, read) for _ in range(4)]
        assert inside.wait(HANG_SECONDS)
        assert Reader(cache)(1) == "group 1"
        assert not any(answer.done() for answer in answers)
        go_on.set()
        assert [answer.result(HANG_SECONDS) for answer in answers] == ["group 0"] * 4
    assert len(reads) == 1
    assert cache.nbytes == 20


def test_a_group_that_is_being_read_is_not_put_out() -> None:
    cache = GroupCache(10)
    inside, go_on, reads = threading.Event(), threading.Event(), []

    def read() -> tuple[str, int]:
        reads.append(1)
        inside.set()
        assert go_on.wait(HANG_SECONDS)
        return "group 0", 10

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(cache.get, 0, read)
        assert inside.wait(HANG_SECONDS)
        get = Reader(cache)
        get(1), get(2)
        go_on.set()
        assert answer.result(HANG_SECONDS) == "group 0"
    assert cache.get(0, read) == "group 0"
    assert (len(reads), cache.nbytes) == (1, 10)


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt("stop")])
def test_an_error_is_of_the_thread_that_read_and_those_who_waited_read_for_themselves(error: BaseException) -> None:
    cache = GroupCache(100)
    inside, go_on = threading.Event(), threading.Event()

    def fail() -> tuple[str, int]:
        inside.set()
        assert go_on.wait(HANG_SECONDS)
        raise error

    with ThreadPoolExecutor(2) as pool:
        broken = pool.submit(cache.get, 0, fail)
        assert inside.wait(HANG_SECONDS)
        entry = cache._entries[0]
        waiting = pool.submit(Reader(cache), 0)
        await_true(lambda: bool(entry.done._cond._waiters), "the other waits")  # type: ignore[attr-defined]
        go_on.set()
        assert broken.exception(HANG_SECONDS) is error
        assert waiting.result(HANG_SECONDS) == "group 0"
    assert cache.nbytes == 10
