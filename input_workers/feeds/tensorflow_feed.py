"""Slots in, TensorFlow tensors out: on the host the slot's own memory, on a GPU one copy of it.

Imports TensorFlow: loaded when a source with this feed is started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from input_workers.contracts import ArraySpec, Slot
from input_workers.errors import ConfigError
from input_workers.feeds.refusals import dtype_refused, no_room
from input_workers.leases import ALIGNMENT_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TensorFlowFeed"]

HOST = "/CPU:0"
# Bool, signed, unsigned, float, complex: what DLPack carries, in native byte order. bfloat16 has NumPy kind "V".
DLPACK_KINDS = "biufc"


class TensorFlowFeed:
    """Delivers eager tensors, ready on their device.

    On the host a tensor shares the slot's memory through DLPack, which takes 1 us whatever its size, and holds the slot's
    lease: the memory is used again when TensorFlow has dropped the last tensor over it, so a batch that is held never
    changes. What DLPack cannot carry, such as byte strings, bfloat16 and unaligned arrays, is copied.

    On a GPU `send` makes one copy, on the enqueuer's thread, ahead of the trainer. The copy reads from a tensor over the
    slot, which TensorFlow holds until it has read it. int32 stays in host memory, where TensorFlow wants it.

    Constructing it initialises TensorFlow's devices: configure memory growth or logical devices before a source is
    started. Not for use inside a `tf.function`: batches are delivered eagerly.

    Args:
        device: as TensorFlow names it, "/GPU:0"; None: where TensorFlow puts things by default, the first GPU or the host.

    Raises:
        ConfigError: there is no such device here.
    """

    def __init__(self, device: str | None = None) -> None:
        self.device = _find_device(device)
        self._on_host = self.device == HOST
        # A chunk that is itself a batch and aligned becomes the tensor; a GPU reads slots of its own.
        self.chunk_alignment: int | None = ALIGNMENT_BYTES if self._on_host else None
        self._to_host: list[Callable[[NDArray[Any]], Any]] = []

    def open(self, specs: Sequence[ArraySpec], batch_size: int) -> None:
        """Choose for each input how it becomes a tensor.

        Raises:
            SpecMismatch: TensorFlow has no such dtype; it is never cast to another.
        """
        for index, spec in enumerate(specs):
            _check_dtype(index, spec.dtype)
        self._to_host = [_share if spec.dtype.kind in DLPACK_KINDS else _copy for spec in specs]

    def send(self, slot: Slot) -> list[Any]:
        """Return the batch's tensors, on the device; what they share with the slot they hold.

        Raises:
            FeedFailed: the device has no memory for the batch.
        """
        tensors = [to_host(array) for to_host, array in zip(self._to_host, slot.arrays, strict=True)]
        if self._on_host:
            return tensors
        try:
            with tf.device(self.device):
                return [tf.identity(tensor) for tensor in tensors]
        except tf.errors.ResourceExhaustedError as error:
            raise no_room(self.device, slot, None) from error  # TensorFlow does not say what is free

    def receive(self, ticket: list[Any]) -> list[Any]:
        """Return the same tensors: they are ready for any thread."""
        return ticket

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """Return the tensor as an array: on the host its own memory, read-only, where it holds numbers."""
        if self._on_host and np.dtype(tensor.dtype.as_numpy_dtype).kind in DLPACK_KINDS:
            return np.asarray(memoryview(tensor))
        return np.asarray(tensor.numpy())

    def close(self) -> None:
        """Nothing was taken that the tensors do not give back themselves."""


def _share(array: NDArray[Any]) -> Any:
    flags = array.flags
    # TensorFlow checks the alignment in no release build: on other memory it ends the process at the next operation.
    if flags.c_contiguous and flags.writeable and array.ctypes.data % ALIGNMENT_BYTES == 0:
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return _copy(array)


def _copy(array: NDArray[Any]) -> Any:
    with tf.device(HOST):
        return tf.convert_to_tensor(array)


def _check_dtype(index: int, dtype: np.dtype[Any]) -> None:
    try:
        known = tf.as_dtype(dtype)
    except TypeError:
        known = None
    if known is not None and (dtype.kind == "S" or np.dtype(known.as_numpy_dtype) == dtype):
        return
    remedy = "bytes: np.char.encode(array, 'utf-8')" if dtype.kind == "U" else "numbers, bool or bytes"
    raise dtype_refused("TensorFlow", index, dtype, remedy)


def _find_device(wanted: str | None) -> str:
    """Return a device's name, "/GPU:0". TensorFlow itself would quietly use the host instead of a missing device."""
    found = [tf.DeviceSpec.from_string(device.name) for device in tf.config.list_logical_devices()]
    names = [f"/{spec.device_type}:{spec.device_index}" for spec in found]
    if wanted is None:
        return next((name for name in names if name.startswith("/GPU:")), HOST)
    try:
        spec = tf.DeviceSpec.from_string(wanted)
    except ValueError:
        spec = tf.DeviceSpec()
    name = f"/{spec.device_type}:{spec.device_index or 0}"
    if name not in names:
        there = ", ".join(repr(f"tensorflow:{name}") for name in names)
        raise ConfigError(f"feed 'tensorflow:{wanted}': there is no such device; wanted one of {there}")
    return name
