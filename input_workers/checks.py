"""A parameter goes in, checked; if it is wrong, a ConfigError that says what was wanted comes out."""

from __future__ import annotations

import math

import numpy as np

from input_workers.errors import ConfigError

__all__ = ["check_whole"]


def check_whole(name: str, value: object, least: int, most: float = math.inf) -> int:
    """Return a whole number within bounds, Python's or NumPy's, as an int. Raises ConfigError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
        bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most:g}"
        raise ConfigError(f"{name}: got {value!r}; wanted a whole number {bounds}")
    return int(value)
