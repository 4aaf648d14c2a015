"""Memory that is lent out: how much of it is kept."""

from __future__ import annotations

import random
import tracemalloc

import numpy as np

from input_workers.leases import COPY_SLAB_BYTES, CopyPool


def test_copies_of_many_sizes_take_no_more_than_were_lent_at_a_time() -> None:
    sizes = random.Random(0)
    pool = CopyPool(keep=32)
    tracemalloc.start()
    try:
        held: list[np.ndarray] = []
        most = 0
        for number in range(600):
            array = np.full(sizes.randrange(COPY_SLAB_BYTES, 40 * COPY_SLAB_BYTES), number % 251, np.uint8)
            held.append(pool.copy(array))
            assert (held[-1] == number % 251).all()
            most = max(most, sum(each.nbytes for each in held))
            if len(held) == 4:
                del held[sizes.randrange(4)]
        now, _ = tracemalloc.get_traced_memory()
        assert now <= 1.3 * most + array.nbytes  # a quarter of a slab may be unused
    finally:
        tracemalloc.stop()


def test_copies_of_one_size_are_made_in_memory_that_was_used_before() -> None:
    pool = CopyPool(keep=32)
    array = np.zeros(COPY_SLAB_BYTES, np.uint8)
    held = [pool.copy(array) for _ in range(8)]
    addresses = {copy.ctypes.data for copy in held}
    for _ in range(20):
        del held[:5]
        held += [pool.copy(array) for _ in range(5)]
        assert {copy.ctypes.data for copy in held} == addresses
