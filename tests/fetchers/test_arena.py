"""The shared memory of a worker process: what it costs, how its extents are used again, and when memory is given back."""

from __future__ import annotations

import collections
import errno
import gc
import itertools
import mmap
import os
import random
import resource
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from input_workers.fetchers import arena as arena_module
from input_workers.fetchers.arena import MAX_SPARE_EXTENTS, Arena, Extent

PAGE = mmap.PAGESIZE
CHUNK = 10 * PAGE


def taken(arena: Arena, nbytes: int = 0) -> Extent:
    extent = arena.take(nbytes)
    assert extent is not None
    return extent


class Watched:
    """An arena beside a descriptor of its memory, by which the system says how much of it is allocated."""

    def __init__(self) -> None:
        self.arena = Arena()
        self.descriptor = os.dup(self.arena.descriptor)
        self.arena.close_descriptor()

    @property
    def allocated(self) -> int:
        return os.fstat(self.descriptor).st_blocks * 512

    def chunk(self, fill: int = 1, nbytes: int = CHUNK) -> np.ndarray:
        """Do what a call does: take an extent, write to it, lend it."""
        array = self.arena.lease(taken(self.arena, nbytes), nbytes)
        array[:] = fill
        return array


@pytest.fixture
def watched() -> Iterator[Watched]:
    watched = Watched()
    yield watched
    watched.arena.close()
    del watched.arena  # and with it the mapping, where a test has taken extents and not given them back
    os.close(watched.descriptor)


def mapped() -> int:
    with open("/proc/self/maps") as maps:
        return sum("input_workers-arena" in line for line in maps)


def test_an_arena_costs_one_descriptor_however_many_chunks_are_lent() -> None:
    before = len(os.listdir("/proc/self/fd"))
    arena = Arena()
    arena.close_descriptor()
    chunks = [arena.lease(taken(arena, CHUNK), CHUNK) for _ in range(200)]
    assert len(os.listdir("/proc/self/fd")) == before + 1
    arena.close()
    del chunks
    assert len(os.listdir("/proc/self/fd")) == before
    assert mapped() == 0


def test_a_core_dump_leaves_the_address_space_out(watched: Watched) -> None:
    with open("/proc/self/smaps") as smaps:
        mappings = smaps.read().split("VmFlags:")
    (flags,) = [after.split("\n")[0] for before, after in itertools.pairwise(mappings) if "input_workers-arena" in before]
    assert "dd" in flags.split(), "do not dump"


def test_an_arena_lies_in_a_file_where_there_is_no_anonymous_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    watched = Watched()
    held = [watched.chunk(number) for number in range(10)]
    assert all((chunk == number).all() for number, chunk in enumerate(held))
    del held
    assert watched.allocated == watched.arena.held_nbytes == MAX_SPARE_EXTENTS * CHUNK
    watched.arena.close()
    os.close(watched.descriptor)


def test_extents_do_not_overlap_and_are_aligned_to_pages(watched: Watched) -> None:
    sizes = random.Random(0)
    held: list[tuple[int, np.ndarray]] = []
    for number in range(400):
        chunk = watched.chunk(number % 251, sizes.randrange(1, 40 * PAGE))
        assert chunk.ctypes.data % PAGE == 0
        held.append((number % 251, chunk))
        if len(held) > 6:
            del held[sizes.randrange(6)]
        assert all((array == fill).all() for fill, array in held)


def test_an_extent_is_used_again_with_its_memory(watched: Watched) -> None:
    addresses = set()
    for number in range(50):
        chunk = watched.chunk(number)
        addresses.add(chunk.ctypes.data)
        del chunk
    assert len(addresses) == 1
    assert watched.allocated == CHUNK
    assert not taken(watched.arena, CHUNK).is_cold


def test_an_extent_is_cold_until_a_chunk_has_come_in_it(watched: Watched) -> None:
    arena = watched.arena
    extent = taken(arena, CHUNK)
    assert extent.is_cold
    arena.give_back(extent)  # the call raised, perhaps before it wrote anything
    assert taken(arena, CHUNK).is_cold


def test_the_memory_of_a_burst_is_given_back_at_once(watched: Watched) -> None:
    held = [watched.chunk() for _ in range(60)]
    assert watched.allocated == watched.arena.held_nbytes == 60 * CHUNK
    ahead = taken(watched.arena)  # the call that was sent ahead has the memory of one
    del held
    assert watched.arena.held_nbytes == MAX_SPARE_EXTENTS * CHUNK
    assert watched.allocated == (MAX_SPARE_EXTENTS - 1) * CHUNK  # nothing has been written for the call yet
    watched.arena.give_back(ahead)


def test_chunks_that_are_copied_at_once_need_no_fresh_memory(watched: Watched) -> None:
    watched.chunk()
    calls = collections.deque([taken(watched.arena), taken(watched.arena)])
    seen = set()
    for number in range(50):
        extent = calls.popleft()
        seen.add(extent.offset)
        assert extent.is_cold == (number < 2 and extent.offset != 0)
        chunk = watched.arena.lease(extent, CHUNK)
        chunk[:] = number
        del chunk  # the thread has copied it, and makes the next call
        calls.append(taken(watched.arena))
    assert len(seen) <= MAX_SPARE_EXTENTS
    for extent in calls:
        watched.arena.give_back(extent)


