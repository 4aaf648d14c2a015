"""Values of rows go in, one or many at a time; one array per input comes out. Nothing is ever cast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.errors import BadRows, SpecMismatch

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Column", "Failures", "as_array", "check_rows", "make_columns"]


class Column:
    """One input of one request, filled row by row. The first row decides dtype and shape, or the memory that was offered.

    Belongs to the thread that fetches the request.

    Attributes:
        array: (rows, ...) of the input, as far as it is filled; None before the first row, where no memory was offered.
    """

    __slots__ = ("_origin", "_rows", "_what", "array")

    def __init__(self, what: str, rows: int, out: NDArray[Any] | None) -> None:
        self.array = out
        self._what = what
        self._rows = rows
        self._origin = "the memory offered in request.out"

    def put(self, at: int, row: int, value: Any) -> None:
        """Write row number `row` at position `at`.

        Args:
            at: position in the request.
            row: the row's number, for errors.
            value: a NumPy array or scalar, a Python number, or what has `__array__`, such as a tensor in host memory.

        Raises:
            SpecMismatch: it is something else, or has another dtype or shape than the rows before it.
            Exception: what the value's own `__array__` raises.
        """
        array = self._checked(row, value)
        self.allocate(row, array.dtype, array.shape)[at] = array

    def put_many(self, at: NDArray[np.int64], rows: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Write rows at the positions `at`; the values have them along axis 0. Raises SpecMismatch as `put` does."""
        self.allocate(int(rows[0]), values.dtype, values.shape[1:])[at] = values

    def allocate(self, row: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """Return the array for rows such as this one.

        Raises:
            SpecMismatch: the rows before it were others.
        """
        array = self.array
        if array is None:
            array = self.array = np.empty((self._rows, *shape), dtype)
            self._origin = f"row {row}, the first of this request"
        elif array.dtype != dtype or array.shape[1:] != shape:
            wanted = f"{array.dtype!r} of shape {array.shape[1:]}, as {self._origin}; nothing is ever cast"
            if array.dtype == dtype and len(shape) and array.shape[2:] == shape[1:]:
                wanted += ", and rows of unequal length are filled up by pad_ragged="
            raise self._mismatch(row, f"{dtype!r} of shape {shape}", wanted)
        return array

    def filled(self) -> NDArray[Any]:
        """Return the array, when every row was put."""
        if self.array is None:
            raise RuntimeError(f"{self._what}: no row was put")
        return self.array

    def _checked(self, row: int, value: Any) -> NDArray[Any]:
        try:
            return as_array(value)
        except SpecMismatch as error:
            raise SpecMismatch(f"{self._what}, row {row}: {error}") from error

    def _mismatch(self, row: int, got: str, wanted: str) -> SpecMismatch:
        return SpecMismatch(f"{self._what}, row {row}: got {got}; wanted {wanted}")


def as_array(value: Any) -> NDArray[Any]:
    """Return a value of one input as a plain array: itself, or what a number or a tensor in host memory makes.

    Raises:
        SpecMismatch: it is something else, with got and wanted; whoever knows where it comes from says so.
        Exception: what the value's own `__array__` raises.
    """
    if isinstance(value, np.ndarray):
        array = value
    elif isinstance(value, (bool, int, float, complex, np.generic)) or (
        hasattr(value, "__array__") or hasattr(value, "__array_interface__")
    ):
        array = np.asarray(value)
    else:
        raise SpecMismatch(f"got {type(value).__qualname__}; wanted an array (np.asarray makes one) or a number")
    if isinstance(array, (np.ma.MaskedArray, np.matrix)):
        raise SpecMismatch(f"got {type(array).__qualname__}; wanted a plain array")
    if array.dtype.hasobject or not array.dtype.itemsize:
        raise SpecMismatch(f"got dtype {array.dtype!r}; wanted values of a fixed size")
    return array


def make_columns(owner: str, names: Sequence[str], rows: int, out: Sequence[NDArray[Any]] | None) -> list[Column]:
    """Return a column for each name.

    Args:
        owner: the source, for errors.
        names: what its inputs are called there.
        rows: of the request.
        out: memory offered for them, or None.

    Raises:
        SpecMismatch: the memory is for another number of inputs or rows.
    """
    if out is not None and (len(out) != len(names) or any(array.ndim < 1 or len(array) != rows for array in out)):
        raise SpecMismatch(
            f"{owner}: request.out: got shapes {[array.shape for array in out]}; wanted {rows} rows for each of {list(names)}"
        )
    return [Column(f"{owner}: {name!r}", rows, None if out is None else out[at]) for at, name in enumerate(names)]


def check_rows(rows: NDArray[np.int64], count: int) -> list[int]:
    """Return the row numbers of a request as Python's.

    Raises:
        IndexError: there are none, or one is outside 0..count - 1.
    """
    if not len(rows):
        raise IndexError("rows: got none; wanted at least one row number")
    if not 0 <= int(rows.min()) <= int(rows.max()) < count:
        raise IndexError(f"rows: got {int(rows.min())}..{int(rows.max())}; wanted 0..{count - 1}")
    return [int(row) for row in rows.tolist()]


class Failures:
    """The rows of one request that cannot be read. Those after a bad one are still tried: one report names them all."""

    __slots__ = ("_first", "_rows", "_what")

    def __init__(self) -> None:
        self._rows: dict[int, None] = {}  # in their order, each once
        self._first: BaseException | None = None
        self._what = ""

    def add(self, row: int, what: str, error: BaseException | None = None) -> None:
        """Note a row, what is wrong with it ("is empty"), and the error that showed it."""
        if not self._rows:
            self._what, self._first = what, error
        self._rows[row] = None

    def raise_any(self, name_of: Callable[[int], str], remedy: str) -> None:
        """Raise BadRows from the first error, if there was one.

        Args:
            name_of: what a row is called.
            remedy: a sentence without its full stop.
        """
        if not self._rows:
            return
        row = next(iter(self._rows))
        more = f" ({len(self._rows) - 1} more rows of this request are bad too)" if len(self._rows) > 1 else ""
        # repr: a name may hold bytes that no log can encode
        raise BadRows(list(self._rows), f"row {row}: {name_of(row)!r} {self._what}{more}. {remedy}") from self._first
