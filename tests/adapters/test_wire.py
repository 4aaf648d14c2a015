"""What goes over the wire of worker processes comes out as it went in, its arrays as bytes beside the pickle."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn

from input_workers.adapters.wire import pack, unpack

DTYPES = st.one_of(
    hn.scalar_dtypes(), hn.unicode_string_dtypes(), hn.byte_string_dtypes(), hn.array_dtypes(allow_subarrays=False)
)
ARRAYS = hn.arrays(DTYPES, hn.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
LEAVES = st.one_of(ARRAYS, st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary())
VALUES = st.recursive(
    LEAVES,
    lambda part: st.one_of(
        st.lists(part, max_size=4), st.dictionaries(st.text(max_size=3), part, max_size=4), st.tuples(part, part)
    ),
    max_leaves=12,
)


def as_bits(value: Any) -> Any:
    """Return the value with its arrays and floats as their bits, which compare as they are, also where they are no numbers."""
    if isinstance(value, np.ndarray):
        return "array", value.dtype, value.shape, value.tobytes()
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, dict):
        return {key: as_bits(part) for key, part in value.items()}
    return type(value)(map(as_bits, value)) if isinstance(value, (list, tuple)) else (type(value), value)


@given(VALUES)
def test_any_nested_value_comes_out_as_it_went_in(value: Any) -> None:
    assert as_bits(unpack(pack(value))) == as_bits(value)


def test_arrays_are_not_pickled_and_lie_aligned_in_one_body() -> None:
    parts = [np.arange(size, dtype=np.uint8) for size in (1, 5000, 3)]
    head, body = pack({"a": parts[:2], "b": parts[2]})
    assert head.size < 1000
    assert body.shape == (1, 64 + 5056 + 64)
    out = unpack([head, body])
    body[:] = 7
    assert (out["a"][1] == 7).all(), "a view, not a copy"


def test_arrays_of_objects_and_other_kinds_of_arrays_are_pickled() -> None:
    for value in (np.array([{"a": 1}, None], object), np.ma.masked_array([1, 2], [True, False]), np.float32(3.5)):
        head, body = pack(value)
        assert body.shape == (1, 0)
        out = unpack([head, body])
        assert type(out) is type(value)
        assert repr(out) == repr(value)
