"""Parquet: real files; values and dtypes as they were written, only the row groups that are needed, nulls named."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sources.sized_source import check_every_row_comes_once, fetch

import input_workers as iw
from input_workers.sources import Parquet, parquet

REPOSITORY = Path(iw.__file__).parents[1]
NUMBERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"]


def write(path: Path, group: int = 4, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=group, write_page_checksum=True)
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The row groups that are read, in their order."""
    read: list[int] = []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, group, **more: read.append(group) or real(self, group, **more)
    )
    return read


class TestValues:
    @pytest.mark.parametrize("nulls", [False, True])
    @pytest.mark.parametrize("dtype", [*NUMBERS, "bool"])
    def test_numbers_come_as_they_were_written(self, tmp_path: Path, dtype: str, nulls: bool) -> None:
        values = np.arange(10) % 2 == 0 if dtype == "bool" else (np.arange(10) * 11).astype(dtype)
        if dtype in ("int64", "uint64"):
            values[9] = np.iinfo(dtype).max - 1  # no float64 holds it
        path = write(tmp_path / "a.parquet", x=pa.array(values, mask=np.arange(10) == 8 if nulls else None))
        (array,) = fetch(Parquet(path, ["x"]), 9, 0, 5, 5)
        assert (array.dtype, array.tolist()) == (values.dtype, values[[9, 0, 5, 5]].tolist())

    @pytest.mark.parametrize("dtype", [*NUMBERS, "bool"])
    @pytest.mark.parametrize("kind", [lambda of: pa.list_(of), lambda of: pa.large_list(of), lambda of: pa.list_(of, 3)])
    @pytest.mark.parametrize("nulls", [False, True])
    def test_lists_of_one_length_become_rows(self, tmp_path: Path, dtype: str, kind: Any, nulls: bool) -> None:
        values = (np.arange(30).reshape(10, 3) % 7).astype(dtype)
        rows = [None if nulls and row in (1, 8) else values[row].tolist() for row in range(10)]
        path = write(tmp_path / "a.parquet", x=pa.array(rows, kind(pa.from_numpy_dtype(values.dtype))))
        (array,) = fetch(Parquet(path, ["x"]), 9, 0, 5)
        assert (array.dtype, array.tolist()) == (values.dtype, values[[9, 0, 5]].tolist())

    @pytest.mark.parametrize("kind", [pa.int16(), pa.float16(), pa.bool_()])
    def test_an_array_that_begins_within_its_memory_is_read_from_there(self, kind: Any) -> None:
        whole = pa.array(np.array([1, 0, 1, 0, 0]).astype(kind.to_pandas_dtype()), mask=np.array([0, 0, 0, 1, 0], bool))
        values, valid = parquet._numbers(pa, whole.slice(1))
        assert valid is not None
        assert (values[[0, 1, 3]].tolist(), valid.tolist()) == ([0, 1, 0], [True, True, False, True])
        assert values.dtype == kind.to_pandas_dtype()

    def test_empty_lists_are_rows_too(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", x=pa.array([[], []], pa.list_(pa.int16())))
        (array,) = fetch(Parquet(path, ["x"]), 1, 0)
        assert (array.dtype, array.shape) == (np.int16, (2, 0))

    def test_columns_come_in_the_order_asked_for_and_no_others_are_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        real = pq.ParquetFile.read_row_group
        monkeypatch.setattr(
            pq.ParquetFile, "read_row_group", lambda *given, **more: asked.append(more["columns"]) or real(*given, **more)
        )
        path = write(tmp_path / "a.parquet", s=["x"] * 3, a=[1, 2, 3], b=[4, 5, 6])
        assert [array.tolist() for array in fetch(Parquet(path, ["b", "a"]), 2, 0)] == [[6, 4], [3, 1]]
        assert asked == [["b", "a"]]

    def test_a_name_with_a_dot_is_a_name(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", **{"a.b": [1, 2], "a": [3, 4]})
        assert [array.tolist() for array in fetch(Parquet(path, ["a.b", "a"]), 1)] == [[2], [4]]

    def test_decoders_get_each_value_as_python_has_it(self, tmp_path: Path) -> None:
        pictures = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
        encoded = [cv2.imencode(".png", picture)[1].tobytes() for picture in pictures]
        path = write(
            tmp_path / "a.parquet", bytes=encoded, text=[str(row) for row in range(6)],
            tree=[{"bytes": content, "path": None} for content in encoded], number=list(range(6)),
            fixed=pa.array([b"ab"] * 6, pa.binary(2)), category=pa.array(["7"] * 6).dictionary_encode(),
        )  # fmt: skip

        def decode(content: bytes) -> np.ndarray:
            return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)

        decoders = {"tree": lambda tree: decode(tree["bytes"]), "bytes": decode, "text": int, "number": np.float32,
                    "fixed": lambda two: np.frombuffer(two, "S2")[0], "category": int}  # fmt: skip
        trees, images, numbers, floats, pairs, categories = fetch(Parquet(path, decoders), 5, 0, 3)
        assert (images == pictures[[5, 0, 3]]).all()
        assert (trees == images).all()
        assert (numbers.tolist(), floats.dtype, floats.tolist()) == ([5, 0, 3], np.float32, [5, 0, 3])
        assert (pairs.tolist(), categories.tolist()) == ([b"ab"] * 3, [7] * 3)

    def test_offered_memory_is_written_and_returned(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", x=list(range(10)), y=[[row, row] for row in range(10)])
        out = [np.zeros(3, np.int64), np.zeros((3, 2), np.int64)]
        arrays = fetch(Parquet(path, {"x": None, "y": lambda pair: np.array(pair)}), 9, 0, 5, out=out)
        assert [array is given for array, given in zip(arrays, out, strict=True)] == [True, True]
        assert (out[0].tolist(), out[1][:, 1].tolist()) == ([9, 0, 5], [9, 0, 5])
        with pytest.raises(iw.SpecMismatch, match=r"'x', row 9: got .*int64.*; wanted .*int32.*request\.out"):
            fetch(Parquet(path, ["x"]), 9, out=[np.zeros(1, np.int32)])

    def test_what_is_returned_is_not_the_caches_memory(self, tmp_path: Path) -> None:
        source = Parquet(write(tmp_path / "a.parquet", x=[1, 2]), ["x"])
        fetch(source, 0, 1)[0][:] = 9
        assert fetch(source, 0, 1)[0].tolist() == [1, 2]


class TestGroups:
    def test_rows_are_numbered_over_groups_and_files(self, tmp_path: Path) -> None:
        paths = [write(tmp_path / f"{name}.parquet", 3, x=pa.array(range(first, last), pa.int64()))
                 for name, first, last in (("b", 0, 7), ("empty", 0, 0), ("a", 7, 12))]  # fmt: skip
        source = Parquet(paths, ["x"])
        assert len(source) == 12
        assert fetch(source, *range(12))[0].tolist() == list(range(12))
        assert fetch(source, 11, 2, 7, 0)[0].tolist() == [11, 2, 7, 0]
        assert [source.file_of(row) for row in (0, 6, 7, 11)] == [
            f"{paths[0]}, row group 0, row 0", f"{paths[0]}, row group 2, row 0",
            f"{paths[2]}, row group 0, row 0", f"{paths[2]}, row group 1, row 1",
        ]  # fmt: skip

    def test_only_the_groups_that_hold_the_rows_are_read_and_each_once(self, tmp_path: Path, reads: list[int]) -> None:
        source = Parquet(write(tmp_path / "a.parquet", x=list(range(40))), ["x"])
        assert reads == []
        fetch(source, 39, 4, 38, 7)
        assert reads == [9, 1]
        fetch(source, 5, 36)
        assert reads == [9, 1]

    def test_the_cache_is_bounded_by_its_bytes(self, tmp_path: Path, reads: list[int]) -> None:
        source = Parquet(write(tmp_path / "a.parquet", x=list(range(40))), ["x"], cache_bytes=2 * 4 * 8)
        for row in (0, 4, 0, 8, 0, 4):
            assert fetch(source, row)[0].tolist() == [row]
        assert reads == [0, 1, 2, 1]

    def test_blocks_are_as_large_as_the_mean_group_or_as_said(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", x=list(range(10)))
        assert Parquet(path, ["x"]).block_rows == 3
        assert Parquet(path, ["x"], block_rows=7).block_rows == 7

    @pytest.mark.parametrize("row", [-1, 10])
    def test_a_row_outside_is_an_error(self, tmp_path: Path, row: int) -> None:
        source = Parquet(write(tmp_path / "a.parquet", x=list(range(10))), ["x"])
        with pytest.raises(IndexError, match=r"wanted 0\.\.9"):
            fetch(source, 0, row)
        with pytest.raises(IndexError, match=r"wanted 0\.\.9"):
            source.file_of(row)

    def test_many_threads_get_their_own_rows(self, tmp_path: Path) -> None:
        values = np.arange(400).reshape(200, 2)
        path = write(tmp_path / "a.parquet", x=list(range(200)), y=values.tolist())
        source = Parquet(path, ["x", "y"], cache_bytes=500)
        orders = [np.random.default_rng(seed).integers(0, 200, 20).tolist() for seed in range(40)]
        with ThreadPoolExecutor(8) as pool:
            for order, (x, y) in zip(orders, pool.map(lambda order: fetch(source, *order), orders), strict=True):
                assert (x.tolist(), y.tolist()) == (order, values[order].tolist())

    def test_a_pickled_source_reads_the_same_and_takes_no_cache_along(self, tmp_path: Path, reads: list[int]) -> None:
        path = write(tmp_path / "a.parquet", x=np.arange(100_000), group=100_000)
        source = Parquet(path, ["x"], cache_bytes=12345)
        fetch(source, 3)
        pickled = pickle.dumps(source)
        assert len(pickled) < 20_000
        again = pickle.loads(pickled)
        assert fetch(again, 3)[0].tolist() == [3]
        assert (again.cache_bytes, again.block_rows, again.file_of(3)) == (12345, 100_000, f"{path}, row group 0, row 3")
        assert reads == [0, 0]
        assert again._cache.max_bytes == 12345

    def test_no_file_stays_open(self, tmp_path: Path) -> None:
        source = Parquet(write(tmp_path / "a.parquet", x=list(range(10))), ["x"])
        gc.disable()
        try:
            fetch(source, 0, 9)
            links = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
                     if os.path.lexists(f"/proc/self/fd/{name}")]  # fmt: skip
        finally:
            gc.enable()
        assert not [link for link in links if link.startswith(str(tmp_path))]

    def test_every_row_comes_once_through_a_shuffled_stream(self, tmp_path: Path, coordinator: iw.GlobalCoordinator) -> None:
        paths = [write(tmp_path / f"{first}.parquet", x=[[row, row] for row in range(first, first + 11)],
                       number=list(range(first, first + 11))) for first in (0, 100)]  # fmt: skip
        source = Parquet(paths, ["x", "number"], cache_bytes=100)
        check_every_row_comes_once(coordinator, source, 2, [*range(11), *range(100, 111)])


class TestBadRows:
    @pytest.mark.parametrize(
        "values",
        [pa.array([None if row in (2, 9) else row for row in range(12)]),
         pa.array([None if row in (2, 9) else bool(row) for row in range(12)]),
         pa.array([None if row in (2, 9) else [row] for row in range(12)]),
         pa.array([[None, 1] if row in (2, 9) else [row, row] for row in range(12)]),
         pa.array([None if row in (2, 9) else [row] for row in range(12)], pa.list_(pa.int8(), 1)),
         pa.array([[None] if row in (2, 9) else [0] * row for row in range(12)])],
        ids=["number", "bool", "list", "in a list", "fixed list", "in lists of other lengths"],
    )  # fmt: skip
    def test_nulls_are_named_and_other_rows_of_their_group_are_good(self, tmp_path: Path, values: Any) -> None:
        source = Parquet(write(tmp_path / "a.parquet", x=values), ["x"])
        with pytest.raises(
            iw.BadRows, match=r"row 9: '.*a\.parquet, row group 2, row 1' has a null in column 'x'; .*\(1 more.*Write the file"
        ) as caught:
            fetch(source, 9, 1, 2, 9)
        assert caught.value.rows == (9, 2)
        assert fetch(source, 8)[0].tolist() == [values[8].as_py()]
        assert fetch(source, 3)[0].tolist() == [values[3].as_py()]

    def test_a_missing_list_and_a_null_in_a_list_are_told_apart_from_whole_lists(self, tmp_path: Path) -> None:
        source = Parquet(write(tmp_path / "a.parquet", x=[[1], None, [None], [4]]), ["x"])
        with pytest.raises(iw.BadRows) as caught:
            fetch(source, 0, 1, 2, 3)
        assert caught.value.rows == (1, 2)
        assert fetch(source, 3, 0)[0].tolist() == [[4], [1]]

    def test_a_decoder_is_not_asked_for_nulls_and_one_that_raises_makes_its_row_bad(self, tmp_path: Path) -> None:
        asked = []

        def decode(text: str) -> int:
            asked.append(text)
            return int(text)

        source = Parquet(write(tmp_path / "a.parquet", x=["0", None, "two", "3", "4", None]), {"x": decode})
        with pytest.raises(iw.BadRows, match=r"row 2: .*cannot be decoded, column 'x': ValueError: .*'two'") as caught:
            fetch(source, 2, 0, 1, 3)
        assert caught.value.rows == (2, 1)
        assert asked == ["two", "0", "3"]
        assert fetch(source, 3, 4)[0].tolist() == [3, 4]

    def test_lists_of_other_lengths_are_refused_with_their_rows(self, tmp_path: Path) -> None:
        source = Parquet(write(tmp_path / "a.parquet", x=[[1]] * 5 + [[1, 2]] * 4 + [[]]), ["x"])
        with pytest.raises(iw.SpecMismatch, match=r"'x', row 6: got .*\(2,\); wanted .*\(1,\), as row 3, the first"):
            fetch(source, 3, 4, 6)
        with pytest.raises(iw.SpecMismatch, match=r"'x', row 9: got .*\(0,\); wanted .*\(2,\), as row 8"):
            fetch(source, 8, 9)
        assert fetch(source, 6, 5)[0].tolist() == [[1, 2], [1, 2]]

    def test_a_damaged_group_makes_its_rows_bad_and_no_others(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        table = pa.table({"x": np.arange(8) * 1_000_003})
        pq.write_table(table, path, row_group_size=4, write_page_checksum=True, use_dictionary=False, compression="none")
        source = Parquet(path, ["x"])
        status = path.stat()
        content = bytearray(path.read_bytes())
        page = content.index((np.arange(4, 8) * 1_000_003).tobytes())
        content[page] ^= 0xFF
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(iw.BadRows, match=r"row 5: .*row group 1, row 1' cannot be read: .*\(1 more") as caught:
            fetch(source, 1, 5, 2, 4)
        assert caught.value.rows == (5, 4)
        assert fetch(source, 1)[0].tolist() == [1_000_003]

    @pytest.mark.parametrize("change", ["removed", "rewritten"])
    def test_a_changed_file_makes_its_rows_bad(self, tmp_path: Path, change: str) -> None:
        paths = [write(tmp_path / "a.parquet", x=[1, 2]), write(tmp_path / "b.parquet", x=[3])]
        source = Parquet(paths, ["x"])
        if change == "removed":
            paths[0].unlink()
        else:
            os.utime(write(paths[0], x=[2, 1]), ns=(0, 0))
        with pytest.raises(iw.BadRows, match=r"No such file|was changed after it was indexed") as caught:
            fetch(source, 2, 1)
        assert caught.value.rows == (1,)


class TestParameters:
    @pytest.mark.parametrize(
        "values",
        [["text"], [b"bytes"], pa.array([1], pa.timestamp("s")), pa.array([1], pa.date32()), [{"a": 1}], [[["a"]]], [[[1]]],
         pa.array(["a"]).dictionary_encode(), [["a"]], pa.array([None]), pa.array([1]).cast(pa.decimal128(20, 0))],
        ids=str,
    )  # fmt: skip
    def test_a_type_that_needs_a_decoder_is_refused_without(self, tmp_path: Path, values: Any) -> None:
        path = write(tmp_path / "a.parquet", x=values)
        with pytest.raises(iw.ConfigError, match=r"'x' is .* in '.*a\.parquet'; wanted numbers, .*\{'x': decode\}"):
            Parquet(path, ["x"])
        assert len(Parquet(path, {"x": np.array})) == 1

    def test_a_missing_or_double_column_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["x", "x"]), path)
        with pytest.raises(iw.ConfigError, match=r"has 'x' 2 times; wanted it once; its columns are \['x', 'x'\]"):
            Parquet(path, ["x"])
        with pytest.raises(iw.ConfigError, match="has 'y' 0 times"):
            Parquet(path, ["y"])

    def test_files_with_other_types_are_refused(self, tmp_path: Path) -> None:
        paths = [write(tmp_path / "a.parquet", x=pa.array([1])), write(tmp_path / "b.parquet", x=pa.array([1], pa.int32()))]
        with pytest.raises(iw.ConfigError, match=r"'x' is int32 in '.*b\.parquet'; wanted int64, as in '.*a\.parquet'"):
            Parquet(paths, ["x"])

    @pytest.mark.parametrize("content", [b"", b"text" * 100])
    def test_what_is_no_parquet_file_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(iw.ConfigError, match=r"a\.parquet' cannot be read: .*; wanted a whole Parquet file"):
            Parquet(tmp_path / "a.parquet", ["x"])

    def test_a_truncated_file_is_refused(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", x=list(range(10)))
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(iw.ConfigError, match="cannot be read"):
            Parquet(path, ["x"])

    def test_no_rows_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(iw.ConfigError, match="hold no rows"):
            Parquet(write(tmp_path / "a.parquet", x=pa.array([], pa.int8())), ["x"])

    @pytest.mark.parametrize("columns", ["x", [], ["x", "x"], {"x": 3}, None])
    def test_wrong_columns_are_refused(self, tmp_path: Path, columns: Any) -> None:
        with pytest.raises(iw.ConfigError, match="Parquet: columns: got"):
            Parquet(write(tmp_path / "a.parquet", x=[1]), columns)

    @pytest.mark.parametrize("paths", [[], "missing", ["a.parquet", "a.parquet"], "."])
    def test_wrong_paths_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: Any) -> None:
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "a.parquet", x=[1])
        with pytest.raises(iw.ConfigError, match="Parquet: paths: "):
            Parquet(paths, ["x"])

    @pytest.mark.parametrize("name", ["block_rows", "cache_bytes"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, True])
    def test_wrong_numbers_are_refused(self, tmp_path: Path, name: str, value: Any) -> None:
        with pytest.raises(iw.ConfigError, match=f"Parquet: {name}: got {value!r}; wanted a whole number of at least 1"):
            Parquet(write(tmp_path / "a.parquet", x=[1]), ["x"], **{name: value})

    def test_without_pyarrow_the_error_names_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(parquet, "load_pyarrow", parquet.load_pyarrow.__wrapped__)
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(iw.ConfigError, match=r"pip install input-workers\[parquet\]"):
            Parquet("a.parquet", ["x"])

    def test_pyarrow_is_loaded_by_use_alone(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", x=[1])
        check = (
            "import sys, input_workers as iw; kind = iw.sources.Parquet; assert 'pyarrow' not in sys.modules;"
            f"kind({str(path)!r}, ['x']); assert 'pyarrow' in sys.modules"
        )
        subprocess.run([sys.executable, "-c", check], cwd=REPOSITORY, check=True, timeout=60)
