"""Parquet files in, rows by number out: one array per column. Only the row groups that hold the rows are read."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from input_workers.checks import check_whole
from input_workers.errors import ConfigError, SpecMismatch, describe
from input_workers.sources.columns import Column, Failures, check_rows
from input_workers.sources.files import DataFile, Decoder, chosen_decoders, list_files
from input_workers.sources.group_cache import GroupCache
from input_workers.sources.padding import arrays_of, checked_pads, make_padded_columns

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from input_workers.contracts import FetchRequest

__all__ = ["Parquet", "load_pyarrow"]

# One column of a row group: its values, an array (rows, ...), or a sequence of one value per row where lists differ in
# length or there is a decoder; whether each row is there, or None where all are; its bytes.
Block: TypeAlias = "tuple[NDArray[Any] | Sequence[Any], NDArray[np.bool_] | None, int]"
VIEW_BYTES = 128  # of an array object


@functools.cache
def load_pyarrow() -> tuple[Any, Any]:
    """Return the modules `pyarrow` and `pyarrow.parquet`, imported at the first call.

    Raises:
        ConfigError: pyarrow is not installed, or cannot be loaded here.
    """
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"Parquet: pyarrow cannot be imported ({error}); wanted it: pip install input-workers[parquet]"
        ) from error
    return pyarrow, pyarrow.parquet


class Parquet:
    """A Source over Parquet files with the same columns. Rows are numbered file by file, in the order of the files.

    `fetch` returns one array per column, in the order of `columns`, rows along axis 0. A column with a decoder gives what
    that returns for each value (bytes, str, dict, list or number, as pyarrow's `as_py` makes them). Without one:

    | column | input |
    |---|---|
    | bool, int8 to int64, uint8 to uint64, float16 to float64 | the same dtype, () |
    | list or fixed-size list of these | the same dtype, (k,); k must be the same for all rows |

    Other types (strings, binary, dates, decimals, nested ones) need a decoder. A row with a null in one of the columns
    cannot be read: nothing is put in its place.

    A row group is read and decoded as a whole, and kept in a cache. So shuffle in blocks (see `block_rows`), or give the
    cache room for all of it: else each request reads many whole groups again.

    Thread-safe. A group that several threads want is read by one of them, the others wait; no lock is held meanwhile.
    Memory: `cache_bytes` (or one group, if that is larger) and a group for each fetcher. No file stays open. It may be
    pickled (with decoders that can) to processes that see the same files; the cache stays behind. Not to be forked while
    another thread fetches. A decoder is called from many threads at once.

    Attributes:
        columns: names of the columns, in the order of the inputs.
        paths: the files.
        block_rows: rows `i * block_rows` to `(i + 1) * block_rows - 1` lie together; a shuffle may keep them so.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        columns: Sequence[str] | Mapping[str, Decoder | None],
        *,
        block_rows: int | None = None,
        cache_bytes: int = 256 * 1024 * 1024,
        pad_ragged: Mapping[str, Any] | None = None,
    ) -> None:
        """Read the footers of the files.

        Args:
            paths: one file or several; their order is that of the rows.
            columns: `["features", "label"]`, or with decoders from a value to an array, `{"image": decode, "label": None}`.
            block_rows: by default the mean number of rows of a row group.
            cache_bytes: decoded row groups are kept up to this many bytes, and the last one read in any case.
            pad_ragged: for columns whose rows have unequal length; see `Map`.

        Raises:
            ConfigError: a parameter is wrong; a file is missing, no Parquet file or damaged; a column is missing, has
                another type than in the first file, or a type that needs a decoder; there are no rows; no pyarrow.
        """
        _, parquet = load_pyarrow()
        self._decoders = chosen_decoders("Parquet", "columns", columns)
        self.columns = tuple(self._decoders)
        self.cache_bytes = check_whole("Parquet: cache_bytes", cache_bytes, 1)
        self._pads = checked_pads("Parquet", pad_ragged)
        self._files = list_files("Parquet", paths)
        self.paths = tuple(file.path for file in self._files)
        self._footers: list[Any] = []
        groups: list[tuple[int, int]] = []  # (file, row group in it)
        group_rows: list[int] = []
        types: dict[str, Any] = {}
        for number, file in enumerate(self._files):
            try:
                with parquet.ParquetFile(file.path, pre_buffer=False) as opened:
                    footer, schema = opened.metadata, opened.schema_arrow
            except Exception as error:  # pyarrow raises its own, and OSError, for what is damaged
                raise ConfigError(f"Parquet: {file.path!r} cannot be read: {error}; wanted a whole Parquet file") from error
            self._check_types(file.path, schema, types)
            self._footers.append(footer)
            groups.extend((number, group) for group in range(footer.num_row_groups))
            group_rows.extend(footer.row_group(group).num_rows for group in range(footer.num_row_groups))
        self._groups: NDArray[np.int64] = np.array(groups, np.int64).reshape(-1, 2)
        self._ends: NDArray[np.int64] = np.cumsum(group_rows, dtype=np.int64)
        self._rows = sum(group_rows)
        if not self._rows:
            raise ConfigError(f"Parquet: paths: {list(self.paths)} hold no rows; wanted at least one")
        mean = max(1, round(self._rows / np.count_nonzero(group_rows)))
        self.block_rows = mean if block_rows is None else check_whole("Parquet: block_rows", block_rows, 1)
        self._cache = GroupCache(self.cache_bytes)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _cache=GroupCache(state["cache_bytes"]))

    def __len__(self) -> int:
        return self._rows

    def file_of(self, row: int) -> str:
        """Return "path, row group g, row r", both counted from 0, r within the group. Raises IndexError: no such row."""
        if not 0 <= row < self._rows:
            raise IndexError(f"row: got {row}; wanted 0..{self._rows - 1}")
        group = int(np.searchsorted(self._ends, row, side="right"))
        begin = int(self._ends[group - 1]) if group else 0
        file, inner = self._groups[group].tolist()
        return f"{self.paths[file]}, row group {inner}, row {row - begin}"

    def fetch(self, rows: NDArray[np.int64], request: FetchRequest) -> list[NDArray[Any]]:
        """Read these rows, group by group.

        Args:
            rows: int64 (n,), row numbers, at least one.
            request: of it only `out` is used: memory to write into, one array of n rows per column.

        Returns:
            One array per column, (n, ...), in the order of `rows`; those of `request.out` where it was given.

        Raises:
            BadRows: names every row of the request that has a null, whose group cannot be read, or whose decoder raised.
            IndexError: a row number is outside 0..len - 1.
            SpecMismatch: rows of the request differ in dtype or shape, or are not what `request.out` is for.
        """
        check_rows(rows, self._rows)
        columns = make_padded_columns("Parquet", self.columns, len(rows), request.out, self._pads)
        failures = Failures()
        of_row = np.searchsorted(self._ends, rows, side="right")
        for group in dict.fromkeys(of_row.tolist()):
            at = np.flatnonzero(of_row == group)
            try:
                blocks = self._cache.get(group, functools.partial(self._read, group))
            except MemoryError:
                raise
            except Exception as error:  # the other groups are still tried: one report names all bad rows
                for row in rows[at].tolist():
                    failures.add(row, f"cannot be read: {describe(error)}", error)
                continue
            inner = rows[at] - (self._ends[group - 1] if group else 0)
            for name, column, block in zip(self.columns, columns, blocks, strict=True):
                _take(name, column, block, self._decoders[name], at, rows[at], inner, failures)
        failures.raise_any(self.file_of, "Write the file again, with this row repaired or left out")
        return arrays_of(columns)

    def _check_types(self, path: str, schema: Any, types: dict[str, Any]) -> None:
        """Compare the columns of a file with those of the first one, which are noted."""
        pyarrow, _ = load_pyarrow()
        for name, decoder in self._decoders.items():
            times = len(schema.get_all_field_indices(name))
            if times != 1:
                raise ConfigError(
                    f"Parquet: columns: {path!r} has {name!r} {times} times; wanted it once; its columns are {schema.names}"
                )
            kind = schema.field(name).type
            if types.setdefault(name, kind) != kind:
                raise ConfigError(
                    f"Parquet: columns: {name!r} is {kind} in {path!r}; wanted {types[name]}, as in {self.paths[0]!r}"
                )
            value = kind.value_type if _is_list(pyarrow, kind) else kind
            if decoder is None and not _is_number(pyarrow, value):
                raise ConfigError(
                    f"Parquet: columns: {name!r} is {kind} in {path!r}; wanted numbers, bool or lists of them, "
                    f"or a decoder from a value to an array: {{{name!r}: decode}}"
                )

    def _read(self, group: int) -> tuple[list[Block], int]:
        """Read and decode one row group; return its columns and their bytes."""
        pyarrow, parquet = load_pyarrow()
        number, inner = self._groups[group].tolist()
        file: DataFile = self._files[number]
        file.check(os.stat(file.path))
        # Opened for each reading: one reader is not promised to serve several threads. The fetchers are the parallel
        # part, so pyarrow's own threads are not used.
        with parquet.ParquetFile(
            file.path, metadata=self._footers[number], pre_buffer=False, page_checksum_verification=True
        ) as opened:
            table = opened.read_row_group(inner, columns=list(self.columns), use_threads=False)
        rows = self._footers[number].row_group(inner).num_rows
        blocks: list[Block] = []
        for name, decoder in self._decoders.items():
            column = table.column(name)
            if len(column) != rows:
                raise ValueError(f"column {name!r} has {len(column)} values in row group {inner}; its footer says {rows}")
            if decoder is None:
                blocks.append(_decode(pyarrow, column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()))
            else:
                valid = np.asarray(column.is_valid()) if column.null_count else None
                blocks.append((column, valid, column.nbytes))
        return blocks, sum(nbytes for _, _, nbytes in blocks)


