"""Arrays in memory as a source: row numbers go in, those rows of every array come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.contracts import ArraySpec, FetchRequest
from input_workers.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["Arrays"]


class Arrays:
    """Rows of arrays that have as many rows each, along axis 0. Thread-safe; the arrays are not copied.

    Args:
        arrays: one for each input.

    Raises:
        ConfigError: none is given, the numbers of rows differ, or one has no rows.
        SpecMismatch: one holds Python objects.
    """

    def __init__(self, *arrays: ArrayLike) -> None:
        self._arrays = [np.asarray(array) for array in arrays]
        shapes = [array.shape for array in self._arrays]
        if not shapes or any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
            raise ConfigError(f"Arrays: got shapes {shapes}; wanted at least one array, and as many rows along axis 0 in each")
        if not shapes[0][0]:
            raise ConfigError(f"Arrays: got shapes {shapes}, without rows; wanted at least one row")
        self.specs = [ArraySpec(array.shape[1:], array.dtype) for array in self._arrays]

    def __len__(self) -> int:
        return len(self._arrays[0])

    def fetch(self, rows: NDArray[np.int64], request: FetchRequest) -> Sequence[NDArray[Any]]:
        """Return copies of these rows, in `request.out` where memory is offered."""
        if request.out is None:
            return [array[rows] for array in self._arrays]
        for array, out in zip(self._arrays, request.out, strict=True):
            np.take(array, rows, axis=0, out=out, mode="clip")  # "clip" writes to `out` directly; rows are in range
        return request.out
