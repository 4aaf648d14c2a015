"""Rows of unequal length go in; an array in which they are filled up to one length comes out, and how long each was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.errors import ConfigError
from input_workers.sources.columns import Column, make_columns

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["LONGEST", "Pad", "PaddedColumn", "arrays_of", "checked_pads", "make_padded_columns"]

LONGEST = "longest"


@dataclass(frozen=True, slots=True)
class Pad:
    """How the rows of an input are filled up along their first axis: to `length`, or to the longest of the request (None)."""

    length: int | None
    value: Any = 0


def checked_pads(owner: str, pad_ragged: Any) -> dict[Any, Pad]:
    """Return the parameter `pad_ragged` of a source: by key, or by place where inputs have no keys.

    Raises:
        ConfigError: it is no mapping to a length, "longest", or a pair of one of these and a value.
    """
    if pad_ragged is None:
        return {}
    if not isinstance(pad_ragged, Mapping):
        raise ConfigError(f"{owner}: pad_ragged: got {pad_ragged!r}; wanted lengths by input, as in {{'tokens': 128}}")
    pads = {}
    for name, wanted in pad_ragged.items():
        length, value = wanted if isinstance(wanted, tuple) and len(wanted) == 2 else (wanted, 0)
        is_length = isinstance(length, (int, np.integer)) and not isinstance(length, bool) and length > 0
        if not (is_length or (isinstance(length, str) and length == LONGEST)):
            raise ConfigError(
                f"{owner}: pad_ragged: {name!r}: got {wanted!r}; wanted a length of at least 1, 'longest', or (length, value)"
            )
        pads[name] = Pad(int(length) if is_length else None, value)
    return pads


class PaddedColumn(Column):
    """A column whose rows may differ in their first side. Belongs to the thread that fetches the request.

    Attributes:
        lengths: int64 (rows,), how long each row was.
    """

    __slots__ = ("_kept", "_pad", "lengths")

    def __init__(
        self, what: str, rows: int, out: NDArray[Any] | None, pad: Pad, lengths: NDArray[np.int64] | None = None
    ) -> None:
        super().__init__(what, rows, out)
        self._pad = pad
        self._kept: list[NDArray[Any]] = [np.empty(0)] * rows if pad.length is None else []
        self.lengths = np.zeros(rows, np.int64) if lengths is None else lengths

    def put(self, at: int, row: int, value: Any) -> None:
        """Write row number `row` at position `at`; see `Column.put`. Raises SpecMismatch, too: it is longer than the length."""
        array = self._checked(row, value)
        if not array.ndim:
            raise self._mismatch(row, "a single value", "an array with at least one axis, as pad_ragged pads the first")
        length = self._pad.length
        if length is None:
            like = self.allocate(row, array.dtype, (0, *array.shape[1:]))  # compared with the first row, and empty
            self._kept[at] = np.array(array, like.dtype)
        elif len(array) > length:
            raise self._mismatch(row, f"a length of {len(array)}", f"at most {length}, as pad_ragged says; nothing is ever cut")
        else:
            target = self.allocate(row, array.dtype, (length, *array.shape[1:]))[at]
            target[: len(array)] = array
            target[len(array) :] = self._pad.value
        self.lengths[at] = len(array)

    def put_many(self, at: NDArray[np.int64], rows: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Write rows at the positions `at`, one by one."""
        for position, row, value in zip(at.tolist(), rows.tolist(), values, strict=True):
            self.put(position, row, value)

    def filled(self) -> NDArray[Any]:
        """Return the array, when every row was put; of a row that was not, it has anything."""
        array = super().filled()
        if self._pad.length is not None:
            return array
        longest = np.full((len(self._kept), max(self.lengths), *array.shape[2:]), self._pad.value, array.dtype)
        for target, row in zip(longest, self._kept, strict=True):
            if len(row):
                target[: len(row)] = row
        return longest


def make_padded_columns(
    owner: str, names: Sequence[Any], rows: int, out: Sequence[NDArray[Any]] | None, pads: Mapping[Any, Pad]
) -> list[Column]:
    """Return a column for each name: one that pads where `pads` says so. See `make_columns`.

    `out` has the arrays of all names, and then the lengths of those that are padded.

    Raises:
        ConfigError: `pads` names an input that is not there.
        SpecMismatch: `out` is for another number of inputs or rows.
    """
    unknown = [name for name in pads if name not in names]
    if unknown:
        raise ConfigError(f"{owner}: pad_ragged: got {unknown}; wanted some of {list(names)}")
    padded = [name for name in names if name in pads]
    columns = make_columns(owner, [*names, *(f"{name}_length" for name in padded)], rows, out)[: len(names)]
    for at, name in enumerate(names):
        if name in pads:
            fixed = out if out is not None and pads[name].length is not None else None
            lengths = None if out is None else out[len(names) + padded.index(name)]
            columns[at] = PaddedColumn(f"{owner}: {name!r}", rows, fixed[at] if fixed else None, pads[name], lengths)
    return columns


def arrays_of(columns: Sequence[Column]) -> list[NDArray[Any]]:
    """Return the arrays of filled columns, and then the lengths of those that are padded."""
    lengths = [column.lengths for column in columns if isinstance(column, PaddedColumn)]
    return [*(column.filled() for column in columns), *lengths]
