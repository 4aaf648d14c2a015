"""Which arrays of a chunk may be kept as they are, because nothing else refers to their memory.

A fetch function may go on using what it returned. An array may be kept only if nothing else refers to it, weakly either, and
it owns its memory, or is the only view of an array that does. Everything else is copied.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from sys import getrefcount
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ownership"]

# Reference counts, as seen below, of an object to which nothing else refers. `_counts_are_right` proves them at import.
_REFS_OF_RESULT = 3  # the caller's variable, the parameter, getrefcount's argument
_REFS_OF_ARRAY = 4  # the list it was returned in, the iterator's tuple, the loop variable, getrefcount's argument
_REFS_OF_BASE = 3  # the view, a variable, getrefcount's argument

# A view of something larger than this many times itself is copied: it would keep all of that alive, uncounted.
MAX_BASE_RATIO = 2


def ownership(result: Sequence[NDArray[Any]], owns_all: bool, lent: Sequence[NDArray[Any]] | None) -> Sequence[bool]:
    """Return for each array of a result whether it may be kept.

    Args:
        result: what the fetch function returned, in a variable of the caller and nowhere else of ours.
        owns_all: the arrays were made by us, from what a worker process sent.
        lent: memory that was lent to the function to write into; such an array is ours.
    """
    if owns_all:
        return (True,) * len(result)
    base: NDArray[Any] | None
    all_shared = type(result) not in (list, tuple) or getrefcount(result) > _REFS_OF_RESULT or not _TRUSTED
    kept: list[bool] = []
    for index, array in enumerate(result):
        if lent is not None and array is lent[index]:
            kept.append(True)
            continue
        ours = not all_shared and type(array) is np.ndarray and getrefcount(array) <= _REFS_OF_ARRAY
        ours = ours and not weakref.getweakrefcount(array)
        if ours and not array.flags.owndata:
            base = array.base
            ours = base is not None and type(base) is np.ndarray and base.flags.owndata and getrefcount(base) <= _REFS_OF_BASE
            ours = ours and base is not None and not weakref.getweakrefcount(base)
            ours = ours and base is not None and base.nbytes <= MAX_BASE_RATIO * array.nbytes
        kept.append(ours)
    return kept


def _counts_are_right() -> bool:
    """Whether this interpreter counts references as assumed: arrays that are held elsewhere are seen to be."""
    kept_array, kept_base, kept_list = np.zeros(1), np.zeros(2), [np.zeros(1)]
    for make in (lambda: [kept_array], lambda: [kept_base[:1]], lambda: kept_list, lambda: (kept_array,)):
        result = make()
        if ownership(result, False, None)[0]:
            return False
    return True


_TRUSTED = True
_TRUSTED = _counts_are_right()
