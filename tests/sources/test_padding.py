"""Rows of unequal length are filled up where a source was told to, with their lengths; else an error says how to tell it."""

from __future__ import annotations

import io
import tarfile
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from gates import register
from hypothesis import given

import input_workers as iw


def request(count: int, out: Any = None) -> iw.FetchRequest:
    made = iw.FetchRequest(0, 0, np.arange(count))
    made.out = out
    return made


def ragged(lengths: list[int], inner: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    return [
        {"tokens": np.arange(length * 2 ** len(inner)).reshape(length, *inner), "label": np.int16(number)}
        for number, length in enumerate(lengths)
    ]


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    inner=st.sampled_from([(), (2,)]),
    wanted=st.sampled_from([9, 12, "longest", (9, -1), ("longest", 7)]),
    offered=st.booleans(),
)
def test_rows_are_filled_up_and_their_lengths_told(lengths, inner, wanted, offered) -> None:
    rows = ragged(lengths, inner)
    length, value = wanted if isinstance(wanted, tuple) else (wanted, 0)
    side = max(lengths) if length == "longest" else length
    source = iw.sources.Map(rows, ["tokens", "label"], pad_ragged={"tokens": wanted})
    out = None
    if offered and length != "longest":
        out = [np.full((len(rows), side, *inner), 99), np.zeros(len(rows), np.int16), np.zeros(len(rows), np.int64)]
    tokens, label, told = source.fetch(np.arange(len(rows)), request(len(rows), out))
    if out is not None:
        assert (tokens is out[0], label is out[1], told is out[2]) == (True, True, True)
    assert (tokens.shape, tokens.dtype) == ((len(rows), side, *inner), rows[0]["tokens"].dtype)
    assert (told.dtype, told.tolist(), label.tolist()) == (np.int64, lengths, list(range(len(rows))))
    for got, row in zip(tokens, rows, strict=True):
        np.testing.assert_array_equal(got[: len(row["tokens"])], row["tokens"])
        assert (got[len(row["tokens"]) :] == value).all()


def test_inputs_without_names_are_padded_by_place() -> None:
    source = iw.sources.Map([(np.ones(2), 5), (np.ones(1), 6)], pad_ragged={0: 3})
    first, second, lengths = source.fetch(np.arange(2), request(2))
    assert (first.tolist(), second.tolist(), lengths.tolist()) == ([[1, 1, 0], [1, 0, 0]], [5, 6], [2, 1])


@pytest.mark.parametrize("fetchers", ["thread", "process"])
@pytest.mark.parametrize("wanted", [9, "longest"])
def test_batches_of_padded_rows(coordinator, fetchers, wanted) -> None:
    lengths = [3, 1, 0, 9, 2, 2, 5]
    source = iw.sources.Map(ragged(lengths), ["tokens", "label"], pad_ragged={"tokens": wanted})
    more: dict[str, Any] = {"last_batch": "keep"}
    if wanted == "longest":
        any_length = [iw.ArraySpec((None,), np.int64), iw.ArraySpec((), np.int16), iw.ArraySpec((), np.int64)]
        more = {"rebatch": False, "specs": any_length}
    handle = register(
        coordinator,
        iw.Stream(source),
        2,
        fetchers=fetchers,
        ordered=True,
        input_names=["tokens", "label", "tokens_length"],
        **more,
    )
    with coordinator:
        came = [(batch.tokens.shape, batch.tokens_length.tolist(), batch.label.tolist()) for batch in handle]
    sides = [9] * 4 if wanted == 9 else [3, 9, 2, 5]
    assert came == [
        ((len(lengths[at : at + 2]), side), lengths[at : at + 2], list(range(7))[at : at + 2])
        for at, side in zip(range(0, 7, 2), sides, strict=True)
    ]


def test_a_source_that_pads_to_the_longest_says_what_it_needs(coordinator) -> None:
    source = iw.sources.Map(ragged([3, 1, 0, 9]), ["tokens", "label"], pad_ragged={"tokens": "longest"})
    names = ["tokens", "label", "tokens_length"]
    handle = register(coordinator, iw.Stream(source), 2, input_names=names)
    with (
        coordinator,
        pytest.raises(iw.FetchFailed, match=r"shapes that change: specs= with None .* rebatch=False, or pad_ragged="),
    ):
        list(handle)


