"""PyTorch data sets for the tests of the loader, and whether two batches are the same."""

from __future__ import annotations

import collections
import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

Pair = collections.namedtuple("Pair", ["first", "second"])  # noqa: PYI024  as users have them


class Everything(Dataset):
    """Items of all that `default_collate` takes: tensors, arrays, scalars, numbers, texts, nested."""

    def __init__(self, count: int = 23) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return {
            "image": np.random.default_rng(index).random((3, 30, 50), np.float32),
            "half": torch.full((2, 2), index, dtype=torch.bfloat16),
            "boxes": Pair(torch.arange(index, index + 4), [np.int16(index), float(index)]),
            "label": index,
            "name": f"näme {index}",
            "raw": b"%d" % index,
            "flag": np.array(index % 2 == 0),
            "empty": torch.empty(0, 3),
            "view": np.arange(24, dtype=np.uint8).reshape(4, 6)[::2, ::-3] + np.uint8(index),
        }


class Random(Dataset):
    """Items that draw from the random numbers of the process."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        return index, torch.rand(2), np.random.random(), random.random()


class Sharded(IterableDataset):
    """Each worker has a part, of unequal length, as PyTorch's documentation shows it; draws from random numbers."""

    def __init__(self, count: int = 23, draws: bool = False) -> None:
        self.count, self.draws = count, draws

    def __iter__(self) -> Any:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        for index in range(first, self.count, step):
            if step > 1 and first == 0 and index > self.count // 2:
                return
            yield index, torch.rand(2) if self.draws else torch.tensor([first, step]), f"{index}"


class Remembering(IterableDataset):
    """Knows where it is, and counts how often it was asked for an item."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Any:
        info = get_worker_info()
        self.step = info.num_workers if info else 1
        self.first = info.id if info else 0
        return self

    def __next__(self) -> int:
        if self.at * self.step + self.first >= 37:
            self.at = 0
            raise StopIteration
        self.at += 1
        return (self.at - 1) * self.step + self.first

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def assert_same(one: Any, other: Any) -> None:
    """Fail unless types, structure, dtypes, shapes and values are the same."""
    assert type(one) is type(other), (type(one), type(other))
    if isinstance(one, (torch.Tensor, np.ndarray)):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else np.array_equal(one, other), (one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert_same(list(one.values()), list(other.values()))
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), (len(one), len(other))
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    else:
        assert one == other


def copied(batch: Any) -> Any:
    """Return a batch as plain Python, which holds no memory of workers."""
    if isinstance(batch, (torch.Tensor, np.ndarray)):
        return batch.tolist()
    if isinstance(batch, dict):
        return {key: copied(part) for key, part in batch.items()}
    return [copied(part) for part in batch] if isinstance(batch, (list, tuple)) else batch
