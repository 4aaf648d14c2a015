"""Map: any data set with a length and rows by number, its rows exactly as they are, its bad rows by their numbers."""

from __future__ import annotations

import collections
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from gates import HANG_SECONDS
from sources.sized_source import check_every_row_comes_once, fetch

import input_workers as iw
from input_workers.sources import Map

Pair = collections.namedtuple("Pair", ["image", "label"])  # noqa: PYI024


class Rows:
    """A map-style data set as PyTorch has it: row 3 is (an image full of threes, 3)."""

    def __init__(self, count: int = 20, make: Any = lambda row: (np.full((2, 3), row, np.float32), row), bad: Any = ()) -> None:
        self.count, self.make, self.bad = count, make, bad
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Any:
        assert type(row) is int  # many data sets cannot be asked with NumPy's integers
        self.read.append(row)
        if row in self.bad:
            raise OSError(f"disk error at {row}")
        return self.make(row)


class Batched(Rows):
    """As PyTorch's Subset and Hugging Face's Dataset: rows can be read together."""

    calls = 0

    def __getitems__(self, rows: list[int]) -> Any:
        self.calls += 1
        assert type(rows) is list
        if set(rows) & set(self.bad):
            raise RuntimeError("one of them is bad")
        return [self.make(row) for row in rows]


class Tensor:
    """As a tensor of a framework: can be had as an array, and is none."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.array


class Picture:
    """As Pillow's images."""

    def __init__(self, array: np.ndarray) -> None:
        self.__array_interface__ = array.__array_interface__
        self.array = array


class WithoutHostMemory:
    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError("is on a device")


class TestItems:
    @pytest.mark.parametrize(
        "wrap",
        [tuple, list, lambda pair: Pair(*pair), lambda pair: (Tensor(pair[0]), Tensor(np.array(pair[1])))],
        ids=["tuple", "list", "namedtuple", "tensors"],
    )
    def test_a_sequence_is_one_entry_per_input(self, wrap: Any) -> None:
        images, labels = fetch(Map(Rows(make=lambda row: wrap((np.full((2, 3), row, np.float32), row)))), 7, 0, 7)
        assert (images.dtype, images.shape, labels.dtype) == (np.float32, (3, 2, 3), np.int64)
        assert images[:, 1, 2].tolist() == labels.tolist() == [7, 0, 7]

    def test_a_mapping_gives_its_columns_in_their_order(self) -> None:
        rows = Rows(make=lambda row: {"label": row, "name": "x", "image": np.full(2, -row)})
        images, labels = fetch(Map(rows, columns=("image", "label")), 4, 5)
        assert (images.tolist(), labels.tolist()) == ([[-4, -4], [-5, -5]], [4, 5])

    @pytest.mark.parametrize(
        ("value", "dtype"),
        [(True, np.bool_), (3, np.int64), (0.5, np.float64), (1j, np.complex128), (np.float16(2), np.float16)],
    )
    def test_anything_else_is_one_input(self, value: Any, dtype: Any) -> None:
        (array,) = fetch(Map(Rows(make=lambda row: value)), 1, 2)
        assert (array.dtype, array.tolist()) == (dtype, [value, value])

    def test_a_picture_with_an_array_interface_is_an_array(self) -> None:
        (array,) = fetch(Map(Rows(make=lambda row: Picture(np.full((2, 2), row, np.uint8)))), 3)
        assert (array.dtype, array.tolist()) == (np.uint8, [[[3, 3], [3, 3]]])

    def test_a_plain_list_is_a_data_set(self) -> None:
        assert fetch(Map([10, 11, 12]), 2, 0)[0].tolist() == [12, 10]

    def test_offered_memory_is_written_and_returned(self) -> None:
        out = [np.zeros((2, 2, 3), np.float32), np.zeros(2, np.int64)]
        arrays = fetch(Map(Rows()), 9, 4, out=out)
        assert [array is given for array, given in zip(arrays, out, strict=True)] == [True, True]
        assert (out[0][:, 0, 0].tolist(), out[1].tolist()) == ([9, 4], [9, 4])

    def test_what_is_returned_is_not_the_data_sets_memory(self) -> None:
        kept = np.zeros(3)
        fetch(Map(Rows(make=lambda row: kept)), 0)[0][:] = 1
        assert not kept.any()


