"""Items with rows of unequal length go in; a batch in which they are filled up comes out, as `default_collate` makes it.

Imports PyTorch: loaded when a loader pads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from input_workers.errors import SpecMismatch
from input_workers.sources.padding import Pad, PaddedColumn

__all__ = ["PaddingCollate"]


@dataclasses.dataclass(frozen=True, slots=True)
class PaddingCollate:
    """Pads the entries of items that `pads` names, by key or by place, and leaves the others to `collate`.

    The lengths follow behind the other entries: under `tokens_length`, or as one more entry for each that was padded.
    """

    pads: dict[Any, Pad]
    collate: Callable[[list[Any]], Any]

    def __call__(self, items: list[Any]) -> Any:
        """Return the batch. Raises SpecMismatch: an item has no such entry, or one that cannot be padded."""
        entries = [_entries(item) for item in items]
        missing = [name for name in self.pads if any(name not in each for each in entries)]
        if missing:
            raise SpecMismatch(f"pad_ragged: got items with {list(entries[0])}; wanted {missing} in each, as it says")
        batch: dict[Any, Any] = dict.fromkeys(entries[0])
        lengths = {}
        for name, pad in self.pads.items():
            column = PaddedColumn(f"pad_ragged: {name!r}", len(items), None, pad)
            for at, each in enumerate(entries):
                column.put(at, at, each[name])
            batch[name] = torch.from_numpy(column.filled())
            lengths[f"{name}_length"] = torch.from_numpy(column.lengths)
        rest = [{name: part for name, part in each.items() if name not in self.pads} for each in entries]
        if rest[0]:
            batch |= self.collate(rest)
        batch |= lengths
        return batch if isinstance(items[0], Mapping) else list(batch.values())


def _entries(item: Any) -> dict[Any, Any]:
    """Return what an item holds, by key or by place."""
    if isinstance(item, Mapping):
        return dict(item)
    return dict(enumerate(item if isinstance(item, (tuple, list)) else (item,)))
