"""Memory that is lent out as slots: it is used again, and no more of it is kept than was said."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

import input_workers as iw
from input_workers.leases import SlotPool


class Memory(np.ndarray):
    """Memory of slots that can be seen to die."""


def pool_of(keep: int) -> tuple[SlotPool, list[Any]]:
    made: list[Any] = []

    def make(nbytes: int) -> Any:
        memory = np.zeros(nbytes + 64, np.uint8)
        begin = -memory.ctypes.data % 64
        slab = memory[begin : begin + nbytes].view(Memory)
        made.append(weakref.ref(slab))
        return slab

    return SlotPool([iw.ArraySpec((3,), np.float64)], [0], 5, keep, make), made


def test_slots_are_made_of_memory_that_was_used_before() -> None:
    pool, made = pool_of(keep=8)
    held = [pool.lease() for _ in range(8)]
    for _ in range(20):
        del held[:5]
        held += [pool.lease() for _ in range(5)]
    assert len(made) == 8


def test_one_array_of_a_slot_keeps_its_own_memory_only() -> None:
    pool = SlotPool([iw.ArraySpec((), np.int8), iw.ArraySpec((1000,), np.int8)], [0, 0], 4, 2)
    slot = pool.lease()
    label = slot.arrays[0]
    picture = weakref.ref(slot.arrays[1])
    del slot
    assert picture() is None
    assert label.shape == (4,)


def test_free_slots_beyond_what_is_kept_are_let_go_at_once() -> None:
    pool, made = pool_of(keep=6)
    held = [pool.lease() for _ in range(6)]
    del held[:4]
    pool.keep(1)
    assert sum(each() is not None for each in made) == 3, "two held, one kept"
    held.clear()
    assert sum(each() is not None for each in made) == 1
    pool.keep(0)
    assert sum(each() is not None for each in made) == 0