class TestNothingIsCast:
    @pytest.mark.parametrize(
        ("odd", "got", "wanted"),
        [
            (np.zeros(3, np.float64), r"float64'\) of shape \(3,\)", r"float32'\) of shape \(3,\), as row 4, the first"),
            (np.zeros(3, ">f4"), r">f4'\) of shape \(3,\)", "float32"),
            (np.zeros(2, np.float32), r"of shape \(2,\)", r"of shape \(3,\)"),
            (np.zeros((1, 3), np.float32), r"of shape \(1, 3\)", r"of shape \(3,\)"),
            (np.float32(0), r"of shape \(\)", r"of shape \(3,\)"),
        ],
    )
    def test_rows_that_differ_are_refused_with_their_numbers(self, odd: Any, got: str, wanted: str) -> None:
        rows = Rows(make=lambda row: (row, odd if row == 8 else np.zeros(3, np.float32)))
        with pytest.raises(iw.SpecMismatch, match=f"'input 1', row 8: got .*{got}; wanted .*{wanted}"):
            fetch(Map(rows), 4, 8, 5)

    def test_offered_memory_of_another_dtype_is_refused(self) -> None:
        with pytest.raises(iw.SpecMismatch, match=r"row 5: got .*int64.*; wanted .*int32.*request\.out"):
            fetch(Map(Rows(make=lambda row: row)), 5, out=[np.zeros(1, np.int32)])

    @pytest.mark.parametrize("out", [[np.zeros(1, np.int64)] * 2, [np.zeros(2, np.int64)], []])
    def test_offered_memory_for_other_inputs_or_rows_is_refused(self, out: Any) -> None:
        with pytest.raises(iw.SpecMismatch, match=r"request\.out: got shapes .*; wanted 1 rows"):
            fetch(Map(Rows(make=lambda row: row)), 5, out=out)

    @pytest.mark.parametrize(
        ("value", "got"),
        [
            ("text", "got str"),
            (b"bytes", "got bytes"),
            (None, "got NoneType"),
            ([1, 2], "got list"),
            (np.array([None]), "got dtype"),
            (2**64, "got dtype"),
            (np.zeros((), "V0"), "got dtype"),
            (np.ma.masked_array([1, 2], [0, 1]), "got MaskedArray"),
        ],
        ids=["str", "bytes", "None", "list", "object", "long", "empty", "masked"],
    )
    def test_what_is_no_array_is_refused(self, value: Any, got: str) -> None:
        with pytest.raises(iw.SpecMismatch, match=f"row 6: {got}"):
            fetch(Map(Rows(make=lambda row: (value, row))), 6)

    def test_items_with_another_number_of_entries_are_refused(self) -> None:
        with pytest.raises(iw.SpecMismatch, match="row 2: got an item of 3 entries; wanted 2"):
            fetch(Map(Rows(make=lambda row: (row,) * (3 if row == 2 else 2))), 1, 2)

    def test_a_missing_key_is_refused(self) -> None:
        rows = Rows(make=lambda row: {"a": row} if row == 3 else {"a": row, "b": row})
        with pytest.raises(iw.SpecMismatch, match=r"row 3: got the keys \['a'\]; wanted \['b'\] too"):
            fetch(Map(rows, ("a", "b")), 1, 3)


class TestBadRows:
    @pytest.mark.parametrize("kind", [Rows, Batched])
    def test_all_bad_rows_of_the_request_are_named_from_the_first_error(self, kind: Any) -> None:
        with pytest.raises(iw.BadRows, match=r"row 7: '.*\[7\]' raised OSError: disk error at 7 \(1 more") as caught:
            fetch(Map(kind(bad={2, 7, 9})), 1, 7, 3, 2, 7)
        assert caught.value.rows == (7, 2)
        assert str(caught.value.__cause__) == "disk error at 7"

    def test_a_transform_that_raises_makes_its_row_bad(self) -> None:
        def transform(item: Any, rng: Any) -> Any:
            return 1 // (item - 5)

        with pytest.raises(iw.BadRows, match="ZeroDivisionError") as caught:
            fetch(Map(Rows(make=lambda row: row), transform=transform), 4, 5, 6)
        assert caught.value.rows == (5,)

    def test_a_tensor_that_cannot_be_had_on_the_host_makes_its_row_bad(self) -> None:
        with pytest.raises(iw.BadRows, match="is on a device") as caught:
            fetch(Map(Rows(make=lambda row: WithoutHostMemory() if row == 1 else row)), 0, 1)
        assert caught.value.rows == (1,)

    @pytest.mark.parametrize("rows", [(-1,), (20,), (0, 20), ()])
    def test_rows_outside_the_data_set_are_an_error(self, rows: Any) -> None:
        with pytest.raises(IndexError, match="rows: got"):
            fetch(Map(Rows()), *rows)

    def test_no_memory_is_no_matter_of_the_row(self) -> None:
        def full(*_: Any) -> Any:
            raise MemoryError

        with pytest.raises(MemoryError):
            fetch(Map(Rows(make=full)), 1)
        together = Batched()
        together.__class__ = type("Full", (Batched,), {"__getitems__": full})
        with pytest.raises(MemoryError):
            fetch(Map(together), 1)
        assert together.read == []


