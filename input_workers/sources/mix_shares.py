"""How many draws of a block each stream of a Mix has."""

from __future__ import annotations

import math
from collections.abc import Sequence

from input_workers.errors import ConfigError

__all__ = ["BLOCK_DRAWS", "shares_of_block"]

# Draws are made in blocks in which every stream has its exact share: then the rows that came of each are known at any
# position, without counting. A weight is rounded to this fraction of all.
BLOCK_DRAWS = 1 << 14  # so that a stream's number, and how often it was drawn before, are 16 bits each


def shares_of_block(weights: Sequence[float], names: Sequence[str]) -> list[int]:
    """Return how many draws of a block each stream has: by weight, at least one, and all of them together."""
    largest = max(weights)
    total = math.fsum(weight / largest for weight in weights)  # the weights themselves might add up to infinity
    exact = [weight / largest / total * BLOCK_DRAWS for weight in weights]
    for name, draws in zip(names, exact, strict=True):
        if draws < 0.5:
            raise ConfigError(f"Mix: {name!r}: its weight is less than 1 in {2 * BLOCK_DRAWS} of all; wanted a larger one")
    if len(weights) > BLOCK_DRAWS:
        raise ConfigError(f"Mix: got {len(weights)} streams; wanted at most {BLOCK_DRAWS}")
    shares = [max(1, math.floor(draws)) for draws in exact]
    while (missing := BLOCK_DRAWS - sum(shares)) != 0:  # by the largest remainders; small weights have more than theirs
        step = 1 if missing > 0 else -1
        by_remainder = sorted(range(len(shares)), key=lambda index: step * (shares[index] - exact[index]))
        can = [index for index in by_remainder if shares[index] + step >= 1]
        for index in can[: abs(missing)]:
            shares[index] += step
    return shares