@pytest.mark.parametrize(
    ("items", "more", "match"),
    [
        ([np.ones(2), np.ones(3)], {}, r"row 1: got .* of shape \(3,\); wanted .*\(2,\).* filled up by pad_ragged="),
        ([np.ones((2, 4)), np.ones((3, 4))], {}, "pad_ragged="),
        ([np.ones(2), np.ones(7)], {"pad_ragged": {0: 5}}, r"row 1: got a length of 7; wanted at most 5, as pad_ragged says"),
        ([np.ones(2), np.ones((3, 4))], {"pad_ragged": {0: 5}}, r"row 1: got .*\(5, 4\); wanted .*\(5,\)"),
        ([np.ones(2), np.ones((3, 4))], {"pad_ragged": {0: "longest"}}, r"row 1: got .*\(0, 4\); wanted .*\(0,\)"),
        ([np.ones(2), np.ones(3, np.int8)], {"pad_ragged": {0: "longest"}}, r"got dtype\('int8'\)"),
        ([5.0, 6.0], {"pad_ragged": {0: 5}}, "row 0: got a single value; wanted an array with at least one axis"),
        ([np.array([1, None])], {"pad_ragged": {0: 5}}, "row 0: got dtype dtype\\('O'\\)"),
        ([[1, 2], [3]], {"pad_ragged": {0: 5}}, "row 1: got an item of 1 entries; wanted 2"),
        (["text"], {}, "row 0: got str; wanted an array"),
    ],
)
def test_what_cannot_be_stacked_or_padded_names_the_row(items, more, match) -> None:
    if more.get("pad_ragged") and isinstance(items[0], list):
        items = [[np.ones(1)] * len(item) for item in items]
    with pytest.raises(iw.SpecMismatch, match=match):
        iw.sources.Map(items, **more).fetch(np.arange(len(items)), request(len(items)))


def test_mismatches_of_another_kind_do_not_speak_of_padding() -> None:
    with pytest.raises(iw.SpecMismatch) as raised:
        iw.sources.Map([np.ones((2, 4)), np.ones((2, 5))]).fetch(np.arange(2), request(2))
    assert "pad_ragged" not in str(raised.value)


@pytest.mark.parametrize(
    ("wanted", "match"),
    [
        (128, "pad_ragged: got 128; wanted lengths by input"),
        ({"tokens": 0}, "'tokens': got 0; wanted a length of at least 1, 'longest'"),
        ({"tokens": True}, "got True"),
        ({"tokens": "long"}, "got 'long'"),
    ],
)
def test_wrong_parameters_are_errors(wanted, match) -> None:
    with pytest.raises(iw.ConfigError, match=match):
        iw.sources.Map([1], pad_ragged=wanted)


def test_an_unknown_input_is_an_error() -> None:
    with pytest.raises(iw.ConfigError, match=r"pad_ragged: got \['words'\]; wanted some of \['tokens'\]"):
        iw.sources.Map([{"tokens": np.ones(1)}], ["tokens"], pad_ragged={"words": 3}).fetch(np.arange(1), request(1))


def test_tar_shards_pad_what_a_decoder_returns(tmp_path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, text in enumerate(["abc", "d", "ef"]):
            member = tarfile.TarInfo(f"{number}.txt")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    fields = {"txt": lambda encoded: np.frombuffer(encoded, np.uint8)}
    source = iw.sources.TarShards(tmp_path / "a.tar", fields, pad_ragged={"txt": (4, 46)})
    texts, lengths = source.fetch(np.arange(3), request(3))
    assert ([bytes(text) for text in texts], lengths.tolist()) == ([b"abc.", b"d...", b"ef.."], [3, 1, 2])
    with pytest.raises(iw.ConfigError, match="'jpg' is a picture"):
        iw.sources.TarShards(tmp_path / "a.tar", ["jpg"], pad_ragged={"jpg": 3})


def test_parquet_pads_lists(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"words": [[1, 2], [3], []], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    columns = {"words": lambda value: np.array(value, np.int32), "n": None}
    source = iw.sources.Parquet(tmp_path / "a.parquet", columns, pad_ragged={"words": "longest"})
    words, numbers, lengths = source.fetch(np.arange(3), request(3))
    assert (words.tolist(), numbers.tolist(), lengths.tolist()) == ([[1, 2], [3, 0], [0, 0]], [1, 2, 3], [2, 1, 0])