def test_what_was_put_into_the_queue_is_not_in_hand_when_the_next_call_is_made(watched: Watched) -> None:
    held = [watched.chunk() for _ in range(4)]
    ahead = taken(watched.arena), taken(watched.arena)
    del held[0]
    assert watched.allocated == 4 * CHUNK  # kept: two calls and one free extent
    for extent in ahead:
        watched.arena.give_back(extent)


def test_a_chunk_in_hand_counts_as_spare(watched: Watched) -> None:
    held = [watched.chunk() for _ in range(10)]
    del held[:9]  # the last one is being copied, or waits for room
    assert watched.arena.held_nbytes == MAX_SPARE_EXTENTS * CHUNK


def test_memory_that_was_given_back_is_read_as_new(watched: Watched) -> None:
    held = [watched.chunk(7) for _ in range(10)]
    del held
    extents = [taken(watched.arena, CHUNK) for _ in range(10)]
    assert sum(extent.is_cold for extent in extents) == 10 - MAX_SPARE_EXTENTS
    for extent in extents:
        if extent.is_cold:
            assert not watched.arena.lease(extent, CHUNK).any()


def test_extents_are_sized_by_the_recent_chunks(watched: Watched) -> None:
    watched.chunk(nbytes=50 * PAGE)
    assert taken(watched.arena).nbytes == 50 * PAGE
    for _ in range(arena_module.RECENT_CHUNKS):
        watched.chunk(nbytes=2 * PAGE)
    assert taken(watched.arena).nbytes == 2 * PAGE


def test_address_space_is_used_again_though_sizes_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "MAX_ARENA_BYTES", 6 * 6 * 64 * PAGE)  # 6 are held, of up to 64 pages
    arena, sizes = Arena(), random.Random(1)
    held: list[np.ndarray] = []
    for _ in range(5000):
        nbytes = sizes.randrange(1, 60 * PAGE)
        held.append(arena.lease(taken(arena, nbytes), nbytes))
        if len(held) == 6:
            del held[sizes.randrange(6)]
    held.clear()
    arena.close()


def test_an_arena_without_room_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "MAX_ARENA_BYTES", 100 * PAGE)
    arena = Arena()
    extent = arena.take(60 * PAGE)
    assert extent is not None
    assert arena.take(60 * PAGE) is None
    arena.give_back(extent)
    assert arena.take(60 * PAGE) is extent
    arena.give_back(extent)
    arena.close()


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_FSIZE"])
def test_limits_of_the_process_are_kept(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    number = getattr(resource, limit)
    getrlimit = resource.getrlimit
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1 << 30, -1) if which == number else getrlimit(which))
    arena = Arena()
    assert arena.size == (1 << 30) // (arena_module.SHARE_OF_LIMIT if limit == "RLIMIT_AS" else 1)
    arena.close()


def test_an_arena_is_smaller_where_so_much_cannot_be_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def __new__(cls, descriptor: int, size: int) -> Any:
            if size > 1 << 24:
                raise OSError(errno.ENOMEM, "Cannot allocate memory")
            return super().__new__(cls, descriptor, size)

    monkeypatch.setattr(mmap, "mmap", Refusing)
    arena = Arena()
    assert 1 << 23 < arena.size <= 1 << 24
    arena.close()


def test_what_a_fork_lets_go_of_stays_the_parents(watched: Watched) -> None:
    held = [watched.chunk(number) for number in range(10)]
    child = os.fork()
    if not child:
        try:
            held.clear()
            watched.arena.close()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all((chunk == number).all() for number, chunk in enumerate(held))


def test_chunks_outlive_their_arena_and_each_gives_its_memory_back(watched: Watched) -> None:
    held = [watched.chunk(number) for number in range(10)]
    watched.arena.close()
    watched.arena = Arena()
    gc.collect()
    del held[2:]
    assert watched.allocated == 2 * CHUNK
    assert (held[1] == 1).all()
    assert mapped() == 2
    del held
    assert watched.allocated == 0
    assert mapped() == 1


def test_chunks_whose_arena_was_forgotten_give_their_memory_back(watched: Watched) -> None:
    held = [watched.chunk(number) for number in range(10)]
    forgotten, watched.arena = watched.arena, Arena()
    del forgotten
    gc.collect()
    del held[1:]
    assert watched.allocated <= (1 + MAX_SPARE_EXTENTS) * CHUNK
    del held


def test_threads_that_give_back_at_once_lose_no_extent(watched: Watched) -> None:
    shares = [[watched.chunk() for _ in range(200)] for _ in range(4)]
    together = threading.Barrier(4)

    def drop(share: list[np.ndarray]) -> None:
        together.wait()
        while share:
            share.pop()

    threads = [threading.Thread(target=drop, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert watched.arena.held_nbytes <= (MAX_SPARE_EXTENTS + len(threads)) * CHUNK
    assert watched.allocated == watched.arena.held_nbytes
    extents: list[Extent] = [taken(watched.arena, CHUNK) for _ in range(800)]
    assert len({extent.offset for extent in extents}) == 800
    assert watched.arena.held_nbytes == 800 * CHUNK
