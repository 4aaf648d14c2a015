"""What feeds say where a framework cannot: a dtype or a full device goes in, an error to raise comes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from input_workers.contracts import Slot
from input_workers.errors import FeedFailed, SpecMismatch

if TYPE_CHECKING:
    import numpy as np

__all__ = ["dtype_refused", "no_room"]


def dtype_refused(framework: str, index: int, dtype: np.dtype[Any], remedy: str) -> SpecMismatch:
    """Return the error for an input whose dtype the framework lacks.

    Args:
        framework: its name, for the text.
        index: of the input.
        dtype: of the input.
        remedy: what is wanted instead, unless the byte order is all that is wrong.
    """
    if not dtype.isnative:
        remedy = "native byte order: array.astype(array.dtype.newbyteorder('='))"
    return SpecMismatch(f"input {index}: got dtype {dtype}, which {framework} cannot hold as it is; wanted {remedy}")


def no_room(device: str, slot: Slot, free: tuple[int, int] | None) -> FeedFailed:
    """Return the error for a device without memory for a batch.

    Args:
        device: its name.
        slot: what was to be sent.
        free: bytes that are free on the device, and that it has; None: it does not say.
    """
    nbytes = sum(array.nbytes for array in slot.arrays)
    there = "" if free is None else f"; {free[0]:,} of its {free[1]:,} bytes are free"
    return FeedFailed(
        f"{device} is out of memory: wanted {nbytes:,} bytes for a batch of {slot.rows} rows{there}; lower batch_size or "
        "device_queue_depth, or what else is kept there"
    )