def _is_list(pyarrow: Any, kind: Any) -> bool:
    types = pyarrow.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_number(pyarrow: Any, kind: Any) -> bool:
    types = pyarrow.types
    return bool(types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind))


def _numbers(pyarrow: Any, array: Any) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Return the values of an array of numbers, and which of them are no nulls (None: all)."""
    valid = np.asarray(array.is_valid()) if array.null_count else None
    if valid is not None:
        # With nulls pyarrow would make floats of the numbers. What stands below a null is never handed out.
        if pyarrow.types.is_boolean(array.type):
            array = array.fill_null(False)
        else:
            array = pyarrow.Array.from_buffers(array.type, len(array), [None, array.buffers()[1]], 0, array.offset)
    return array.to_numpy(zero_copy_only=False), valid


def _decode(pyarrow: Any, array: Any) -> Block:
    """Return a column of numbers, or of lists of them, as a block."""
    if not _is_list(pyarrow, array.type):
        values, valid = _numbers(pyarrow, array)
        return values, valid, values.nbytes
    valid = np.asarray(array.is_valid()) if array.null_count else None
    lengths = np.asarray(pyarrow.compute.list_value_length(array).fill_null(0)).astype(np.int64)
    flat, elements = _numbers(pyarrow, array.flatten())
    ends = np.cumsum(lengths)
    if elements is not None:  # a list with a null in it
        missing = np.concatenate([[0], np.cumsum(~elements)])
        whole = missing[ends] == missing[ends - lengths]
        valid = whole if valid is None else valid & whole
    if (lengths == lengths[0]).all():
        return flat.reshape(len(lengths), int(lengths[0])), valid, flat.nbytes
    ragged = [flat[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]
    return ragged, valid, flat.nbytes + VIEW_BYTES * len(ragged)


def _take(
    name: str,
    column: Column,
    block: Block,
    decoder: Decoder | None,
    at: NDArray[np.int64],
    rows: NDArray[np.int64],
    inner: NDArray[np.int64],
    failures: Failures,
) -> None:
    """Copy the rows `inner` of a block to the positions `at` of the column."""
    values, valid, _ = block
    good = np.ones(len(inner), np.bool_) if valid is None else valid[inner]
    null = f"has a null in column {name!r}; wanted a value"
    if isinstance(values, np.ndarray):
        for row in rows[~good].tolist():
            failures.add(row, null)
        if good.any():
            column.put_many(at[good], rows[good], values[inner[good]])
        return
    for position, row, index, present in zip(at.tolist(), rows.tolist(), inner.tolist(), good.tolist(), strict=True):
        if not present:
            failures.add(row, null)
            continue
        try:
            column.put(position, row, values[index] if decoder is None else decoder(values[index].as_py()))
        except (SpecMismatch, MemoryError):  # not for lack of this row
            raise
        except Exception as error:  # foreign code may raise anything
            failures.add(row, f"cannot be decoded, column {name!r}: {describe(error)}", error)
