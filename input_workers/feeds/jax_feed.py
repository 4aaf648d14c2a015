"""Slots in, JAX arrays out: on the host the slot's own memory, on other devices a copy, over several devices by rows.

Imports JAX: loaded when a source with this feed is started.
"""

from __future__ import annotations

import collections
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from input_workers.contracts import ArraySpec, Slot
from input_workers.errors import ConfigError, SpecMismatch
from input_workers.feeds.refusals import dtype_refused, no_room
from input_workers.leases import ALIGNMENT_BYTES

if TYPE_CHECKING:
    from jax.sharding import Sharding

__all__ = ["JaxFeed", "check_sharding", "find_device"]


class JaxFeed:
    """Delivers JAX arrays: where JAX puts things by default, on one device, or over several as a sharding says.

    On the host an array shares the slot's memory where that is aligned, and holds the slot's lease: the memory is used again
    when JAX has dropped the last array over it. On other devices JAX holds the slot until it has read it, and lets what the
    trainer computes wait for that. `send` waits until the batch before is there, so that two at most are on their way.

    With a sharding each device gets the rows that it says. Where it spans several processes, `batch_size` rows are what this
    process brings, and the array has the rows of all.

    Args:
        where: a device, a `jax.sharding.Sharding`, or None: JAX's default device, as by `jax.device_put(array)`.
    """

    def __init__(self, where: jax.Device | Sharding | None = None) -> None:
        self._where = where
        self._is_sharded = isinstance(where, jax.sharding.Sharding)
        devices = list(getattr(where, "addressable_devices", [where or _default_device()]))
        self._device = devices[0]
        on_host = all(device.platform == "cpu" for device in devices)
        self.chunk_alignment: int | None = ALIGNMENT_BYTES if on_host else None
        self._on_its_way: list[weakref.ref[jax.Array]] = []

    def open(self, specs: Sequence[ArraySpec], batch_size: int) -> None:
        """Check the dtypes.

        Raises:
            SpecMismatch: JAX has no such dtype, or makes it another of 32 bits, as it does unless `jax_enable_x64` is set.
        """
        for index, spec in enumerate(specs):
            _check_dtype(index, spec.dtype)

    def send(self, slot: Slot) -> Sequence[jax.Array]:
        """Return the batch's arrays, on the device or on their way; what they share with the slot they hold.

        Raises:
            SpecMismatch: the rows cannot be dealt to the devices of the sharding.
            FeedFailed: the device has no memory for the batch.
        """
        try:
            arrays = self._put(slot)
            _await(self._on_its_way)
            self._on_its_way = [weakref.ref(array) for array in arrays]
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise no_room(str(self._device), slot, _free_bytes(self._device)) from error
        return arrays

    def _put(self, slot: Slot) -> Sequence[jax.Array]:
        if not self._is_sharded:
            arrays: Sequence[jax.Array] = jax.device_put(list(slot.arrays), self._where)
            return arrays
        try:
            return [jax.make_array_from_process_local_data(self._where, array) for array in slot.arrays]
        except ValueError as error:
            shapes = [array.shape for array in slot.arrays]
            raise SpecMismatch(
                f"got arrays of shapes {shapes}, which cannot be dealt out as {self._where} says; wanted rows that divide "
                "among its devices: another batch_size, last_batch='drop' or 'pad', and no rebatch=False"
            ) from error

    def is_ready(self, ticket: Sequence[jax.Array]) -> bool:
        """Whether every array is on its device."""
        return all(array.is_ready() for array in ticket)

    def receive(self, ticket: Sequence[jax.Array]) -> Sequence[jax.Array]:
        """Return the same arrays: JAX itself lets whatever uses them wait until they are there."""
        return ticket

    def close(self) -> None:
        """Wait until what was sent is there: then its slots are free again."""
        _await(self._on_its_way)
        self._on_its_way = []


def find_device(name: str) -> jax.Device:
    """Return the device of this process that is called "cpu", "gpu:1" or "tpu:0".

    Raises:
        ConfigError: there is no such device here.
    """
    platform, _, number = name.partition(":")
    try:
        devices = jax.local_devices(backend=platform)
    except RuntimeError:  # no such platform
        devices = []
    if (number or "0") in map(str, range(len(devices))):
        return devices[int(number or 0)]
    devices = jax.local_devices()
    if all(device.platform != "cpu" for device in devices):
        devices += jax.local_devices(backend="cpu")
    counts: collections.Counter[str] = collections.Counter()
    there = []
    for device in devices:
        there.append(repr(f"jax:{device.platform}:{counts[device.platform]}"))
        counts[device.platform] += 1
    raise ConfigError(f"feed 'jax:{name}': there is no such device; wanted one of {', '.join(there)}")


def check_sharding(sharding: Sharding, batch_size: int, axes: Sequence[int]) -> None:
    """Check that batches can be dealt to the devices of a sharding, as far as that can be known before the first.

    Raises:
        ConfigError: the rows do not divide among them.
    """
    if not isinstance(sharding, jax.sharding.NamedSharding) or not sharding.is_fully_addressable:
        return  # how many rows there are in all, and of how many axes it speaks, is known with the first batch only
    for axis in axes:
        shape = [0] * max(axis + 1, len(sharding.spec))  # nothing can be divided by anything
        shape[axis] = batch_size
        try:
            sharding.shard_shape(tuple(shape))
        except ValueError:
            count = len(sharding.device_set)
            raise ConfigError(
                f"batch_size: got {batch_size}, which cannot be dealt to {count} devices as {sharding} says; wanted a "
                f"multiple of how many parts it makes of axis {axis}"
            ) from None


def _default_device() -> jax.Device:
    default = jax.config.jax_default_device
    if isinstance(default, str):
        return jax.local_devices(backend=default)[0]
    return default if default is not None else jax.local_devices()[0]


def _check_dtype(index: int, dtype: np.dtype[Any]) -> None:
    try:
        known = jax.device_put(np.empty(0, dtype)).dtype
    except TypeError:
        remedy = "numbers or bool; of byte strings array.view(np.uint8)"
        raise dtype_refused("JAX", index, dtype, remedy) from None
    if known != dtype:
        remedy = f"jax.config.update('jax_enable_x64', True) before the start, or {known}: array.astype(np.{known})"
        raise dtype_refused("JAX", index, dtype, remedy)


def _await(arrays: Sequence[weakref.ref[jax.Array]]) -> None:
    """Wait until what is left of these arrays is on its device."""
    for each in arrays:
        array = each()
        try:
            if array is not None:
                array.block_until_ready()
        except RuntimeError:
            if array is None or not array.is_deleted():  # the trainer may have given it to a computation meanwhile
                raise


def _free_bytes(device: jax.Device) -> tuple[int, int] | None:
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats["bytes_in_use"], stats["bytes_limit"]
