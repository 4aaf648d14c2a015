"""Nested values become named arrays and come back as they were; what does not fit says where, what came and what was wanted."""

from __future__ import annotations

import collections
import dataclasses
import pickle
from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from input_workers import SpecMismatch
from input_workers.adapters.structure import Structure
from input_workers.contracts import batch_type


class Boxes(NamedTuple):
    corner: np.ndarray
    size: None


@dataclasses.dataclass(frozen=True)
class Sample:
    image: np.ndarray
    label: int


LEAF = st.builds(np.full, st.integers(0, 3), st.integers(0, 9))
KEYS = st.one_of(st.text(max_size=5), st.sampled_from(["class", "epoch", "_x", "item_0", "a b", "a_b", "ä"]), st.integers(0, 3))
NESTED = st.recursive(
    LEAF,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.builds(Boxes, inner, st.none()),
        st.builds(Sample, inner, inner),
    ),
    max_leaves=10,
)


def leaves_in(value):
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, Sample):
        value = [value.image, value.label]
    parts = value.values() if isinstance(value, dict) else value or ()
    return [leaf for part in parts for leaf in leaves_in(part)]


def same(one, other):
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        return one is other
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, Sample):
        return same(one.image, other.image) and same(one.label, other.label)
    return one is other or (len(one) == len(other) and all(map(same, one, other)))


@given(NESTED.filter(leaves_in))
def test_what_is_taken_apart_comes_back_as_it_was_under_names_that_can_be_used(value):
    structure = Structure(value)
    arrays = structure.flatten(value, "it")
    assert all(one is other for one, other in zip(arrays, leaves_in(value), strict=True))
    assert same(structure.unflatten(arrays), value)
    batch_type("train", structure.names)  # raises for a name that is none, or is there twice
    assert Structure(value).names == pickle.loads(pickle.dumps(structure)).names == structure.names


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (3.5, ("item",)),
        ((1, 2), ("item_0", "item_1")),
        (
            {"image": 1, "target": {"boxes": 2, "labels": [3, 4]}},
            ("image", "target_boxes", "target_labels_item_0", "target_labels_item_1"),
        ),
        (Sample(np.zeros(2), 1), ("image", "label")),
        (Boxes(1, None), ("corner",)),
        ({"a b": 1, "a_b": 2, "a-b": 3, "a_b_2": 4}, ("a_b", "a_b_2", "a_b_3", "a_b_2_2")),
        ({"class": 1, "epoch": 2, 7: 3, "": 4}, ("class_", "epoch_", "item_7", "item")),
    ],
)
def test_names_are_keys_fields_and_places(value, names):
    assert Structure(value).names == (names)


def test_a_mapping_may_have_another_order_and_leaves_other_shapes():
    structure = Structure({"a": 1, "b": np.zeros((2, 3))})
    assert [array.shape for array in structure.flatten({"b": np.zeros(7), "a": 2}, "it")] == [(), (7,)]
    assert type(Structure(collections.OrderedDict(a=1)).unflatten([2])) is collections.OrderedDict
    assert Structure(collections.defaultdict(list, a=1)).unflatten([2]) == {"a": 2}


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"a": (1,)}, r"row 7: got dict with \['a'\]; wanted dict with \['a', 'b'\], as in the first one"),
        ({"a": (1,), "b": 2, "c": 3}, r"got dict with \['a', 'b', 'c'\]"),
        ([1, 2], r"got list with \[0, 1\]; wanted dict"),
        ({"a": (1, 2), "b": 2}, r"row 7\['a'\]: got tuple with \[0, 1\]; wanted tuple with \[0\]"),
        ({"a": [1], "b": 2}, r"row 7\['a'\]: got list with \[0\]; wanted tuple"),
        ({"a": None, "b": 2}, r"row 7\['a'\]: got None; wanted tuple"),
        ({"a": (1,), "b": "text"}, r"row 7\['b'\]: got str; wanted an array"),
        ({"a": (1,), "b": {"c": 1}}, r"row 7\['b'\]: got dict; wanted an array"),
        ({"a": (np.array([{}, None]),), "b": 2}, r"row 7\['a'\]\[0\]: got dtype dtype\('O'\); wanted values of a fixed size"),
        ({"a": (np.ma.array([1]),), "b": 2}, r"row 7\['a'\]\[0\]: got MaskedArray; wanted a plain array"),
    ],
)
def test_another_structure_is_an_error_that_names_the_path(value, match):
    with pytest.raises(SpecMismatch, match=match):
        Structure({"a": (1,), "b": 2}).flatten(value, "row 7")


@pytest.mark.parametrize("value", ["text", {"a": [object()]}, None, [], {"a": {}}])
def test_a_first_value_that_is_no_array_or_holds_none_is_an_error(value):
    with pytest.raises(SpecMismatch, match=r"the first item.*; wanted"):
        Structure(value, "the first item")


def test_a_value_that_holds_itself_is_an_error():
    value = []
    value.append(value)
    with pytest.raises(SpecMismatch, match="nested deeper than 32"):
        Structure(value)


def test_none_stays_none_and_may_not_become_an_array():
    structure = Structure((1, None))
    assert structure.unflatten(structure.flatten((5, None), "it")) == (5, None)
    with pytest.raises(SpecMismatch, match=r"it\[1\]: got int; wanted None or nothing"):
        structure.flatten((5, 6), "it")