class TestReadTogether:
    def test_rows_are_read_together_where_the_data_set_can(self) -> None:
        rows = Batched()
        assert fetch(Map(rows), 3, 1, 2)[1].tolist() == [3, 1, 2]
        assert (rows.calls, rows.read) == (1, [])

    @pytest.mark.parametrize("answer", [lambda rows: [1], lambda rows: {"x": rows, "y": rows}, lambda rows: iter(rows)])
    def test_another_number_of_items_is_refused(self, answer: Any) -> None:
        class Wrong(Rows):
            def __getitems__(self, rows: Any) -> Any:
                return answer(rows)

        with pytest.raises(iw.SpecMismatch, match=r"__getitems__ returned .*; wanted a list of 2 items"):
            fetch(Map(Wrong()), 3, 1)

    def test_a_table_of_columns_as_hugging_face_has_it(self) -> None:
        class Table(Rows):
            def __getitem__(self, key: Any) -> Any:
                if isinstance(key, list):
                    return {"image": np.array([[row, row] for row in key]), "label": np.array(key)}
                return {"image": np.array([key, key]), "label": np.int64(key)}

            def __getitems__(self, keys: list[int]) -> list[Any]:
                batch = self[keys]
                return [{name: array[at] for name, array in batch.items()} for at in range(len(keys))]

        images, labels = fetch(Map(Table(), ["image", "label"]), 5, 2)
        assert (images.tolist(), labels.tolist()) == ([[5, 5], [2, 2]], [5, 2])


class TestTransform:
    def test_it_gets_the_requests_own_random_numbers(self) -> None:
        source = Map(Rows(make=lambda row: row), transform=lambda item, rng: (item, rng.integers(1 << 40)))

        def numbers(index: int, epoch: int, seed: int) -> list[int]:
            rows = np.arange(4)
            return source.fetch(rows, iw.FetchRequest(index, epoch, rows, worker_id=index, seed=seed))[1].tolist()

        expected = np.random.default_rng((7, 1, 3)).integers(1 << 40, size=4).tolist()
        assert numbers(3, 1, 7) == numbers(3, 1, 7) == expected
        assert len({*numbers(3, 1, 7), *numbers(4, 1, 7), *numbers(3, 2, 7), *numbers(3, 1, 8)}) == 16

    def test_it_may_turn_a_mapping_into_inputs(self) -> None:
        source = Map(Rows(make=lambda row: {"x": row}), transform=lambda item, rng: (item["x"], -item["x"]))
        assert [array.tolist() for array in fetch(source, 3, 4)] == [[3, 4], [-3, -4]]


class TestParameters:
    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ((iter([1]),), "has no __getitem__"),
            ((Rows(0),), "has no rows"),
            ((Rows(), "image"), r"columns: got 'image'; wanted keys"),
            ((Rows(), ()), r"columns: got \(\)"),
            ((Rows(), ("a", "a")), "wanted each key once"),
        ],
    )
    def test_a_wrong_one_is_refused(self, arguments: Any, text: str) -> None:
        with pytest.raises(iw.ConfigError, match=text):
            Map(*arguments)

    def test_a_data_set_without_a_length_is_refused(self) -> None:
        class Endless:
            def __getitem__(self, row: int) -> int:
                return row

        with pytest.raises(iw.ConfigError, match="Endless has no length"):
            Map(Endless())

    def test_a_transform_that_cannot_be_called_is_refused(self) -> None:
        with pytest.raises(iw.ConfigError, match="transform: got 3"):
            Map(Rows(), transform=3)  # type: ignore[arg-type]

    def test_mappings_without_columns_are_refused_with_their_keys(self) -> None:
        with pytest.raises(iw.ConfigError, match=r"row 4 is a dict with the keys \['x', 'y'\]; wanted .*columns=\("):
            fetch(Map(Rows(make=lambda row: {"x": 1, "y": 2})), 4)

    def test_columns_without_mappings_are_refused(self) -> None:
        with pytest.raises(iw.ConfigError, match="row 4 is a tuple; wanted no columns"):
            fetch(Map(Rows(), columns=["x"]), 4)


def test_many_threads_read_at_once() -> None:
    together = threading.Barrier(4)

    def make(row: int) -> Any:
        if row < 4:  # each thread's first row
            together.wait(HANG_SECONDS)
        return row, np.full(50, row)

    source = Map(Rows(400, make))
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda first: fetch(source, *range(first, 400, 4)), range(4)))
    for first, (rows, arrays) in enumerate(parts):
        assert rows.tolist() == list(range(first, 400, 4))
        assert (arrays == rows[:, None]).all()


def test_a_pickled_source_reads_the_same() -> None:
    again = pickle.loads(pickle.dumps(Map([3, 4, 5])))
    assert fetch(again, 1, 2)[0].tolist() == [4, 5]


def test_every_row_comes_once_through_a_shuffled_stream(coordinator: iw.GlobalCoordinator) -> None:
    check_every_row_comes_once(coordinator, Map(Rows(22)), 2, list(range(22)))
