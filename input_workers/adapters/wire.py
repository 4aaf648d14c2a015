"""What a worker process answers goes in; a short text of pickle and the bytes of its arrays come out, and the answer again.

Imports cloudpickle: loaded when processes are used.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np

from input_workers.fetchers.frames import INLINE_BELOW_NBYTES
from input_workers.fetchers.worker import Worker
from input_workers.leases import ALIGNMENT_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Packer", "Unpacker", "dumps", "pack", "unpack"]


class Packer(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles an answer but for its arrays, which it notes down: (where it is to lie, the array)."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.parts: list[tuple[int, Any]] = []
        self.nbytes = 0

    def persistent_id(self, thing: Any) -> Any:
        """Return where it is to lie, and what it is; None: it is pickled."""
        kind = self.kind_of(thing)
        if kind is None:
            return None
        begin = self.nbytes
        self.parts.append((begin, thing))
        self.nbytes += -(-thing.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return kind[0], begin, kind[1], tuple(thing.shape)

    def kind_of(self, thing: Any) -> tuple[str, Any] | None:
        """Return what an array is, and its dtype; None of what is none."""
        return ("array", thing.dtype) if type(thing) is np.ndarray and not thing.dtype.hasobject else None

    def write(self, thing: Any, target: NDArray[np.uint8]) -> None:
        """Write what it holds, at least one byte."""
        np.copyto(target.view(thing.dtype).reshape(thing.shape), thing)


class Unpacker(pickle.Unpickler):
    """The other way round, over the memory of `body`."""

    def __init__(self, file: io.BytesIO, body: NDArray[np.uint8]) -> None:
        super().__init__(file)
        self._body = body

    def persistent_load(self, place: Any) -> Any:
        """Return the array that lies there."""
        kind, begin, dtype, shape = place
        return self.read(kind, begin, dtype, shape, int(np.prod(shape, dtype=np.int64)))

    def read(self, kind: str, begin: int, dtype: Any, shape: tuple[int, ...], size: int) -> Any:
        """Return an array of so many values."""
        if not size * dtype.itemsize:
            return np.empty(shape, dtype)
        return self._body[begin : begin + size * dtype.itemsize].view(dtype).reshape(shape)


def dumps(order: Any) -> bytes:
    """Return an order as bytes, for a worker that knows nothing of our main module."""
    return bytes(cloudpickle.dumps(order))


def pack(content: Any, packer_of: type[Packer] = Packer) -> list[NDArray[np.uint8]]:
    """Return the content as two rows of bytes: pickle, and what the arrays in it hold.

    The latter are written into memory that both processes share, where they are large.
    """
    file = io.BytesIO()
    packer = packer_of(file)
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
        if thing.nbytes:
            packer.write(thing, arrays[1][0, begin : begin + thing.nbytes])
    return arrays


def unpack(arrays: Sequence[NDArray[np.uint8]], unpacker_of: type[Unpacker] = Unpacker) -> Any:
    """Return what was packed, over the memory of the second array."""
    return unpacker_of(io.BytesIO(arrays[0][0]), arrays[1][0]).load()
