"""A loader fills up what `pad_ragged` names, and says that it could where `default_collate` cannot stack."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import input_workers as iw

loader = iw.adapters.torch.loader
LENGTHS = [3, 1, 0, 5, 2]


class Sentences(Dataset):
    def __init__(self, kind: Any = torch.arange, keys: bool = True) -> None:
        self.kind, self.keys = kind, keys

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, index: int) -> Any:
        item = {"name": f"{index}", "tokens": self.kind(LENGTHS[index]), "image": torch.full((50, 40), index)}
        return item if self.keys else tuple(item.values())


@pytest.mark.parametrize(("workers", "fetchers"), [(0, "thread"), (2, "thread"), (1, "process")])
@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("kind", [torch.arange, np.arange])
@pytest.mark.parametrize("wanted", [(6, -1), "longest"])
def test_entries_are_filled_up_by_key_or_by_place(workers, fetchers, keys, kind, wanted) -> None:
    if fetchers == "process" and (kind is np.arange or wanted != "longest"):
        return  # a process takes seconds to load PyTorch
    pads = {"tokens" if keys else 1: wanted}
    batches = list(loader(Sentences(kind, keys), 2, num_workers=workers, fetchers=fetchers, pad_ragged=pads))
    for number, batch in enumerate(batches):
        lengths = LENGTHS[2 * number : 2 * number + 2]
        side, value = (max(lengths), 0) if wanted == "longest" else wanted
        names, tokens, images, told = batch.values() if keys else batch
        assert not keys or list(batch) == ["name", "tokens", "image", "tokens_length"]
        assert names == [str(2 * number + at) for at in range(len(lengths))]
        assert tokens.tolist() == [[*range(length), *([value] * (side - length))] for length in lengths]
        assert (tokens.dtype, told.dtype, told.tolist()) == (torch.int64, torch.int64, lengths)
        assert images[:, 7, 7].tolist() == [2 * number + at for at in range(len(lengths))]
    assert len(batches) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_stacked_says_how_it_could(workers) -> None:
    with pytest.raises(RuntimeError, match="equal size") as raised:
        list(loader(Sentences(), 2, num_workers=workers))
    assert any("pad_ragged= of the loader" in note for note in raised.value.__notes__)


@pytest.mark.parametrize(
    ("pads", "match"),
    [
        ({"tokens": 4}, "'tokens', row 1: got a length of 5; wanted at most 4"),
        ({"words": 4}, r"got items with \['name', 'tokens', 'image'\]; wanted \['words'\] in each"),
        ({"name": 4}, "'name', row 0: got str; wanted an array"),
    ],
)
def test_what_cannot_be_padded_is_an_error(pads, match) -> None:
    with pytest.raises(iw.SpecMismatch, match=match):
        list(loader(Sentences(), 2, num_workers=1, pad_ragged=pads))


def test_it_pads_in_place_of_a_collate_fn() -> None:
    with pytest.raises(iw.ConfigError, match="pad_ragged with a collate_fn, or without batches"):
        loader(Sentences(), 2, collate_fn=list, pad_ragged={"tokens": 4})
    with pytest.raises(iw.ConfigError, match="pad_ragged with a collate_fn, or without batches"):
        loader(Sentences(), None, pad_ragged={"tokens": 4})
