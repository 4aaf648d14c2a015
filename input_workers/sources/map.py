"""A data set with `__len__` and `__getitem__` goes in; its rows come out as one array per input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from input_workers.errors import ConfigError, SpecMismatch, describe
from input_workers.sources.columns import Column, Failures, check_rows
from input_workers.sources.padding import arrays_of, checked_pads, make_padded_columns

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from input_workers.contracts import FetchRequest

__all__ = ["Map"]


class Map:
    """A Source over a PyTorch map-style data set, a Grain data source, a Hugging Face `Dataset`, a list of tuples.

    `fetch` returns one array per input, with the rows along axis 0. An item is a tuple or list (one entry per input), a
    mapping (its inputs are `columns`) or anything else (one input). An entry is a NumPy array or scalar, a Python number
    (int64, float64, bool, complex128), or has `__array__`, such as a tensor in host memory. In a request all rows of an
    input must have the same dtype and shape, but for what `pad_ragged` names; nothing is cast. Lists of numbers and strings
    are no arrays; of a Hugging Face data set take `dataset.with_format("numpy")`.

    Where the data set has `__getitems__` (PyTorch, Hugging Face), it is called once for all rows of a request; if that
    fails, the rows are read one by one, so that the bad ones can be named.

    Thread-safe only as far as the data set is: `__getitem__` and `transform` are called from many threads at once, for
    different rows and for the same. It may be pickled if they may. The data set must not change its length.

    Args:
        dataset: has `__len__`, and `__getitem__` for 0..len - 1.
        columns: for items that are mappings: the keys of the inputs, in their order.
        transform: called with (item, rng) before an item is taken apart, returns an item. `rng` is `request.rng`, a NumPy
            Generator that depends on seed, epoch and request alone; the rows of a request draw from it in their order.
        pad_ragged: for rows of unequal length, by column, or by place where there are none: `{"tokens": 128}` fills them
            up with zeros along their first axis, to that length, and a longer one is an error; `(128, -1)` fills with
            another value. "longest" in place of a length: that of the longest of the request; this needs `rebatch=False`
            and `specs` with None for the side. After the other inputs comes one for each of these, with the lengths
            that the rows had, int64: name it `tokens_length`.

    Raises:
        ConfigError: a parameter is wrong, or the data set has no length or no rows.
    """

    def __init__(
        self,
        dataset: Any,
        columns: Sequence[str] | None = None,
        *,
        transform: Callable[[Any, np.random.Generator], Any] | None = None,
        pad_ragged: Mapping[Any, Any] | None = None,
    ) -> None:
        kind = type(dataset).__qualname__
        if not hasattr(dataset, "__getitem__"):
            raise ConfigError(f"Map: dataset: {kind} has no __getitem__; wanted rows by number (for iterators: Generators)")
        try:
            self._rows = len(dataset)
        except (TypeError, NotImplementedError) as error:
            raise ConfigError(f"Map: dataset: {kind} has no length ({error}); wanted __len__ and __getitem__") from error
        if self._rows < 1:
            raise ConfigError(f"Map: dataset: the {kind} has no rows; wanted at least one")
        if columns is not None:
            if isinstance(columns, str) or not isinstance(columns, Sequence) or not columns:
                raise ConfigError(f"Map: columns: got {columns!r}; wanted keys of its items, as in ('image', 'label')")
            if len(set(columns)) != len(columns):
                raise ConfigError(f"Map: columns: got {list(columns)}; wanted each key once")
        if transform is not None and not callable(transform):
            raise ConfigError(f"Map: transform: got {transform!r}; wanted transform(item, rng)")
        self.dataset = dataset
        self.columns = None if columns is None else tuple(columns)
        self.transform = transform
        pads = checked_pads("Map", pad_ragged)
        self._pads = pads if columns is not None else {f"input {place}": pad for place, pad in pads.items()}

    def __len__(self) -> int:
        return self._rows

    def fetch(self, rows: NDArray[np.int64], request: FetchRequest) -> list[NDArray[Any]]:
        """Read these rows.

        Args:
            rows: int64 (n,), row numbers, at least one.
            request: its `rng` is used for `transform`, and its `out`, where it is given, is written and returned.

        Returns:
            One array per input, (n, ...), in the order of `rows`.

        Raises:
            BadRows: names every row of the request for which the data set or the transform raised; from the first error.
            ConfigError: the items are mappings and `columns` was not given, or the other way round.
            IndexError: a row number is outside 0..len - 1.
            SpecMismatch: rows differ in dtype, shape or number of entries, or hold what is no array; names the row.
        """
        numbers = check_rows(rows, self._rows)
        items = self._batched(numbers)
        failures = Failures()
        columns: list[Column] | None = None
        for at, row in enumerate(numbers):
            try:
                item = self.dataset[row] if items is None else items[at]
                if self.transform is not None:
                    item = self.transform(item, request.rng)
                values = self._values(row, item)
                if columns is None:
                    names = self.columns or [f"input {place}" for place in range(len(values))]
                    columns = make_padded_columns("Map", names, len(numbers), request.out, self._pads)
                if len(values) != len(columns):
                    raise SpecMismatch(
                        f"Map, row {row}: got an item of {len(values)} entries; wanted {len(columns)}, as in the rows before it"
                    )
                for column, value in zip(columns, values, strict=True):
                    column.put(at, row, value)
            except (ConfigError, SpecMismatch, MemoryError):  # not for lack of this row
                raise
            except Exception as error:  # foreign code; the rows after it are still tried
                failures.add(row, f"raised {describe(error)}", error)
        failures.raise_any(lambda row: f"{type(self.dataset).__qualname__}[{row}]", "Repair the row, or leave it out")
        return arrays_of(columns or ())

    def _batched(self, numbers: list[int]) -> Sequence[Any] | None:
        """Return the items read together, or None where they must be read one by one."""
        getter = getattr(self.dataset, "__getitems__", None)
        if getter is None:
            return None
        try:
            items = getter(numbers)
        except MemoryError:
            raise
        except Exception:  # which row it was shows when they are read one by one
            return None
        if not isinstance(items, (list, tuple)) or len(items) != len(numbers):
            got = f"{len(items)} items" if isinstance(items, (list, tuple)) else type(items).__qualname__
            kind = type(self.dataset).__qualname__
            raise SpecMismatch(f"Map: {kind}.__getitems__ returned {got}; wanted a list of {len(numbers)} items")
        return items

    def _values(self, row: int, item: Any) -> Sequence[Any]:
        if isinstance(item, Mapping):
            if self.columns is None:
                raise ConfigError(
                    f"Map: columns: not given, but row {row} is a {type(item).__qualname__} with the keys {list(item)}; "
                    "wanted the keys of the inputs, as in columns=('image', 'label')"
                )
            missing = [name for name in self.columns if name not in item]
            if missing:
                raise SpecMismatch(f"Map, row {row}: got the keys {list(item)}; wanted {missing} too, as `columns` says")
            return [item[name] for name in self.columns]
        if self.columns is not None:
            raise ConfigError(
                f"Map: columns: got {list(self.columns)}, but row {row} is a {type(item).__qualname__}; "
                "wanted no columns for items that are no mappings"
            )
        return item if isinstance(item, (tuple, list)) else (item,)
