"""The wire of worker processes for batches of PyTorch: tensors go as their bytes, too, and rows are stacked on the way.

Imports PyTorch: loaded when a loader is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from input_workers.adapters import wire
from input_workers.adapters.wire import Packer, Unpacker, dumps

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["collate_rows", "dumps", "pack", "unpack"]


class _Rows:
    """Rows that `default_collate` would stack, kept apart until they are written where they are to lie."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows
        first = rows[0]
        self.dtype = first.dtype if isinstance(first, torch.Tensor) else torch.from_numpy(np.empty(0, first.dtype)).dtype
        self.shape = (len(rows), *first.shape)
        self.nbytes = len(rows) * first.nbytes


def collate_rows(items: list[Any]) -> Any:
    """Do what `torch.utils.data.default_collate` does, but leave it to `pack` to stack the rows: each is copied once."""
    return collate(items, collate_fn_map=_KEEPING_ROWS)


def _keep_rows(items: list[Any], *, collate_fn_map: Any = None) -> Any:  # noqa: ARG001  PyTorch passes it
    first = items[0]
    kind = type(first)
    if kind in (torch.Tensor, np.ndarray) and all(
        type(item) is kind and item.dtype == first.dtype and item.shape == first.shape for item in items
    ):
        if kind is np.ndarray and first.dtype.kind in "biufc" and first.dtype.isnative:
            return _Rows(items)
        if kind is torch.Tensor and all(map(_is_plain, items)):
            return _Rows(items)
    like = torch.Tensor if isinstance(first, torch.Tensor) else np.ndarray
    return default_collate_fn_map[like](items, collate_fn_map=default_collate_fn_map)


_KEEPING_ROWS = {torch.Tensor: _keep_rows, np.ndarray: _keep_rows, **{
    kind: function for kind, function in default_collate_fn_map.items() if kind not in (torch.Tensor, np.ndarray)
}}  # fmt: skip


def _is_plain(tensor: Any) -> bool:
    """Whether its values are all there is of it: no gradient, no lazy conjugation, not sparse, not on a device."""
    return (
        type(tensor) is torch.Tensor
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


class _Packer(Packer):
    """Sees tensors, too, and rows that are to be stacked."""

    def kind_of(self, thing: Any) -> tuple[str, Any] | None:
        if type(thing) is _Rows or (type(thing) is torch.Tensor and _is_plain(thing)):
            return "tensor", str(thing.dtype).removeprefix("torch.")
        return super().kind_of(thing)

    def write(self, thing: Any, target: NDArray[np.uint8]) -> None:
        if isinstance(thing, np.ndarray):
            super().write(thing, target)
            return
        place = torch.frombuffer(target, dtype=thing.dtype).reshape(thing.shape)
        if isinstance(thing, torch.Tensor):
            place.copy_(thing)
        elif isinstance(thing.rows[0], torch.Tensor):
            torch.stack(thing.rows, out=place)
        else:
            np.stack(thing.rows, out=place.numpy())


class _Unpacker(Unpacker):
    def read(self, kind: str, begin: int, dtype: Any, shape: tuple[int, ...], size: int) -> Any:
        if kind == "array":
            return super().read(kind, begin, dtype, shape, size)
        tensor_dtype = getattr(torch, dtype)
        if not size:
            return torch.empty(shape, dtype=tensor_dtype)
        # The tensor holds the array, and with it the memory that was lent for the batch.
        return torch.frombuffer(self._body[begin : begin + size * tensor_dtype.itemsize], dtype=tensor_dtype).reshape(shape)


def pack(content: Any) -> list[NDArray[np.uint8]]:
    """Return the content as two rows of bytes; see `wire.pack`."""
    return wire.pack(content, _Packer)


def unpack(arrays: Sequence[NDArray[np.uint8]]) -> Any:
    """Return what was packed; see `wire.unpack`."""
    return wire.unpack(arrays, _Unpacker)
