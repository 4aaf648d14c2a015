"""A batch of a worker process goes in; a short text of pickle and the bytes of its tensors come out, and a batch again.

Imports PyTorch: loaded when a loader is made.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
import torch
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from input_workers.fetchers.frames import INLINE_BELOW_NBYTES
from input_workers.fetchers.process_child import Worker
from input_workers.leases import ALIGNMENT_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["collate_rows", "pack", "unpack"]


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


class _Packer(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles a batch but for its tensors and arrays, which it notes down: (where it is to lie, the tensor)."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.parts: list[tuple[int, Any]] = []
        self.nbytes = 0

    def persistent_id(self, thing: Any) -> Any:
        kind = type(thing)
        if kind is np.ndarray and not thing.dtype.hasobject:
            what, dtype = "array", thing.dtype
        elif kind is _Rows or (kind is torch.Tensor and _is_plain(thing)):
            what, dtype = "tensor", str(thing.dtype).removeprefix("torch.")
        else:
            return None
        begin = self.nbytes
        self.parts.append((begin, thing))
        self.nbytes += -(-thing.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return what, begin, dtype, tuple(thing.shape)


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, body: NDArray[np.uint8]) -> None:
        super().__init__(file)
        self._body = body

    def persistent_load(self, place: Any) -> Any:
        what, begin, dtype, shape = place
        size = int(np.prod(shape, dtype=np.int64))
        if what == "array":
            if not size * dtype.itemsize:
                return np.empty(shape, dtype)
            return self._body[begin : begin + size * dtype.itemsize].view(dtype).reshape(shape)
        tensor_dtype = getattr(torch, dtype)
        if not size:
            return torch.empty(shape, dtype=tensor_dtype)
        # The tensor holds the array, and with it the memory that was lent for the batch.
        return torch.frombuffer(self._body[begin : begin + size * tensor_dtype.itemsize], dtype=tensor_dtype).reshape(shape)


def pack(content: Any) -> list[NDArray[np.uint8]]:
    """Return the content as two rows of bytes: pickle, and what the tensors and arrays in it hold.

    The latter are written into memory that both processes share, where they are large.
    """
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(content)
    head = np.frombuffer(file.getbuffer(), np.uint8)[np.newaxis]
    shapes = [head.shape, (1, packer.nbytes)]
    worker = Worker.of_this_process
    if worker is None or packer.nbytes < INLINE_BELOW_NBYTES:
        arrays = [head, np.empty(shapes[1], np.uint8)]
    else:
        arrays = worker.lend(shapes, [head.dtype, head.dtype])
        arrays[0][:] = head
    for begin, thing in packer.parts:
        _write(thing, arrays[1][0, begin : begin + thing.nbytes])
    return arrays


def _write(thing: Any, target: NDArray[np.uint8]) -> None:
    if not len(target):
        return
    if isinstance(thing, np.ndarray):
        np.copyto(target.view(thing.dtype).reshape(thing.shape), thing)
        return
    place = torch.frombuffer(target, dtype=thing.dtype).reshape(thing.shape)
    if isinstance(thing, torch.Tensor):
        place.copy_(thing)
    elif isinstance(thing.rows[0], torch.Tensor):
        torch.stack(thing.rows, out=place)
    else:
        np.stack(thing.rows, out=place.numpy())


def unpack(arrays: Sequence[NDArray[np.uint8]]) -> Any:
    """Return what was packed, over the memory of the second array."""
    return _Unpacker(io.BytesIO(arrays[0][0]), arrays[1][0]).load()
