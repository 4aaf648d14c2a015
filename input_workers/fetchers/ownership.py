"""A right result goes in; arrays whose memory nobody else can reach come out.

A fetch function may go on using what it returned. An array is taken over as it is only if nobody else refers to it and it
owns its memory, or is the only view of an array that does; anything else is copied, in the fetcher's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from sys import getrefcount
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["owned"]

# Reference counts, as seen below, of an object that nobody else holds. `_counts_are_right` proves them at import.
_REFS_OF_RESULT = 3  # the caller's variable, the parameter, getrefcount's argument
_REFS_OF_ARRAY = 4  # the list it was returned in, the iterator's tuple, the loop variable, getrefcount's argument
_REFS_OF_BASE = 3  # the view, a variable, getrefcount's argument

# A view of something larger than this many times itself is copied: it would keep all of that alive, uncounted.
MAX_BASE_RATIO = 2


def owned(
    result: Sequence[NDArray[Any]],
    lent: Sequence[NDArray[Any]] | None,
    copy: Callable[[NDArray[Any]], NDArray[Any]],
) -> Sequence[NDArray[Any]]:
    """Return the result's arrays, or copies where somebody else could reach them.

    Args:
        result: what the fetch function returned, in a variable of the caller and nowhere else of ours.
        lent: memory that was lent to the function to write into; such an array is ours.
        copy: copies an array to memory that is ours.
    """
    base: NDArray[Any] | None
    all_shared = type(result) not in (list, tuple) or getrefcount(result) > _REFS_OF_RESULT or not _TAKE_OVER
    arrays: list[NDArray[Any]] = []
    for index, array in enumerate(result):
        if lent is not None and array is lent[index]:
            arrays.append(array)
            continue
        ours = not all_shared and type(array) is np.ndarray and getrefcount(array) <= _REFS_OF_ARRAY
        if ours and not array.flags.owndata:
            base = array.base
            ours = base is not None and type(base) is np.ndarray and base.flags.owndata and getrefcount(base) <= _REFS_OF_BASE
            ours = ours and base is not None and base.nbytes <= MAX_BASE_RATIO * array.nbytes
        arrays.append(array if ours else copy(array))
    return arrays


def _counts_are_right() -> bool:
    """Whether this interpreter counts references as assumed: arrays that are held elsewhere are seen to be."""
    kept_array, kept_base, kept_list = np.zeros(1), np.zeros(2), [np.zeros(1)]
    for make in (lambda: [kept_array], lambda: [kept_base[:1]], lambda: kept_list, lambda: (kept_array,)):
        result = make()
        if np.shares_memory(owned(result, None, np.copy)[0], result[0]):
            return False
    return True


_TAKE_OVER = True
_TAKE_OVER = _counts_are_right()
