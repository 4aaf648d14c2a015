"""What a fetch function returned goes in; how many rows of the source's specs it is comes out, or an error. Nothing is cast."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

from input_workers.contracts import ArraySpec, FetchRequest
from input_workers.errors import ConfigError, EndOfData, LifecycleError, SpecMismatch, WaitTimeout

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ChunkCheck", "SpecBook"]


class SpecBook:
    """The specs of a source: given, or learnt from its first chunk. Thread-safe."""

    # Invariant under _lock: `specs` is set once.

    def __init__(self, source: str, input_names: Sequence[str], batch_axes: Sequence[int]) -> None:
        self.source = source
        self.input_names = tuple(input_names)
        self.batch_axes = tuple(batch_axes)
        self.specs: tuple[ArraySpec, ...] | None = None
        self._ended = False
        self._lock = threading.Condition()

    def learn(self, specs: Sequence[ArraySpec]) -> tuple[ArraySpec, ...]:
        """Return the specs of the source: these, if there were none."""
        for name, spec, axis in zip(self.input_names, specs, self.batch_axes, strict=True):
            if axis > len(spec.shape):
                raise ConfigError(
                    f"source {self.source!r}, input {name!r}: batch axis {axis} does not exist in rows of shape {spec.shape}"
                )
        with self._lock:
            if self.specs is None:
                self.specs = tuple(specs)
                self._lock.notify_all()
            return self.specs

    def known(self) -> tuple[ArraySpec, ...]:
        """Return the specs; they must have been learnt."""
        if self.specs is None:
            raise LifecycleError(f"source {self.source!r}: its specs are not known before the first chunk")
        return self.specs

    def wait(self, timeout_s: float) -> tuple[ArraySpec, ...]:
        """Return the specs, waiting for the first chunk. Raises WaitTimeout, or EndOfData if none will come."""
        with self._lock:
            timeout = min(timeout_s, threading.TIMEOUT_MAX)
            self._lock.wait_for(lambda: self.specs is not None or self._ended, timeout)
            if self.specs is not None:
                return self.specs
            if self._ended:
                raise EndOfData(f"source {self.source!r}: it ended before its first chunk; its specs are not known")
        raise WaitTimeout(f"source {self.source!r}: no chunk within {timeout_s:g} s, so its specs are not known yet")

    def end(self) -> None:
        """No chunk comes any more: wake who waits."""
        with self._lock:
            self._ended = True
            self._lock.notify_all()

    def begin(self) -> None:
        """A run begins: chunks may come again."""
        with self._lock:
            self._ended = False


class ChunkCheck:
    """Checks results. One per fetcher; not thread-safe, but many may share a SpecBook.

    Attributes:
        axes: the batch axis of each input.
        row_nbytes: bytes of one row of all inputs; 0 before the first rows were seen, and where rows have any shape.
    """

    __slots__ = ("_book", "_layouts", "axes", "row_nbytes")

    def __init__(self, book: SpecBook) -> None:
        self._book = book
        self.axes = book.batch_axes
        self._layouts: tuple[tuple[np.dtype[Any], dict[tuple[int, ...], int]], ...] = ()  # dtype, {shape: rows}
        self.row_nbytes = 0

    def rows_of(self, result: Any, request: FetchRequest | None) -> int:
        """Return the number of rows of a right result; 0 for no data now.

        Raises:
            SpecMismatch: with what was got and wanted.
        """
        # The common case at its cheapest: plain arrays of known dtypes and shapes, with as many rows each.
        rows = index = 0
        try:
            if len(result) != len(self._layouts):
                return self._check_slowly(result, request)
            for dtype, known in self._layouts:
                array = result[index]
                if type(array) is not ndarray or array.dtype is not dtype:
                    return self._check_slowly(result, request)
                count = known[array.shape]
                if count != rows:
                    if index:
                        return self._check_slowly(result, request)
                    rows = count
                index += 1
        except (TypeError, KeyError, IndexError):  # None, a new number of rows, or no chunk at all
            return self._check_slowly(result, request)
        if not rows or (request is not None and rows != len(request.rows)):
            return self._check_slowly(result, request)
        return rows

    def _check_slowly(self, result: Any, request: FetchRequest | None) -> int:
        """Check everything, saying what is wrong; learn the specs or a new number of rows."""
        if result is None and request is None:
            return 0
        if self._layouts and request is None:
            rows = self._new_count_of(result)
            if rows:
                return rows
        book = self._book
        names = book.input_names
        if isinstance(result, (str, bytes, ndarray, dict, set)) or not isinstance(result, Sequence):
            raise self._mismatch(f"got {_kind(result)}", f"a sequence of {len(names)} arrays, for {list(names)}")
        if len(result) != len(names):
            raise self._mismatch(f"got {len(result)} arrays", f"{len(names)}, for {list(names)}")
        arrays: list[NDArray[Any]] = []
        for name, array, axis in zip(names, result, self.axes, strict=True):
            if not isinstance(array, ndarray) or isinstance(array, (np.ma.MaskedArray, np.matrix)):
                raise self._mismatch(f"input {name!r}: got {_kind(array)}", "a NumPy array (np.asarray makes one)")
            if array.dtype.hasobject or array.dtype.itemsize == 0:
                raise self._mismatch(
                    f"input {name!r}: got dtype {array.dtype!r}",
                    "fixed-size values; encode objects, or use a dtype with a length",
                )
            if array.ndim <= axis:
                raise self._mismatch(f"input {name!r}: got shape {array.shape}", f"rows along axis {axis}")
            arrays.append(array)
        counts = [array.shape[axis] for array, axis in zip(arrays, self.axes, strict=True)]
        if len(set(counts)) > 1:
            shapes = ", ".join(f"{name}: {array.shape}" for name, array in zip(names, arrays, strict=True))
            axes = self.axes[0] if len(set(self.axes)) == 1 else list(self.axes)
            raise self._mismatch(f"got unequal numbers of rows, {shapes}", f"as many in each along axis {axes}")
        if request is not None and counts[0] != len(request.rows):
            raise self._mismatch(f"got {counts[0]} rows", f"exactly the {len(request.rows)} that were asked for")
        found = [ArraySpec.of(array, axis) for array, axis in zip(arrays, self.axes, strict=True)]
        if book.specs is not None or counts[0]:
            specs = book.specs or book.learn(found)
            for name, spec, got in zip(names, specs, found, strict=True):
                if got.dtype != spec.dtype or not spec.admits(got.shape):
                    hint = ""
                    if got.dtype == spec.dtype and len(got.shape) == len(spec.shape):
                        hint = " (shapes that change: specs= with None for such a side and rebatch=False, or pad_ragged=)"
                    wanted = f"{spec.dtype!r} with shape {spec.shape}, as given or as in the first chunk; nothing is ever cast"
                    raise self._mismatch(f"input {name!r}: got rows of {got.dtype!r} with shape {got.shape}", wanted + hint)
        if counts[0] and all(spec.is_fixed for spec in book.known()):
            self._learn(book.known(), counts[0])
        return int(counts[0])

    def _new_count_of(self, result: Any) -> int:
        """Return the rows of a result that differs from known ones in their number alone, and learn it; 0: look closer.

        Every number of rows comes a first time in every fetcher: the closer look costs ten times as much.
        """
        layouts = self._layouts
        shapes: list[tuple[int, ...]] = []
        rows = 0
        if type(result) not in (list, tuple) or len(result) != len(layouts) or len(layouts[0][1]) >= MAX_KNOWN_SHAPES:
            return 0
        for (dtype, _), spec, axis, array in zip(layouts, self._book.known(), self.axes, result, strict=True):
            if type(array) is not ndarray or array.dtype is not dtype:
                return 0
            shape = array.shape
            if len(shape) <= axis or shape[:axis] + shape[axis + 1 :] != spec.shape:
                return 0
            if shapes and shape[axis] != rows:
                return 0
            rows = shape[axis]
            shapes.append(shape)
        if rows:
            for (_, known), shape in zip(layouts, shapes, strict=True):
                known[shape] = rows
        return rows

    def _learn(self, specs: Sequence[ArraySpec], rows: int) -> None:
        if not self._layouts or len(self._layouts[0][1]) >= MAX_KNOWN_SHAPES:
            self._layouts = tuple((spec.dtype, {}) for spec in specs)
            self.row_nbytes = sum(spec.row_nbytes for spec in specs)
        for spec, axis, (_, known) in zip(specs, self.axes, self._layouts, strict=True):
            known[spec.batch_shape(rows, axis)] = rows

    def _mismatch(self, got: str, wanted: str) -> SpecMismatch:
        return SpecMismatch(f"source {self._book.source!r}: {got}; wanted {wanted}")


def _kind(thing: Any) -> str:
    name = type(thing).__qualname__
    return f"{name} of shape {thing.shape}" if isinstance(thing, ndarray) else name


# Shapes remembered per fetcher; beyond, it begins anew (each number of rows is one shape).
MAX_KNOWN_SHAPES = 1024
