"""Random numbers that a fetch function uses without asking: those of `random`, NumPy, PyTorch and TensorFlow."""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["seed_by", "seed_late_comers"]


def seed_by(key: tuple[int, ...]) -> None:
    """Seed the random numbers that a function may use without asking, by the request alone."""
    words = np.random.SeedSequence((*key, SEED_OF_GLOBALS)).generate_state(2)
    random.seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words)
    for name in SEEDERS:
        _seed_framework(name, int(words[0]))


def seed_late_comers() -> None:
    """Seed frameworks that were imported since the last call: each would begin alike in all workers."""
    for name in SEEDERS:
        if name not in _seeded and name in sys.modules:
            _seeded.add(name)
            _seed_framework(name, int.from_bytes(os.urandom(4), "big"))


def _seed_framework(name: str, seed: int) -> None:
    module = sys.modules.get(name)
    if module is not None:
        with contextlib.suppress(AttributeError):  # half imported
            SEEDERS[name](module)(seed)


SEEDERS: dict[str, Callable[[Any], Callable[[int], object]]] = {
    "torch": lambda torch: torch.manual_seed,
    "tensorflow": lambda tensorflow: tensorflow.random.set_seed,
}
_seeded: set[str] = set()

# Unlike any seed of request.rng's own key, which has three or four numbers.
SEED_OF_GLOBALS = 0x5EED
